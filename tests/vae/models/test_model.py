"""The model: configuration, data units, terms of the ELBO, hierarchy, state."""

import json
import math
from typing import Any

import pytest
import torch
from torch.distributions import kl_divergence as torch_kl

from vae.models import POSTERIORS, PRIORS, VAE, VAEConfig

B, K = 5, 3
SHAPE = (2, 3, 2)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def config(**changes: Any) -> VAEConfig:
    content: dict[str, Any] = {
        "data_shape": SHAPE,
        "space": "binary",
        "latent_dim": 4,
        "likelihood": "bernoulli",
        "hidden": (8,),
        "prior_components": 6,
    }
    return VAEConfig(**(content | changes))


def binary(batch=B, shape=SHAPE):
    return torch.randint(0, 2, (batch, *shape))


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize("latent_dim", [7, (5, 3), (4, 3, 2)])
def test_config_survives_json(latent_dim):
    original = config(latent_dim=latent_dim, posterior="flow", min_scale=0.01)
    content = json.loads(json.dumps(original.to_dict()))
    assert VAEConfig.from_dict(content) == original
    assert hash(VAEConfig.from_dict(content)) == hash(original)


def test_config_takes_lists_and_one_stochastic_layer_is_a_number():
    assert config(data_shape=[1, 2, 2], hidden=[3], latent_dim=[5]) == config(
        data_shape=(1, 2, 2), hidden=(3,), latent_dim=5
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent_dim": 0}, ["model.latent_dim", "0"]),
        ({"latent_dim": (4, 0)}, ["model.latent_dim", "(4, 0)"]),
        ({"latent_dim": True}, ["model.latent_dim", "True"]),
        ({"latent_dim": 2.5}, ["model.latent_dim", "2.5"]),
        ({"latent_dim": ()}, ["model.latent_dim", "()"]),
        ({"data_shape": ()}, ["data_shape", "()"]),
        ({"data_shape": (1, -3)}, ["data_shape", "(1, -3)"]),
        ({"hidden": (200, 0)}, ["model.hidden", "(200, 0)"]),
        ({"hidden": 200}, ["model.hidden", "200"]),
        ({"network": "mpl"}, ["model.network", "mpl", "mlp, conv"]),
        ({"network": "conv", "data_shape": (9,)}, ["model.network", "conv", "(9,)", "mlp"]),
        ({"network": "conv", "hidden": ()}, ["model.hidden", "conv"]),
        ({"activation": "tahn"}, ["model.activation", "tahn", "did you mean tanh?"]),
        ({"posterior": "diag"}, ["model.posterior", "diag", "diagonal, full, flow"]),
        ({"prior": "vampp"}, ["model.prior", "did you mean vamp?"]),
        ({"space": "gray8"}, ["data.space", "did you mean grey8?"]),
        ({"likelihood": None}, ["model.likelihood", "None"]),
        ({"space": "grey8"}, ["model.likelihood", "bernoulli", "grey8"]),
        ({"min_scale": 0.0}, ["model.min_scale", "0.0"]),
        ({"min_scale": math.nan}, ["model.min_scale", "nan"]),
        ({"num_components": 0}, ["model.num_components", "0"]),
        ({"prior_components": 1.5}, ["model.prior_components", "1.5"]),
    ],
)
def test_config_refuses_by_key(changes, words):
    with pytest.raises(ValueError, match=r"\w") as caught:
        config(**changes)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_config_names_every_fault_at_once():
    with pytest.raises(ValueError, match="latent_dim") as caught:
        config(latent_dim=0, prior="none", min_scale=-1)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "model.latent_dim",
        "model.prior",
        "model.min_scale",
    ]


def test_from_dict_names_unknown_and_missing_keys():
    with pytest.raises(ValueError, match="latent_dims"):
        VAEConfig.from_dict(config().to_dict() | {"latent_dims": 3})
    content = config().to_dict()
    del content["latent_dim"]
    with pytest.raises(ValueError, match=r"missing keys \['latent_dim'\]"):
        VAEConfig.from_dict(content)


# --- distributions and terms ---------------------------------------------------------------------


@pytest.mark.parametrize("posterior", list(POSTERIORS))
@pytest.mark.parametrize("prior", list(PRIORS))
@pytest.mark.parametrize("latent_dim", [1, 4, (4, 3), (4, 3, 2)])
def test_terms_are_what_the_distributions_say(posterior, prior, latent_dim):
    model = VAE(config(posterior=posterior, prior=prior, latent_dim=latent_dim)).double()
    x, eps = binary(), torch.randn(K, B, model.noise_dim, dtype=torch.float64)
    q, p = model.posterior(x), model.prior()
    assert (q.batch_shape, q.event_shape) == ((B,), (model.noise_dim,))
    assert (p.batch_shape, p.event_shape) == ((), (model.noise_dim,))
    z = q.from_noise(eps)
    p_x = model.likelihood(z)
    assert (p_x.batch_shape, p_x.event_shape) == ((K, B), SHAPE)
    log_px_z, kl = model(x, eps)
    torch.testing.assert_close(log_px_z, p_x.log_prob(x).mean(0))
    if posterior in ("diagonal", "full") and prior == "normal" and isinstance(latent_dim, int):
        torch.testing.assert_close(kl, torch_kl(q, p))
    else:
        torch.testing.assert_close(kl, (q.log_prob(z) - p.log_prob(z)).mean(0))
    terms = model(x, eps[0])
    torch.testing.assert_close(terms.log_px_z, p_x.log_prob(x)[0])
    torch.testing.assert_close(terms.elbo, terms.log_px_z - terms.kl)


