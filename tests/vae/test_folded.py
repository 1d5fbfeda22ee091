"""log p(x|z) with what doesn't depend on z taken once is the model's own."""

import pytest
import torch
from torch import Tensor, nn

from vae import VAE, VAEConfig
from vae.evidence import importance_sampling, prior_monte_carlo
from vae.folded import Folded, log_px_z_of
from vae.noise import example_generators

CONFIG = {
    "data_shape": (1, 5, 7),
    "space": "binary",
    "latent_dim": 3,
    "likelihood": "bernoulli",
    "hidden": (8, 7),
}


def model_of(dtype: torch.dtype = torch.float64, **changes) -> VAE:
    torch.manual_seed(0)
    model = VAE(VAEConfig(**CONFIG | changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return model


def data_of(model: VAE, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, (count, *model.config.data_shape), generator=generator)


def latents_of(model: VAE, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(*shape, model.noise_dim, generator=generator, dtype=torch.float64)
    return 2 * z.to(model.dtype)


def both_ways(
    model: VAE, precision: str = "fp32", x: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    x = data_of(model) if x is None else x
    z = latents_of(model, 6, 4)
    log_px_z_at = log_px_z_of(model, x, precision)
    assert isinstance(log_px_z_at, Folded)
    with torch.inference_mode(), model.products_in(precision):
        return log_px_z_at(z), model.likelihood(z).log_prob(x)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("hidden", [(), (8,), (8, 7), (5, 6, 7)])
@pytest.mark.parametrize("data_shape", [(1, 5, 7), (16,), (3,), (1,)])
def test_it_is_the_model_s_own(activation, hidden, data_shape):
    model = model_of(activation=activation, hidden=hidden, data_shape=data_shape)
    torch.testing.assert_close(*both_ways(model), rtol=1e-12, atol=1e-12)


def test_of_the_latents_next_to_the_data():
    model = model_of(latent_dim=(3, 2))
    torch.testing.assert_close(*both_ways(model), rtol=1e-12, atol=1e-12)


def test_in_float32():
    torch.testing.assert_close(*both_ways(model_of(torch.float32)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logit", [-2000.0, -30.0, 8.0, 12.0, 30.0, 99.0, 2000.0])
def test_certain_pixels_keep_their_digits(logit, dtype):
    """Right and wrong ones, whatever the product of their σ is."""
    model = model_of(dtype)
    with torch.no_grad():
        model.decoder.output.bias.fill_(logit)
    found, expected = both_ways(model)
    assert found.isfinite().all()
    digits = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(found, expected, rtol=digits, atol=0)


@pytest.mark.parametrize("bit", [0, 1])
@pytest.mark.parametrize("logit", [4.0, 8.0, 10.0])
def test_certain_pixels_that_are_right_keep_theirs(logit, bit):
    """In bf16 too, as long as the data's mean says which value is the likelier one."""
    model = model_of(torch.float32)
    model.set_data_statistics(torch.full((1, 5, 7), float(bit)), torch.zeros(1, 5, 7))
    with torch.no_grad():
        model.decoder.output.weight.mul_(0.1)
        model.decoder.output.bias.fill_(logit if bit else -logit)
    x = torch.full((4, 1, 5, 7), bit)
    exact = both_ways(model.double(), x=x)[1]
    model.float()
    torch.testing.assert_close(both_ways(model, x=x)[0].double(), exact, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(both_ways(model, "bf16", x)[0].double(), exact, rtol=0.02, atol=2e-6)


def test_bf16_errs_by_about_as_much_as_the_model_s_own_bf16():
    model = model_of(torch.float32, hidden=(200, 200), data_shape=(1, 28, 28), latent_dim=20)
    exact = both_ways(model.double())[1]
    found, expected = both_ways(model.float(), "bf16")
    own = (expected - exact).square().mean().sqrt()
    assert 0.01 < own < 2
    assert (found - exact).square().mean().sqrt() < 2 * own


def test_float64_is_left_alone_by_bf16():
    found, expected = both_ways(model_of(), "bf16")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_nothing_of_the_model_is_changed():
    model = model_of()
    before = [parameter.clone() for parameter in model.parameters()]
    x = data_of(model).double()
    kept = x.clone()
    z = latents_of(model, 6, 4)
    kept_z = z.clone()
    log_px_z_of(model, x)(z)
    assert torch.equal(x, kept)
    assert torch.equal(z, kept_z)
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "silu"},
        {"network": "conv"},
        {"space": "continuous", "likelihood": "gaussian"},
    ],
    ids=["silu", "conv", "gaussian"],
)
def test_other_models_are_asked_themselves(changes):
    model = model_of(**changes)
    log_px_z_at = log_px_z_of(model, data_of(model))
    assert not isinstance(log_px_z_at, Folded)
    z = latents_of(model, 6, 4)
    with torch.inference_mode():
        expected = model.likelihood(z).log_prob(data_of(model))
        assert torch.equal(log_px_z_at(z), expected)


@pytest.mark.parametrize("part", ["decoder", "encoder", "decoder.output", "posterior_family"])
def test_a_model_with_hooks_is_asked_itself(part):
    model = model_of()
    calls: list[nn.Module] = []
    model.get_submodule(part).register_forward_hook(lambda module, *_: calls.append(module))
    assert not isinstance(log_px_z_of(model, data_of(model)), Folded)
    importance_sampling(model, data_of(model), 10)
    assert calls


# --- evidence ------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("own", [False, True], ids=["one generator", "one for each example"])
def test_any_number_of_threads_gives_the_same_evidence(own, precision, threads):
    model = model_of(torch.float32)
    x = data_of(model, 50)

    def estimate(number: int):
        threads(number)
        noise = example_generators(x, 3) if own else torch.Generator().manual_seed(3)
        found = importance_sampling(
            model, x, 300, generator=noise, chunk_size=5, precision=precision
        )
        assert torch.get_num_threads() == number
        return found

    alone = estimate(1)
    for number in (2, 3):
        torch.testing.assert_close(vars(estimate(number)), vars(alone), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("number", [1, 2])
def test_every_sample_is_decoded_once_and_no_more_than_a_chunk_at_a_time(
    number, threads, monkeypatch
):
    threads(number)
    model = model_of()
    x = data_of(model, 20)
    decoded: list[tuple[int, ...]] = []
    decode = Folded.__call__

    def counted(self: Folded, z: Tensor) -> Tensor:
        decoded.append(tuple(z.shape))
        return decode(self, z)

    monkeypatch.setattr(Folded, "__call__", counted)
    importance_sampling(model, x, 201, chunk_size=4)
    assert sorted(decoded) == [(1, 20, 3), *[(4, 20, 3)] * 50]


@pytest.mark.parametrize("estimator", [importance_sampling, prior_monte_carlo])
def test_evidence_is_that_of_the_model_s_own(estimator, monkeypatch):
    model = model_of()
    x = data_of(model, 20)

    def estimate():
        return estimator(model, x, 500, generator=torch.Generator().manual_seed(3))

    folded = estimate()
    monkeypatch.setattr("vae.folded.knows_decoder", lambda model: False)
    torch.testing.assert_close(vars(folded), vars(estimate()), rtol=1e-9, atol=1e-9)
