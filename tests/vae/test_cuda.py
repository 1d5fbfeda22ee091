"""A CUDA device gives what the CPU gives; skipped where there is none."""

import math
from dataclasses import replace

import pytest
import torch

from vae.data import Dataset, NoiseShape
from vae.diagnostics import active_units
from vae.evidence import (
    FactorAnalysis,
    annealed_importance_sampling,
    importance_sampling,
    prior_monte_carlo,
)
from vae.fast import cuda_graphs
from vae.fast.cuda_graphs import GraphedSteps
from vae.models import VAE, VAEConfig
from vae.objectives import ESTIMATORS, Objective
from vae.training import (
    DivergenceError,
    Trainer,
    TrainingConfig,
    TrainingState,
    fit,
    load_state,
    save_state,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def models(dtype=torch.float64, **changes):
    """The same model on the CPU and on CUDA."""
    torch.manual_seed(0)
    setup = {
        "data_shape": (1, 4, 5),
        "space": "binary",
        "latent_dim": 3,
        "likelihood": "bernoulli",
        "hidden": (8,),
    }
    cpu = VAE(VAEConfig(**setup | changes)).to(dtype)
    cuda = VAE(cpu.config).to(dtype)
    cuda.load_state_dict(cpu.state_dict())
    return cpu, cuda.cuda()


def bits(count):
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 2, (count, 1, 4, 5), generator=g)


