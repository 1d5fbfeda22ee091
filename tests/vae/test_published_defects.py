"""Defects found in published estimators and training loops: each check here fails on the defect.

Where the defect is easily written down it is, and the check is shown to catch it.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vae.data import Dataset, NoiseShape
from vae.evidence import CHUNK_VALUES, FactorAnalysis, importance_sampling
from vae.models import LIKELIHOODS, VAE, VAEConfig, raw_log_scale
from vae.objectives import Objective, TrainingModule
from vae.training import TrainingConfig, TrainingState, fit, load_state, save_state

PAIRS = [(name, space) for name, kind in LIKELIHOODS.items() for space in sorted(kind.spaces)]
FROZEN = TrainingConfig(epochs=1, batch_size=64, learning_rate=1e-30)
SHAPE = (1, 3, 4)


def small_vae(likelihood="bernoulli", space="binary", latent_dim=2, seed=0) -> VAE:
    torch.manual_seed(seed)
    return VAE(
        VAEConfig(
            data_shape=SHAPE,
            space=space,
            latent_dim=latent_dim,
            likelihood=likelihood,
            hidden=(8,),
            num_components=2,
        )
    )


def examples(space: str, count: int, seed=0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    if space == "continuous":
        return 5 + 3 * torch.randn(count, *SHAPE, generator=g, dtype=torch.float64)
    top = 1 if space == "binary" else 255
    return torch.randint(0, top + 1, (count, *SHAPE), generator=g).to(torch.uint8)


# --- the number of samples -----------------------------------------------------------------------


def with_uneven_chunk(model: VAE, x: Tensor, K: int, chunk: int, *, drop: bool) -> Tensor:
    """The defect: a last chunk left out, or drawn in full, and the sum divided by K."""
    chunks = K // chunk if drop else math.ceil(K / chunk)
    with torch.no_grad():
        q, p = model.posterior(x), model.prior()
        z, log_q = q.from_noise_with_log_prob(
            torch.randn(chunks * chunk, len(x), model.noise_dim, dtype=x.dtype)
        )
        log_w = model.likelihood(z).log_prob(x) + p.log_prob(z) - log_q
    return log_w.logsumexp(0) - math.log(K)


def test_an_uneven_last_chunk_counts_once():
    """At the exact posterior every weight is p(x), so that a miscount can't hide in the noise."""
    g = torch.Generator().manual_seed(0)
    draw = {"generator": g, "dtype": torch.float64}
    fa = FactorAnalysis(torch.randn(6, **draw), torch.randn(6, 2, **draw), torch.ones(6).double())
    x, _ = fa.sample(4, generator=g)
    model, exact = fa.as_vae(), fa.log_prob(x)
    found = importance_sampling(model, x, 250, generator=g, chunk_size=100).log_px
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-8)
    dropped = with_uneven_chunk(model, x, 250, 100, drop=True) - exact
    torch.testing.assert_close(dropped, torch.full_like(exact, math.log(200 / 250)))
    overdrawn = with_uneven_chunk(model, x, 250, 100, drop=False) - exact
    torch.testing.assert_close(overdrawn, torch.full_like(exact, math.log(300 / 250)))


@pytest.mark.parametrize("batch", [1, 50])
def test_by_default_no_more_values_are_held_than_fit(batch):
    """5000 samples of 50 examples of 784 values would be 196 million."""
    torch.manual_seed(0)
    model = VAE(
        VAEConfig(
            data_shape=(1, 28, 28), space="binary", latent_dim=2, likelihood="bernoulli", hidden=()
        )
    )
    held = []
    model.decoder.register_forward_hook(lambda _m, _i, output: held.append(output.numel()))
    K = 5000 if batch == 1 else 300
    importance_sampling(model, torch.zeros(batch, 1, 28, 28), K)
    assert sum(held) == K * batch * 784
    assert max(held) <= CHUNK_VALUES["cpu"]


# --- signs and constants -------------------------------------------------------------------------


def test_a_log_likelihood_is_negative_and_a_step_raises_it():
    model, x = small_vae(), examples("binary", 200)
    evidence = importance_sampling(model, x, 50, generator=torch.Generator().manual_seed(0))
    assert (evidence.log_px < 0).all()  # the probability of 12 bits; a nll would be positive
    data = Dataset(train=x, valid=x)
    config = TrainingConfig(epochs=5, batch_size=50, learning_rate=1e-2)
    history = list(fit(model, data, config))
    after = importance_sampling(model, x, 50, generator=torch.Generator().manual_seed(0))
    assert after.log_px.mean() > evidence.log_px.mean() + 0.05
    assert history[-1].valid_elbo > history[0].valid_elbo


