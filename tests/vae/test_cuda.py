"""A CUDA device gives what the CPU gives; skipped where there is none."""

import math

import pytest
import torch

from vae import VAE, FactorAnalysis, VAEConfig
from vae.data import Dataset
from vae.diagnostics import active_units
from vae.evidence import annealed_importance_sampling, importance_sampling, prior_monte_carlo
from vae.objectives import ESTIMATORS, Objective
from vae.training import TrainingConfig, TrainingState, fit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def models(**changes):
    """The same model on the CPU and on CUDA, in float64."""
    torch.manual_seed(0)
    setup = {
        "data_shape": (1, 4, 5),
        "space": "binary",
        "latent_dim": 3,
        "likelihood": "bernoulli",
        "hidden": (8,),
    }
    cpu = VAE(VAEConfig(**setup | changes)).double()
    cuda = VAE(cpu.config).double()
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
