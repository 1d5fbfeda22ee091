"""Objectives: values by their definitions, gradient estimators against what they estimate."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from vae.models import VAE, VAEConfig, kl_per_dimension, raw_log_scale
from vae.objectives import ESTIMATORS, Objective, TrainingModule

B, K, L = 5, 3, 2
SHAPE = (4,)
MODELS = {
    "diagonal": {},
    "flow-mixture": {"posterior": "flow", "prior": "mixture"},
    "full-vamp": {"posterior": "full", "prior": "vamp"},
    "hierarchical": {"latent_dim": (2, 1)},
    "hierarchical-flow-vamp": {"latent_dim": (2, 2), "posterior": "flow", "prior": "vamp"},
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(**changes: Any) -> VAE:
    content: dict[str, Any] = {
        "data_shape": SHAPE,
        "space": "binary",
        "latent_dim": L,
        "likelihood": "bernoulli",
        "hidden": (6,),
        "prior_components": 3,
    }
    model = VAE(VAEConfig(**(content | changes))).double()
    with torch.no_grad():  # flows start as the identity, so shake them
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def binary(batch=B):
    return torch.randint(0, 2, (batch, *SHAPE))


def noise(model: VAE, num_samples=K, batch=B):
    return torch.randn(num_samples, batch, model.noise_dim, dtype=torch.float64)


def module(model: VAE, name: str, num_samples=K, **options: Any) -> TrainingModule:
    return TrainingModule(model, Objective(name=name, num_samples=num_samples, **options))


def gradients(
    training: TrainingModule, x: Tensor, eps: Tensor, v: Tensor | None = None
) -> dict[str, Tensor]:
    training.zero_grad()
    training(x, eps, v=v).surrogate.sum().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in training.model.named_parameters()
        if parameter.grad is not None
    }


def encoder_gradients(
    training: TrainingModule, x: Tensor, eps: Tensor, v: Tensor | None = None
) -> Tensor:
    """The gradient for the encoder's outputs of each example, (B, num_outputs)."""
    outputs = []
    handle = training.model.encoder.register_forward_hook(lambda *args: outputs.append(args[-1]))
    surrogate = training(x, eps, v=v).surrogate
    handle.remove()
    return torch.autograd.grad(surrogate.sum(), outputs[0])[0]


def is_generative(name: str) -> bool:
    """θ: decoder, prior and likelihood; the rest is φ (under vamp the prior shares φ)."""
    return name.startswith(("decoder", "downward", "prior_family", "likelihood_family"))


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_bound_is_the_objective_by_its_definition(kind, name):
    model = make(**MODELS[kind])
    x, eps = binary(), noise(model)
    q, p = model.posterior(x), model.prior()
    z = q.from_noise(eps)
    log_px_z = model.likelihood(z).log_prob(x)
    log_ratio = q.log_prob(z) - p.log_prob(z)
    log_w = log_px_z - log_ratio
    kl = log_ratio.mean(0)
    if name == "elbo" and kind == "diagonal":
        kl = torch.distributions.kl_divergence(q, p)
    weighted = name in ("iwae", "dreg")
    expected = log_w.exp().mean(0).log() if weighted else log_px_z.mean(0) - kl
    terms = module(model, name)(x, eps)
    torch.testing.assert_close(terms.bound, expected)
    torch.testing.assert_close(terms.log_px_z, log_px_z.mean(0))
    torch.testing.assert_close(terms.kl, kl)
    assert terms.surrogate.requires_grad
    assert not any(value.requires_grad for value in terms[1:])


@pytest.mark.parametrize("name", ["elbo", "stl", "score_function"])
def test_beta_weighs_the_kl(name):
    model = make()
    x, eps = binary(), noise(model)
    terms = module(model, name, beta=3.0)(x, eps)
    torch.testing.assert_close(terms.bound, terms.log_px_z - 3 * terms.kl)
    cooler = module(model, name, beta=3.0)(x, eps, beta=0.5)
    torch.testing.assert_close(cooler.bound, terms.log_px_z - 0.5 * terms.kl)
    weighted = gradients(module(model, name, beta=0.5), x, eps)
    cooled = module(model, name, beta=3.0)
    cooled.zero_grad()
    cooled(x, eps, beta=0.5).surrogate.sum().backward()
    for parameter, (key, value) in zip(model.parameters(), weighted.items(), strict=True):
        torch.testing.assert_close(parameter.grad, value, msg=key)


