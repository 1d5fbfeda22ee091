"""log p(x|z) compiled is the model's own."""

import math
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from vae.evidence import example_generators, importance_sampling
from vae.fast.compiled_decoder import CompiledDecoder, compiled_decoder
from vae.fast.perceptron import ACTIVATIONS
from vae.models import VAE, BernoulliPixels, VAEConfig

CONFIG = {
    "data_shape": (1, 5, 7),
    "space": "binary",
    "latent_dim": 3,
    "likelihood": "bernoulli",
    "hidden": (8, 7),
}


def model_of(dtype: torch.dtype = torch.float32, **changes) -> VAE:
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


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vae.fast.compiled_decoder.WORTH_COMPILING", 0)


def both_ways(
    model: VAE, precision: str = "fp32", x: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log p(x|z) compiled, in float32, and the model's own in float64."""
    x = data_of(model) if x is None else x
    z = latents_of(model, 6, 4)
    compiled = compiled_decoder(model, x, precision, 6)
    assert compiled is not None
    found = compiled(z)
    with torch.inference_mode():
        p_x = deepcopy(model).double().likelihood(z.double())
    assert isinstance(p_x, BernoulliPixels)
    return found.double(), p_x.values_log_prob(x.double()).flatten(2).sum(-1)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("hidden", [(), (8,), (8, 7), (5, 6, 7)])
@pytest.mark.parametrize("data_shape", [(1, 5, 7), (16,), (3,), (1,), (1001,), (3, 20, 50)])
def test_it_is_the_model_s_own(compiled, activation, hidden, data_shape):
    model = model_of(activation=activation, hidden=hidden, data_shape=data_shape)
    torch.testing.assert_close(*both_ways(model), rtol=1e-5, atol=1e-5)


def test_of_the_latents_next_to_the_data(compiled):
    model = model_of(latent_dim=(3, 2))
    torch.testing.assert_close(*both_ways(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("logit", [0.0, 8.0, 21.0, 22.0, 30.0, 86.0, 87.0, 99.0, 2000.0, 1e30])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_certain_pixels(compiled, precision, sign, logit):
    """Right and wrong ones, in one example each: some of both, all right, all wrong."""
    model = model_of()
    with torch.no_grad():
        model.decoder.output.weight.mul_(0.01)
        model.decoder.output.bias.fill_(sign * logit)
    bits = torch.stack([*data_of(model, 2), torch.zeros(1, 5, 7), torch.ones(1, 5, 7)])
    found, expected = both_ways(model, precision, bits)
    digits = {"fp32": 1e-6, "bf16": 1e-3}[precision]
    torch.testing.assert_close(found, expected, rtol=digits, atol=digits)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("place", ["decoder.body.0.bias", "decoder.output.bias"])
def test_what_is_no_number_is_seen(compiled, place, activation, precision, value):
    """A broken model's log p(x|z) isn't made a number."""
    model = model_of(activation=activation)
    with torch.no_grad():
        model.get_parameter(place).flatten()[-1] = value
    found, expected = both_ways(model, precision)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1, equal_nan=True)
    assert found.isnan().any() or not math.isnan(value)


def test_bf16_errs_by_about_as_much_as_the_model_s_own_bf16(compiled):
    model = model_of(hidden=(200, 200), data_shape=(1, 28, 28), latent_dim=20)
    found, exact = both_ways(model, "bf16")
    with torch.inference_mode(), model.products_in("bf16"):
        expected = model.likelihood(latents_of(model, 6, 4)).log_prob(data_of(model))
    own = (expected - exact).square().mean().sqrt()
    assert 0.01 < own < 2
    assert (found - exact).square().mean().sqrt() < 1.2 * own


def test_a_thread_keeps_the_memory_of_its_products(compiled):
    model = model_of()
    decoder = compiled_decoder(model, data_of(model), "fp32", 6)
    assert decoder is not None
    places: list[list[int]] = []
    for samples in (6, 6, 2):
        decoder(latents_of(model, samples, 4))
        places.append([products.data_ptr() for products in decoder.own.products])
    assert places[0] == places[1] == places[2]
    decoder(latents_of(model, 7, 4))
    assert [len(products) for products in decoder.own.products] == [28, 28, 28]


def test_nothing_of_the_model_is_changed(compiled):
    model = model_of(hidden=())
    before = [parameter.clone() for parameter in model.parameters()]
    x = data_of(model).float()
    z = latents_of(model, 6, 4)
    kept, kept_z = x.clone(), z.clone()
    found = compiled_decoder(model, x, "fp32", 6)
    assert found is not None
    found(z)
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
        {"dtype": torch.float64},
    ],
    ids=["silu", "conv", "gaussian", "float64"],
)
def test_other_models_are_not_compiled(compiled, changes):
    model = model_of(**changes)
    assert compiled_decoder(model, data_of(model), "fp32", 6) is None