def test_elbo_without_given_noise_follows_the_global_seed():
    model, x = VAE(config()), binary()
    torch.manual_seed(3)
    eps = torch.randn(B, 4)
    torch.manual_seed(3)
    assert torch.equal(model(x).elbo, model(x, eps).elbo)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64])
def test_data_come_in_any_numeric_dtype(dtype):
    model, x, eps = VAE(config()), binary(), torch.randn(B, 4)
    expected = model(x.float(), eps)
    found = model(x.to(dtype), eps)
    assert torch.equal(found.log_px_z, expected.log_px_z)
    assert torch.equal(found.kl, expected.kl)
    assert found.elbo.dtype == torch.float32


def test_grey_levels_are_not_rescaled_by_the_caller():
    model = VAE(config(space="grey8", likelihood="discretized_logistic"))
    x, eps = torch.randint(0, 256, (B, *SHAPE), dtype=torch.uint8), torch.randn(B, 4)
    assert torch.equal(model(x, eps).elbo, model(x.double(), eps).elbo)


def test_noise_for_dequantisation_gives_the_training_density():
    model = VAE(config(space="grey8", likelihood="gaussian")).double()
    assert model.dequantizes
    x, u = torch.randint(0, 256, (B, *SHAPE)), torch.rand(B, *SHAPE, dtype=torch.float64)
    eps = torch.randn(B, 4, dtype=torch.float64)
    p_x: Any = model.likelihood(model.posterior(x).from_noise(eps))
    torch.testing.assert_close(model(x, eps).log_px_z, p_x.log_prob(x))
    torch.testing.assert_close(model(x, eps, u).log_px_z, p_x.dequantized_log_prob(x, u))
    exact = VAE(config())
    x, eps = binary(), torch.randn(B, 4)
    assert not exact.dequantizes
    assert torch.equal(exact(x, eps, torch.rand(B, *SHAPE)).elbo, exact(x, eps).elbo)


def test_an_empty_batch_has_empty_terms():
    for latent_dim in (4, (3, 2)):
        model = VAE(config(latent_dim=latent_dim, posterior="full"))
        assert model(binary(0)).elbo.shape == (0,)


def test_wrong_shapes_are_named():
    model = VAE(config())
    with pytest.raises(ValueError, match=r"expected shape \(B, 2, 3, 2\), got \(5, 12\)"):
        model.posterior(torch.zeros(5, 12))
    with pytest.raises(ValueError, match="expected 4 latent values, got 3"):
        model.likelihood(torch.zeros(5, 3))


# --- data statistics -----------------------------------------------------------------------------


def test_continuous_data_are_standardised_and_the_jacobian_counted():
    """log p(x) in raw units = log p((x - mean) / std) - Σ log std, with the same weights."""
    table = config(data_shape=(6,), space="continuous", likelihood="student_t")
    raw, standardised = VAE(table).double(), VAE(table).double()
    mean, std = 100 * torch.randn(6).double(), torch.rand(6).double() * 50 + 0.01
    raw.set_data_statistics(mean, std)
    weights = standardised.state_dict()
    raw.load_state_dict({k: raw.state_dict()[k] if "data_" in k else weights[k] for k in weights})
    x, eps = torch.randn(B, 6).double(), torch.randn(B, 4).double()
    there, here = raw(mean + std * x, eps), standardised(x, eps)
    torch.testing.assert_close(there.log_px_z, here.log_px_z - std.log().sum())
    torch.testing.assert_close(there.kl, here.kl)


@pytest.mark.parametrize("network", ["mlp", "conv"])
@pytest.mark.parametrize(
    ("space", "likelihood", "top"),
    [
        ("binary", "bernoulli", 1),
        ("grey8", "gaussian_shared", 255),
        ("grey8", "continuous_bernoulli", 255),
        ("continuous", "gaussian", 40),
    ],
)
def test_a_silent_decoder_starts_at_the_data_mean(network, space, likelihood, top):
    model = VAE(config(space=space, likelihood=likelihood, network=network)).double()
    mean = top * (0.1 + 0.8 * torch.rand(SHAPE).double())
    model.set_data_statistics(mean, 0.05 * top * (0.5 + torch.rand(SHAPE).double()))
    torch.nn.init.zeros_(model.decoder.output.weight)
    found = model.likelihood(torch.randn(7, 4).double()).mean
    torch.testing.assert_close(found, mean.expand(7, *SHAPE), rtol=0.0, atol=0.01 * top)