def test_beta_warms_up_linearly():
    objective = Objective(beta=2.0, beta_warmup_epochs=4)
    assert [objective.beta_at(epoch) for epoch in (1, 2, 3, 4, 5, 100)] == [0.5, 1, 1.5, 2, 2, 2]
    assert Objective(beta=2.0).beta_at(1) == 2.0


def test_free_bits_floor_each_dimension_of_each_example():
    """KL (B, L) is set through the encoder: those below 0.5 nats count 0.5 and learn nothing."""
    model = make()
    encoder: Any = model.encoder
    torch.nn.init.zeros_(encoder.output.weight)
    with torch.no_grad():
        encoder.output.bias.copy_(torch.tensor([0.3, 2.0, 0.0, 0.0]))  # KL 0.045 and 2
    x, eps = binary(), noise(model)
    training = module(model, "elbo", free_bits=0.5)
    terms = training(x, eps)
    torch.testing.assert_close(terms.kl, torch.full((B,), 2.045).double())
    torch.testing.assert_close(terms.bound, terms.log_px_z - 2.5)
    # without the likelihood's share, the first dimension has no gradient left
    floored, free = (
        encoder_gradients(module(model, "elbo", free_bits=bits), x, eps) for bits in (0.5, 0.0)
    )
    expected = torch.tensor([0.3, 0.0, 0.0, 0.0]).double().expand(B, -1)  # dKL/d(loc, log scale)
    torch.testing.assert_close(floored - free, expected)


def test_free_bits_floor_the_sum_where_the_kl_has_no_parts():
    model = make(posterior="flow")
    x, eps = binary(), noise(model)
    assert kl_per_dimension(model.posterior(x), model.prior()) is None
    for bits in (1e-6, 0.4, 50.0):
        terms = module(model, "elbo", free_bits=bits)(x, eps)
        torch.testing.assert_close(terms.bound, terms.log_px_z - terms.kl.clamp(min=L * bits))


def test_dequantisation_noise_reaches_the_likelihood():
    model = make(space="grey8", likelihood="gaussian")
    x, u = torch.randint(0, 256, (B, *SHAPE)), torch.rand(B, *SHAPE).double()
    eps = noise(model)
    for name in ESTIMATORS:
        terms = module(model, name)(x, eps, u)
        p_x: Any = model.likelihood(model.posterior(x).from_noise(eps))
        torch.testing.assert_close(terms.log_px_z, p_x.dequantized_log_prob(x, u).mean(0))


# --- the linear-Gaussian model, whose posterior is exact -----------------------------------------


def linear_gaussian(latent_dim=2, num_values=4) -> tuple[VAE, Tensor]:
    """x | z ~ N(W z, I), z ~ N(0, I) with q(z|x) the exact posterior; and W Wᵀ + I."""
    model = make(
        space="continuous",
        likelihood="gaussian_unit",
        data_shape=(num_values,),
        latent_dim=latent_dim,
        hidden=(),
        posterior="full",
    )
    W = torch.randn(num_values, latent_dim).double()
    covariance = torch.linalg.inv(torch.eye(latent_dim).double() + W.T @ W)
    scale_tril = torch.linalg.cholesky(covariance)
    rows, columns = torch.tril_indices(latent_dim, latent_dim, -1)
    encoder, decoder = model.encoder.output, model.decoder.output
    with torch.no_grad():
        decoder.weight.copy_(W)
        decoder.bias.zero_()
        encoder.weight.zero_()
        encoder.weight[:latent_dim] = covariance @ W.T
        below = scale_tril[rows, columns]
        raw = raw_log_scale(scale_tril.diagonal().log())
        encoder.bias.copy_(torch.cat([torch.zeros(latent_dim).double(), raw, below]))
    return model, W @ W.T + torch.eye(num_values).double()