@pytest.mark.parametrize(
    "x",
    [
        torch.full((4, 1, 5, 7), 0.5),
        torch.full((4, 1, 5, 7), math.nan),
        torch.zeros(4, 35),
        torch.zeros(4, 1, 5, 1),
        torch.zeros(0, 1, 5, 7),
    ],
    ids=["between", "nan", "flat", "narrow", "none"],
)
def test_data_that_it_can_t_read_is_left_to_the_model(compiled, x):
    assert compiled_decoder(model_of(), x, "fp32", 6) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bool])
def test_memory_in_any_order(compiled, dtype):
    """As of a table's columns, and of a parameter that is a part of another."""
    model = model_of(data_shape=(35,))
    bias = torch.randn(35, 2)[:, 0]
    model.decoder.output.bias = nn.Parameter(bias)
    assert not bias.is_contiguous()
    x = data_of(model).t().contiguous().t()
    assert not x.is_contiguous()
    torch.testing.assert_close(*both_ways(model, x=x.to(dtype)), rtol=1e-5, atol=1e-5)
    importance_sampling(model, x.to(dtype), 100, chunk_size=4)


def test_it_is_compiled_where_the_call_alone_has_work_enough(monkeypatch):
    monkeypatch.setattr("vae.fast.compiled_decoder.WORTH_COMPILING", 1000)
    model = model_of()
    x = data_of(model)  # 4 times 35 pixels
    found = [compiled_decoder(model, x, "fp32", samples) for samples in (2, 7, 8, 7, 8)]
    assert [each is not None for each in found] == [False, False, True, False, True]


def test_the_same_call_gives_the_same_bits_whatever_came_before(monkeypatch):
    monkeypatch.setattr("vae.fast.compiled_decoder.WORTH_COMPILING", 20_000)
    model = model_of()
    x = data_of(model)

    def estimate(num_samples):
        generator = torch.Generator().manual_seed(3)
        return importance_sampling(model, x, num_samples, generator=generator)

    before = [estimate(100), estimate(300)]  # as it is, and compiled
    for _ in range(5):
        estimate(1000)
    for one, other in zip(before, [estimate(100), estimate(300)], strict=True):
        assert torch.equal(one.log_px, other.log_px)
        assert torch.equal(one.khat, other.khat)


@pytest.mark.parametrize("part", ["decoder", "encoder", "decoder.output", "posterior_family"])
def test_a_model_with_hooks_is_asked_itself(compiled, part):
    model = model_of()
    calls: list[nn.Module] = []
    model.get_submodule(part).register_forward_hook(lambda module, *_: calls.append(module))
    assert compiled_decoder(model, data_of(model), "fp32", 6) is None
    importance_sampling(model, data_of(model), 10)
    assert calls


# --- evidence ------------------------------------------------------------------------------------


@pytest.fixture
def threads(compiled):
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("own", [False, True], ids=["one generator", "one for each example"])
def test_any_number_of_threads_gives_the_same_evidence(own, precision, threads):
    model = model_of()
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
    decode = CompiledDecoder.__call__

    def counted(self: CompiledDecoder, z: Tensor) -> Tensor:
        decoded.append(tuple(z.shape))
        return decode(self, z)

    monkeypatch.setattr(CompiledDecoder, "__call__", counted)
    importance_sampling(model, x, 201, chunk_size=4)
    assert sorted(decoded) == [(1, 20, 3), *[(4, 20, 3)] * 50]


def test_few_samples_are_left_to_the_model(threads, monkeypatch):
    """What is compiled has one core for each thread."""
    threads(3)
    model = model_of()
    x = data_of(model, 20)
    counts: list[object] = []

    def counted(*arguments: object) -> None:
        counts.append(arguments[-1])

    monkeypatch.setattr("vae.acceleration.compiled_decoder", counted)
    for samples in (47, 48):
        importance_sampling(model, x, samples, chunk_size=4)
    assert counts == [48]


def test_evidence_is_that_of_the_model_s_own(monkeypatch):
    model = model_of()
    x = data_of(model, 20)

    def estimate():
        generator = torch.Generator().manual_seed(3)
        return importance_sampling(model, x, 500, generator=generator, chunk_size=10)

    own = estimate()
    monkeypatch.setattr("vae.fast.compiled_decoder.WORTH_COMPILING", 0)
    torch.testing.assert_close(vars(estimate()), vars(own), rtol=1e-4, atol=1e-4)