def test_the_encoder_sees_centred_data():
    model = VAE(config(hidden=(), space="grey8", likelihood="categorical"))
    mean, std = 255 * torch.rand(SHAPE), 60 * torch.rand(SHAPE)
    model.set_data_statistics(mean, std)
    assert torch.equal(model.encoder.output.bias[:4], torch.zeros(4))
    at_mean: Any = model.posterior(mean[None])
    torch.testing.assert_close(at_mean.mean, torch.zeros(1, 4))
    off: Any = model.posterior((mean + std.square().mean().sqrt())[None])
    torch.testing.assert_close(off.mean[0], model.encoder.output.weight[:4].sum(1))


def test_a_constant_column_does_not_divide_by_zero():
    model = VAE(config(data_shape=(3,), space="continuous", likelihood="gaussian"))
    model.set_data_statistics(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 2.0]))
    x = torch.tensor([[1.0, 2.0, 5.0]])
    assert model(x).elbo.isfinite().all()


# --- hierarchy -----------------------------------------------------------------------------------


def test_two_stochastic_layers_have_the_sizes_of_the_paper():
    """Burda, Grosse and Salakhutdinov (2016), section 5: 200-200-z1(100)-100-100-z2(50)."""
    model = VAE(config(data_shape=(1, 28, 28), latent_dim=(100, 50), hidden=(200, 200)))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "weight" in name}
    assert list(shapes.values()) == [
        *[(200, 784), (200, 200), (200, 200)],  # encoder, loc and log scale of z1
        *[(200, 100), (200, 200), (784, 200)],  # decoder
        *[(100, 100), (100, 100), (100, 100)],  # q(z2|z1): loc and log scale of 50 values
        *[(100, 50), (100, 100), (200, 100)],  # p(z1|z2): loc and log scale of 100 values
    ]
    assert model.noise_dim == 150


@pytest.mark.parametrize("prior", list(PRIORS))
def test_the_likelihood_reads_the_first_layer_and_the_prior_joins_both(prior):
    model = VAE(config(latent_dim=(4, 3), prior=prior)).double()
    z = torch.randn(B, 7).double()
    moved = torch.cat([z[:, :4], z[:, 4:] + 1], 1)
    x = binary()
    assert torch.equal(model.likelihood(z).log_prob(x), model.likelihood(moved).log_prob(x))
    jacobian = torch.autograd.functional.jacobian(lambda v: model.prior().log_prob(v).sum(), z)
    assert (jacobian.abs() > 1e-6).all()
    # p(z1, z2) is normalised over z1 for each z2: the ratio of joint densities is conditional
    conditional = model.downward[0](z[:, 4:])
    difference = model.prior().log_prob(z) - conditional.log_prob(z[:, :4])
    other = torch.cat([torch.randn(B, 4).double(), z[:, 4:]], 1)
    again = model.prior().log_prob(other) - conditional.log_prob(other[:, :4])
    torch.testing.assert_close(difference, again)


# --- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("posterior", list(POSTERIORS))
@pytest.mark.parametrize("prior", list(PRIORS))
@pytest.mark.parametrize("latent_dim", [4, (3, 2)])
def test_state_dict_round_trip(posterior, prior, latent_dim):
    setup = config(posterior=posterior, prior=prior, latent_dim=latent_dim)
    model, copy = VAE(setup), VAE(setup)
    model.set_data_statistics(torch.rand(SHAPE), torch.rand(SHAPE))
    assert {"data_loc", "data_scale"} <= set(model.state_dict())
    x, eps = binary(), torch.randn(B, model.noise_dim)
    assert not torch.equal(model(x, eps).elbo, copy(x, eps).elbo)
    copy.load_state_dict(model.state_dict())
    assert torch.equal(model(x, eps).elbo, copy(x, eps).elbo)


@pytest.mark.parametrize("network", ["mlp", "conv"])
@pytest.mark.parametrize("latent_dim", [2, (3, 2)])
def test_gradients_equal_finite_differences(network, latent_dim):
    setup = config(network=network, latent_dim=latent_dim, posterior="flow", prior="vamp")
    model = VAE(setup).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    x, eps = binary(), torch.randn(B, model.noise_dim).double()
    model(x, eps).elbo.sum().backward()
    step = 1e-5
    for parameter in model.parameters():
        gradient = parameter.grad
        assert gradient is not None
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            parameter += step * direction
            above = model(x, eps).elbo.sum()
            parameter -= 2 * step * direction
            below = model(x, eps).elbo.sum()
            parameter += step * direction
        expected = (above - below) / (2 * step)
        found = (gradient * direction).sum()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