def test_every_bound_is_tight_at_the_exact_posterior():
    model, covariance = linear_gaussian()
    x = torch.randn(B, 4).double() * 2
    exact = torch.distributions.MultivariateNormal(torch.zeros(4).double(), covariance).log_prob(x)
    for name in ("iwae", "dreg", "stl", "score_function"):
        torch.testing.assert_close(module(model, name)(x, noise(model)).bound, exact)
    mean_elbo = module(model, "elbo", 20_000)(x, noise(model, 20_000)).bound
    torch.testing.assert_close(mean_elbo, exact, atol=0.05, rtol=0.0)


def test_stl_has_zero_variance_at_the_exact_posterior():
    model, _ = linear_gaussian()
    x = torch.randn(B, 4).double() * 2
    eps = noise(model)
    for name in ("stl", "dreg", "score_function"):  # the last because f is then its own baseline
        assert encoder_gradients(module(model, name), x, eps).abs().max() < 1e-10
    for name in ("elbo", "iwae"):
        assert encoder_gradients(module(model, name), x, eps).abs().max() > 1e-3


def test_iwae_rises_with_k_towards_log_px():
    model, covariance = linear_gaussian()
    encoder: Any = model.encoder
    with torch.no_grad():
        encoder.output.bias[:2] += 0.5
        encoder.output.bias[2:4] += 0.3
    x = torch.randn(1, 4).double()
    exact = torch.distributions.MultivariateNormal(torch.zeros(4).double(), covariance).log_prob(x)
    copies = x.expand(20_000, -1)
    previous = -math.inf
    for num_samples in (1, 2, 5, 20, 100):
        eps = noise(model, num_samples, 20_000)
        bound = module(model, "iwae", num_samples)(copies, eps).bound
        mean, se = bound.mean().item(), bound.std().item() / math.sqrt(20_000)
        assert mean - previous > 3 * se, f"K = {num_samples}"
        assert mean < exact.item() + 3 * se
        previous = mean
    assert previous == pytest.approx(exact.item(), abs=0.02)


# --- gradient estimators -------------------------------------------------------------------------


def test_iwae_weights_are_taken_over_the_samples():
    """dL/d log p(x|z_kb) = w_kb / Σ_k w_kb: K and B differ, so a wrong axis shows."""
    model = make()
    x, eps = binary(), noise(model)
    q, p = model.posterior(x), model.prior()
    z = q.from_noise(eps).detach()
    log_w = model.likelihood(z).log_prob(x) - q.log_prob(z) + p.log_prob(z)
    weights = (log_w.exp() / log_w.exp().sum(0)).detach()
    assert weights.shape == (K, B)
    model.zero_grad()
    (weights * model.likelihood(z).log_prob(x)).sum().backward()
    expected = {n: g.grad.clone() for n, g in model.named_parameters() if g.grad is not None}
    for name in ("iwae", "dreg"):
        found = gradients(module(model, name), x, eps)
        for key in expected:
            if key.startswith("decoder"):
                torch.testing.assert_close(found[key], expected[key])


@pytest.mark.parametrize("kind", list(MODELS))
def test_dreg_and_iwae_agree_on_theta_sample_by_sample(kind):
    model = make(**MODELS[kind])
    x, eps = binary(), noise(model)
    dreg, iwae = (gradients(module(model, name), x, eps) for name in ("dreg", "iwae"))
    assert any(map(is_generative, iwae))
    for name in filter(is_generative, iwae):
        torch.testing.assert_close(dreg[name], iwae[name], rtol=1e-10, atol=1e-12)
    assert any(
        not torch.allclose(dreg[name], iwae[name]) for name in iwae if not is_generative(name)
    )