@pytest.mark.parametrize(("likelihood", "space"), PAIRS)
def test_training_validation_and_evidence_have_the_same_constants(likelihood, space):
    """With a posterior all but certain, all three see the same log p(x|z) up to rounding."""
    model = small_vae(likelihood, space).double()
    x = examples(space, 64)
    data = Dataset(train=x, valid=x)
    model.set_data_statistics(*data.statistics())
    with torch.no_grad():
        model.encoder.output.weight.zero_()
        model.encoder.output.bias.copy_(
            torch.cat([torch.tensor([0.3, -0.5]), raw_log_scale(torch.full((2,), -9.9))])
        )
    (stats,) = fit(model, data, FROZEN)
    evidence = importance_sampling(model, x, 20, generator=torch.Generator().manual_seed(0))
    reported = evidence.log_px_z.mean().item()
    assert stats.valid_log_px_z == pytest.approx(reported, abs=2e-3)
    if not model.dequantizes:
        assert stats.train_log_px_z == pytest.approx(reported, abs=2e-3)
    else:  # one u each: the bound by Jensen, and near it where bins are narrow beside the scale
        assert stats.train_log_px_z == pytest.approx(reported, abs=0.05)


# --- what is logged ------------------------------------------------------------------------------


def test_the_bound_is_reported_and_not_the_surrogate():
    """dreg and iwae have one bound and different surrogates."""
    model, x = small_vae(), examples("binary", 64)
    data = Dataset(train=x, valid=x)
    bounds = []
    for name in ("iwae", "dreg"):
        objective = Objective(name=name, num_samples=5)
        (stats,) = fit(model, data, FROZEN, objective=objective)
        bounds.append(stats.valid_bound)
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-6)
    module = TrainingModule(model, Objective(name="dreg", num_samples=5))
    terms = module(x, torch.randn(5, 64, 2))
    assert (terms.surrogate - terms.bound).mean().abs() > 0.01, "the check can fail"


def test_the_better_sample_gets_the_larger_weight():
    model, x = small_vae(), examples("binary", 7)
    eps = 2 * torch.randn(3, 7, 2)
    log_px_z = []
    inner = model.log_px_z

    def noticed(*args):
        values = inner(*args)
        values.retain_grad()
        log_px_z.append(values)
        return values

    model.log_px_z = noticed  # pyright: ignore[reportAttributeAccessIssue]
    q, p = model.posterior(x), model.prior()
    z = q.from_noise(eps)
    log_w = inner(x, z) + p.log_prob(z) - q.log_prob(z)
    for name in ("iwae", "dreg"):
        terms = TrainingModule(model, Objective(name=name, num_samples=3))(x, eps)
        terms.surrogate.sum().backward()
        weight = log_px_z.pop().grad
        assert torch.equal(weight.argsort(0), log_w.argsort(0))
        torch.testing.assert_close(weight.sum(0), torch.ones(7))


# --- averages and shards -------------------------------------------------------------------------


def test_validation_is_the_mean_over_examples_however_the_last_batch_falls():
    model = small_vae().double()
    with torch.no_grad():
        model.encoder.output.weight.mul_(5)
    x = torch.cat([torch.zeros(512, *SHAPE), torch.ones(8, *SHAPE)]).to(torch.uint8)
    (stats,) = fit(model, Dataset(train=x, valid=x), FROZEN)
    with torch.no_grad():
        kl = model(x).kl
    assert stats.valid_kl == pytest.approx(kl.mean().item(), rel=1e-9)
    mean_of_means = (kl[:512].mean() + kl[512:].mean()).item() / 2
    assert abs(mean_of_means - kl.mean().item()) > 0.1, "the check can fail"


def test_a_rank_sees_other_examples_in_another_epoch():
    data = Dataset(
        train=torch.arange(128, dtype=torch.float64).reshape(128, 1), valid=torch.zeros(1, 1)
    )
    noise = NoiseShape(1, 1, False, torch.float64)
    seen = [
        {
            value
            for batch in data.train_batches(
                noise, batch_size=64, seed=0, epoch=epoch, rank=1, world_size=2
            )
            for value in batch.x.flatten().tolist()
        }
        for epoch in (1, 2, 3)
    ]
    assert [len(values) for values in seen] == [64, 64, 64]
    assert seen[0] != seen[1]
    assert seen[1] != seen[2]


# --- checkpoints ---------------------------------------------------------------------------------


def test_a_state_keeps_current_weights_with_the_current_optimiser_and_the_best_apart(tmp_path):
    """The best epoch lies behind, so best and current weights differ when the state is saved."""
    config = TrainingConfig(epochs=5, batch_size=32, learning_rate=1e-2)
    data = Dataset(train=examples("binary", 96), valid=examples("binary", 32, seed=1))

    def start() -> tuple[VAE, TrainingState]:
        model, state = small_vae(), TrainingState()
        for stats in fit(model, data, replace(config, epochs=2), state):
            assert stats.epoch <= 2
        state.best_bound = math.inf
        return model, state

    undisturbed, state = start()
    list(fit(undisturbed, data, config, state))

    killed, killed_state = start()
    next(fit(killed, data, config, killed_state))
    save_state(killed, killed_state, tmp_path / "state")
    resumed = small_vae(seed=9)
    resumed_state = load_state(resumed, tmp_path / "state")
    assert resumed_state.epoch == 3
    assert resumed_state.best_epoch < 3
    for name, value in killed.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
    weight = "encoder.output.weight"
    assert not torch.equal(resumed_state.best_weights[weight], resumed.state_dict()[weight])
    list(fit(resumed, data, config, resumed_state))
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
