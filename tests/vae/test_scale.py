"""Units do not matter: log p(x) + log s is the same for a column in any unit s, at any offset."""

import copy
import math

import pytest
import torch

from vae.data import Dataset, statistics_of
from vae.evidence import PROPOSALS, annealed_importance_sampling, importance_sampling
from vae.models import LIKELIHOODS, VAE, VAEConfig, load, save
from vae.training import TrainingConfig, TrainingState, fit

REAL = sorted(name for name, kind in LIKELIHOODS.items() if "continuous" in kind.spaces)
SCALES = [1e-100, 1e-30, 1e-20, 1e-12, 1.0, 1e12, 1e20, 1e30, 1e100]


def table(seed=0, rows=64):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, 1, generator=g, dtype=torch.float64)
    return torch.cat([z, z + 0.3 * torch.randn(rows, 2, generator=g, dtype=torch.float64)], 1)


def model_of(x, likelihood):
    torch.manual_seed(0)
    config = VAEConfig(
        data_shape=(3,), space="continuous", latent_dim=2, likelihood=likelihood, hidden=(8,)
    )
    model = VAE(config)
    model.set_data_statistics(*statistics_of([x], binarize=False))
    return model.eval()


def generator():
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("likelihood", REAL)
@pytest.mark.parametrize("scale", SCALES)
def test_log_px_moves_by_the_logarithm_of_the_unit(likelihood, scale):
    x = table()
    one, other = model_of(x, likelihood), model_of(scale * x, likelihood)
    jacobian = 3 * math.log(scale)
    a = importance_sampling(one, x, 100, generator=generator())
    b = importance_sampling(other, scale * x, 100, generator=generator())
    torch.testing.assert_close(b.log_px + jacobian, a.log_px, rtol=1e-5, atol=2e-4)
    torch.testing.assert_close(b.khat, a.khat, rtol=1e-2, atol=1e-2)
    means = other.likelihood(torch.zeros(1, 2)).mean / scale
    torch.testing.assert_close(means, one.likelihood(torch.zeros(1, 2)).mean, rtol=1e-5, atol=1e-6)
    assert other.likelihood(torch.zeros(1, 2)).sample().isfinite().all()


@pytest.mark.parametrize("likelihood", REAL)
def test_columns_of_very_different_units_in_one_table(likelihood):
    x, units = table(), torch.tensor([1e-30, 1.0, 1e30], dtype=torch.float64)
    a = importance_sampling(model_of(x, likelihood), x, 100, generator=generator())
    b = importance_sampling(model_of(x * units, likelihood), x * units, 100, generator=generator())
    torch.testing.assert_close(b.log_px, a.log_px, rtol=1e-5, atol=2e-4)  # the units' product is 1


@pytest.mark.parametrize("likelihood", REAL)
@pytest.mark.parametrize("offset", [-1e6, 1e9])
def test_a_far_offset_costs_no_digits(likelihood, offset):
    x = table()
    x = x.float().double()  # so that adding the offset rounds little
    a = importance_sampling(model_of(x, likelihood), x, 100, generator=generator())
    moved = x + offset
    b = importance_sampling(model_of(moved, likelihood), moved, 100, generator=generator())
    torch.testing.assert_close(b.log_px, a.log_px, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("proposal", sorted(PROPOSALS))
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_every_proposal_is_at_home_in_any_unit(proposal, scale):
    x = table()
    jacobian = 3 * math.log(scale)
    estimates = [
        importance_sampling(
            model_of(s * x, "gaussian"), s * x, 200, proposal=proposal, generator=generator()
        ).log_px
        for s in (1.0, scale)
    ]
    torch.testing.assert_close(estimates[1] + jacobian, estimates[0], rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_annealing_is_at_home_in_any_unit(scale):
    x = table(rows=4)
    jacobian = 3 * math.log(scale)
    found = [
        annealed_importance_sampling(
            model_of(s * table(), "gaussian"), s * x, 8, num_temperatures=5, generator=generator()
        ).log_px
        for s in (1.0, scale)
    ]
    torch.testing.assert_close(found[1] + jacobian, found[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("likelihood", REAL)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_training_is_the_same_in_any_unit(likelihood, scale):
    config = TrainingConfig(epochs=2, batch_size=16, seed=0)
    bounds = []
    for s in (1.0, scale):
        data = Dataset(train=s * table(), valid=s * table(1))
        model = model_of(data.train, likelihood)
        *_, last = fit(model, data, config, TrainingState())
        bounds.append(last.valid_elbo)
    jacobian = 3 * math.log(scale)
    assert bounds[1] + jacobian == pytest.approx(bounds[0], rel=1e-3, abs=1e-2)


def test_statistics_keep_the_spread_of_a_far_column():
    x = torch.randn(10_000, 2, generator=generator(), dtype=torch.float64)
    mean, std = statistics_of((1e9 + x).split(300), binarize=False)
    torch.testing.assert_close(mean - 1e9, x.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(std, x.std(0, correction=0), rtol=1e-6, atol=0)


def test_the_statistics_stay_in_float64(tmp_path):
    x = 1e9 + table()
    model = model_of(x, "gaussian")
    loc = model.data_loc.clone()
    changed = copy.deepcopy(model).to(torch.float32).half().float()
    save(model, tmp_path / "vae")
    for one in (changed, load(tmp_path / "vae")):
        assert torch.equal(one.data_loc, loc)
        assert one.dtype == torch.float32
    assert copy.deepcopy(model).double().dtype == torch.float64