@pytest.mark.parametrize("kind", ["diagonal", "flow-mixture", "hierarchical"])
@pytest.mark.parametrize(
    ("first", "second"), [("dreg", "iwae"), ("stl", "elbo"), ("score_function", "elbo")]
)
def test_encoder_gradients_agree_in_expectation(kind, first, second):
    model = make(**MODELS[kind])
    copies = 40_000
    x = binary(1).expand(copies, -1)
    one, two = (
        encoder_gradients(module(model, name), x, noise(model, batch=copies))
        for name in (first, second)
    )
    se = ((one.var(0) + two.var(0)) / copies).sqrt()
    assert (two.mean(0).abs() > 5 * se).any(), "a reference of pure noise proves nothing"
    assert ((one.mean(0) - two.mean(0)).abs() < 4.5 * se).all()
    if first == "score_function":
        assert one.var(0).sum() > 3 * two.var(0).sum()


def test_dreg_has_less_variance_than_iwae_and_the_gradient_of_a_large_sample():
    model, _ = linear_gaussian()
    encoder: Any = model.encoder
    with torch.no_grad():
        encoder.output.bias[:2] += 0.3
        encoder.output.bias[2:4] += 0.2
    x = torch.randn(1, 4).double()
    reference, iwae, dreg = (
        encoder_gradients(module(model, name, 7), x.expand(copies, -1), noise(model, 7, copies))
        for name, copies in (("iwae", 200_000), ("iwae", 20_000), ("dreg", 20_000))
    )
    assert dreg.var(0).sum() < 0.1 * iwae.var(0).sum()
    se = (dreg.var(0) / len(dreg) + reference.var(0) / len(reference)).sqrt()
    assert (reference.mean(0).abs() > 5 * se).all()
    assert ((dreg.mean(0) - reference.mean(0)).abs() < 4.5 * se).all()


@pytest.mark.parametrize(("first", "second"), [("dreg", "iwae"), ("stl", "elbo")])
def test_under_vamp_only_log_q_is_stopped(first, second):
    """The prior's pseudo-inputs pass through the encoder, and that path stays in φ's gradient."""
    model = make(prior="vamp")
    x = binary(1).expand(500, -1)
    weight = "encoder.output.weight"
    draws = {
        name: torch.stack(
            [gradients(module(model, name), x, noise(model, batch=500))[weight] for _ in range(60)]
        )
        for name in (first, second)
    }
    one, two = draws[first], draws[second]
    se = ((one.var(0) + two.var(0)) / len(one)).sqrt()
    assert ((one.mean(0) - two.mean(0)).abs() < 4.5 * se).all()

    # what a detached prior would miss is far larger than the error
    class WithoutPriorPath(torch.nn.Module):
        def forward(self, encode):
            mixture = model_prior(encode)
            return type(mixture)(mixture.components.detach(), mixture.log_weights)

    model_prior = model.prior_family
    model.add_module("prior_family", WithoutPriorPath())
    missing = gradients(module(model, first), x, noise(model, batch=500))[weight]
    assert ((missing - two.mean(0)).abs() > 10 * se * math.sqrt(len(one))).any()


def test_score_function_baseline_leaves_its_own_sample_out():
    """Given the other samples, a constant added to f_k changes only k's own share of the score."""
    model = make()
    x, eps = binary(), noise(model)
    q, p = model.posterior(x), model.prior()
    z = q.from_noise(eps).detach()
    log_q = q.log_prob(z)
    value = (model.likelihood(z).log_prob(x) - log_q + p.log_prob(z)).detach()
    baseline = torch.stack([value[[1, 2]].mean(0), value[[0, 2]].mean(0), value[[0, 1]].mean(0)])
    loss = ((value - baseline) * log_q).mean(0).sum()
    (expected,) = torch.autograd.grad(loss, model.encoder.output.bias)
    found = gradients(module(model, "score_function"), x, eps)["encoder.output.bias"]
    torch.testing.assert_close(found, expected)


# --- what data-parallel training needs -----------------------------------------------------------


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize(
    ("name", "free_bits"), [*((name, 0.0) for name in ESTIMATORS), ("elbo", 0.1)]
)
def test_shards_sum_to_the_whole_batch_even_an_empty_one(kind, name, free_bits):
    model = make(**MODELS[kind])
    training = module(model, name, free_bits=free_bits)
    x, eps = binary(7), noise(model, batch=7)
    whole = gradients(training, x, eps)
    assert set(whole) == {key for key, _ in model.named_parameters()}, "DDP awaits every gradient"
    assert all(value.any() for value in whole.values())
    for cut in (3, 7):
        first = gradients(training, x[:cut], eps[:, :cut])
        second = gradients(training, x[cut:], eps[:, cut:])
        for key in whole:
            torch.testing.assert_close(first[key] + second[key], whole[key], msg=key)
    assert not any(value.any() for value in second.values())