SETTINGS = [
    {},
    {"posterior": "full", "prior": "mixture"},
    {"posterior": "flow", "prior": "vamp"},
    {"latent_dim": (3, 2)},
    {"network": "conv", "space": "grey8", "likelihood": "logistic_mixture"},
    {"space": "grey8", "likelihood": "beta_binomial"},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
@pytest.mark.parametrize("proposal", ["encoder", "laplace", "refined"])
def test_importance_sampling_agrees_for_the_same_noise(changes, proposal):
    """A generator draws on its own device, so a CPU generator gives both the same noise."""
    results = [
        importance_sampling(
            model, bits(6), 200, generator=torch.Generator().manual_seed(2), proposal=proposal
        )
        for model in models(**changes)
    ]
    torch.testing.assert_close(results[1].log_px.cpu(), results[0].log_px, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[1].khat.cpu(), results[0].khat, rtol=1e-3, atol=1e-3)
    assert results[1].log_px.is_cuda


@pytest.mark.parametrize("on", ["cpu", "cuda"])
def test_every_estimator_is_right_on_cuda(on):
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(10, 3, dtype=torch.float64, generator=g)
    fa = FactorAnalysis(torch.zeros(10).double(), weight, torch.ones(10).double())
    x, _ = fa.sample(8, generator=g)
    model = fa.as_vae(shift=0.1, widen=1.2).cuda()
    noise = torch.Generator(on).manual_seed(4)
    for evidence in (
        importance_sampling(model, x, 2000, generator=noise),
        prior_monte_carlo(model, x, 200_000, generator=noise),
        annealed_importance_sampling(model, x, 200, num_temperatures=10, generator=noise),
    ):
        error = evidence.log_px.cpu() - fa.log_prob(x)
        assert (error.abs() < 4 * evidence.se.cpu()).all()


@pytest.mark.parametrize(
    ("name", "drawn"), [*((name, None) for name in ESTIMATORS), ("iwae", 1), ("dreg", 1)]
)
def test_training_on_cuda_raises_the_bound(name, drawn):
    _, model = models()
    x = bits(1).expand(256, 1, 4, 5)
    settings = TrainingConfig(epochs=10, batch_size=64, learning_rate=0.02)
    objective = Objective(name=name, num_samples=2, backward_samples=drawn)
    state = TrainingState()
    data = Dataset(train=x, valid=x[:64])
    stats = list(fit(model, data, settings, state, objective=objective))
    assert stats[-1].valid_bound > stats[0].valid_bound
    assert stats[-1].valid_bound > 0.5 * 20 * -math.log(2)
    assert active_units(model, x).is_cuda


BINARIZED = Dataset(
    train=(torch.arange(300 * 20).view(300, 1, 4, 5) * 37 % 256).to(torch.uint8),
    valid=bits(64).to(torch.uint8),
    binarize=True,
)


def test_draws_follow_the_grey_levels_and_the_seed():
    noise = NoiseShape(3, 2, True, torch.float32, True)
    data = BINARIZED.to("cuda")

    def epoch(number, **share):
        return list(data.train_batches(noise, batch_size=100, seed=0, epoch=number, **share))

    first = epoch(1)
    assert all(torch.equal(a.x, b.x) for a, b in zip(first, epoch(1), strict=True))
    assert not any(torch.equal(a.eps, b.eps) for a, b in zip(first, epoch(2), strict=True))
    eps = torch.cat([batch.eps.flatten() for batch in first])
    assert abs(eps.mean()) < 5 / len(eps) ** 0.5
    drawn = sum(batch.x.sum().item() for number in range(1, 41) for batch in epoch(number))
    p = BINARIZED.train.double() / 255
    error = (40 * p * (1 - p)).sum().sqrt()
    assert abs(drawn - 40 * p.sum()) < 5 * error
    shares = [epoch(1, rank=rank, world_size=3) for rank in range(3)]
    for whole, *parts in zip(first, *shares, strict=True):
        assert torch.equal(whole.x, torch.cat([part.x for part in parts]))
        assert torch.equal(whole.eps, torch.cat([part.eps for part in parts], 1))
        assert whole.u is not None
        assert torch.equal(whole.u, torch.cat([part.u for part in parts]))
        assert torch.equal(whole.v, torch.cat([part.v for part in parts]))


GRAPHED = [
    *((setting, {}, {}) for setting in SETTINGS),
    ({"space": "continuous", "likelihood": "student_t"}, {}, {}),
    *(({}, {"name": name, "num_samples": 3}, {}) for name in ESTIMATORS),
    ({}, {"name": "iwae", "num_samples": 3, "backward_samples": 2}, {"optimizer": "muon"}),
    ({}, {"beta": 0.5, "beta_warmup_epochs": 3}, {"gradient_clip": 0.1}),
    ({}, {}, {"schedule": "cosine"}),
    ({"dtype": torch.float32}, {}, {}),
    ({"dtype": torch.float32}, {}, {"precision": "bf16"}),  # float64 stays as it is
]


@pytest.mark.parametrize(("changes", "objective", "config"), GRAPHED, ids=str)
def test_graphs_train_as_the_steps_they_replay(changes, objective, config, monkeypatch):
    """Batches of 32, and a last one of 12 that no graph takes."""
    data = replace(BINARIZED, binarize=changes.get("space", "binary") == "binary")
    config = TrainingConfig(epochs=4, batch_size=32, weight_decay=0.01, **config)
    weights, bounds = [], []
    for warm_up in (3, 10**9):
        monkeypatch.setattr(cuda_graphs, "WARM_UP", warm_up)
        _, model = models(**changes)
        trainer = Trainer(model, data, config, Objective(**objective), TrainingState())
        rows = [trainer.epoch() for _ in range(4)]
        bounds.append([(row.train_elbo, row.valid_bound) for row in rows])
        weights.append(model.state_dict())
        assert isinstance(trainer.stepper, GraphedSteps)
        assert not trainer.stepper.failed
        assert (trainer.stepper.replays is not None) == (warm_up == 3)
    exact = "dtype" not in changes
    rtol, atol = (1e-6, 1e-7) if exact else (1e-3, 1e-4)
    torch.testing.assert_close(weights[0], weights[1], rtol=rtol, atol=atol)
    torch.testing.assert_close(torch.tensor(bounds[0]), torch.tensor(bounds[1]), rtol=rtol, atol=0)
    assert len({bound for _, bound in bounds[0]}) == 4


def test_divergence_is_told_and_leaves_the_weights_of_the_step_before():
    _, model = models()
    config = TrainingConfig(epochs=4, batch_size=32)
    trainer = Trainer(model, BINARIZED, config, Objective(), TrainingState())
    trainer.epoch()
    assert isinstance(trainer.stepper, GraphedSteps)
    assert trainer.stepper.replays is not None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = next(trainer.train_batches(epoch=2))
    with pytest.raises(DivergenceError, match="epoch 2, step 1"):
        trainer.train_step(batch._replace(eps=batch.eps * math.nan), 2, 0, 1.0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_resumed_at_an_epoch_the_weights_are_the_same(tmp_path):
    """But for rounding: its first steps go without a graph."""
    config = TrainingConfig(epochs=4, batch_size=32, optimizer="muon", schedule="cosine")
    _, undisturbed = models()
    list(fit(undisturbed, BINARIZED, config))
    _, killed = models()
    state = TrainingState()
    for stats in fit(killed, BINARIZED, config, state):
        if stats.epoch == 2:
            save_state(killed, state, tmp_path / "state")
            break
    _, resumed = models()
    list(fit(resumed, BINARIZED, config, load_state(resumed, tmp_path / "state")))
    torch.testing.assert_close(resumed.state_dict(), undisturbed.state_dict())


def test_a_step_that_no_graph_can_hold_is_taken_without():
    _, model = models()
    original = model.decoder.forward
    model.decoder.forward = lambda z: original(z) * (z.sum().item() > -math.inf)
    config = TrainingConfig(epochs=2, batch_size=32)
    trainer = Trainer(model, BINARIZED, config, Objective(), TrainingState())
    with pytest.warns(UserWarning, match="without CUDA graphs"):
        trainer.epoch()
    assert trainer.epoch().epoch == 2
    assert isinstance(trainer.stepper, GraphedSteps)
    assert trainer.stepper.failed