def _rank_gradients(rank: int, folder: str) -> None:
    """Two ranks with 5 and 2 examples, then 7 and none; rank 0 writes what DDP averaged."""
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    for kind, name, cut in DDP_CASES:
        torch.manual_seed(0)
        model = make(**MODELS[kind])
        x, eps = binary(7), noise(model, batch=7)
        parallel = torch.nn.parallel.DistributedDataParallel(module(model, name))
        mine = slice(0, cut) if rank == 0 else slice(cut, 7)
        (2 * parallel(x[mine], eps[:, mine]).surrogate.sum()).backward()
        if rank == 0:
            found = {key: parameter.grad for key, parameter in model.named_parameters()}
            torch.save(found, f"{folder}/{kind}-{name}-{cut}.pt")
    torch.distributed.destroy_process_group()


DDP_CASES = [
    (kind, name, cut)
    for kind in ("diagonal", "full-vamp", "hierarchical-flow-vamp")
    for name in ESTIMATORS
    for cut in (5, 7)
]


@pytest.mark.slow
def test_two_ranks_have_the_gradient_of_one(tmp_path):
    spawn(_rank_gradients, args=(str(tmp_path),), nprocs=2)
    for kind, name, cut in DDP_CASES:
        torch.manual_seed(0)
        model = make(**MODELS[kind])
        expected = gradients(module(model, name), binary(7), noise(model, batch=7))
        found = torch.load(tmp_path / f"{kind}-{name}-{cut}.pt", weights_only=True)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, msg=f"{kind} {name} {cut} {key}")


def test_noise_of_another_shape_is_refused():
    model = make()
    with pytest.raises(ValueError, match=r"\(K, B, L\) = \(3, 5, 2\), got \(5, 3, 2\)"):
        module(model, "iwae")(binary(), noise(model, B, K))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "vae"}, ["objective.name", "vae", "elbo"]),
        ({"name": "iwea"}, ["objective.name", "did you mean iwae?"]),
        ({"reduction": "none"}, ["objective.reduction", "mean, sum"]),
        ({"num_samples": 0}, ["objective.num_samples", "0"]),
        ({"num_samples": 1.5}, ["objective.num_samples", "1.5"]),
        ({"name": "score_function"}, ["objective.num_samples", "at least 2"]),
        ({"beta": -1.0}, ["objective.beta", "-1.0"]),
        ({"beta": math.nan}, ["objective.beta", "nan"]),
        ({"free_bits": math.inf}, ["objective.free_bits", "inf"]),
        ({"beta_warmup_epochs": -1}, ["objective.beta_warmup_epochs", "-1"]),
        ({"name": "iwae", "beta": 2.0}, ["objective.beta", "iwae"]),
        ({"name": "dreg", "beta_warmup_epochs": 3}, ["objective.beta", "beta_warmup_epochs 0"]),
        (
            {"name": "iwae", "num_samples": 5, "backward_samples": 0},
            ["objective.backward_samples", "0"],
        ),
        (
            {"name": "iwae", "num_samples": 5, "backward_samples": 6},
            ["objective.backward_samples", "at most", "5", "6"],
        ),
        (
            {"num_samples": 5, "backward_samples": 2},
            ["objective.backward_samples", "elbo", "iwae or dreg"],
        ),
        ({"name": "stl", "free_bits": 0.5}, ["objective.free_bits", "stl"]),
    ],
)
def test_objective_refuses_by_key(options, words):
    with pytest.raises(ValueError, match="objective") as caught:
        Objective(**options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_objective_names_every_fault_at_once():
    with pytest.raises(ValueError, match="num_samples") as caught:
        Objective(num_samples=0, beta=-1.0)
    assert len(str(caught.value).splitlines()) == 2
