"""Any configuration either trains, saves, loads and gives evidence, or is refused by this table."""

import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

from vae.data import Dataset
from vae.evidence import PROPOSALS, importance_sampling
from vae.models import (
    ACTIVATIONS,
    LIKELIHOODS,
    NETWORKS,
    POSTERIORS,
    PRIORS,
    SPACES,
    VAE,
    ElboTerms,
    VAEConfig,
    load,
    save,
)
from vae.objectives import ESTIMATORS, Objective
from vae.training import TrainingConfig, TrainingState, fit

Choose = Callable[[Sequence[Any]], Any]

REFUSALS: dict[str, tuple[Callable[[dict[str, Any]], bool], str]] = {
    "a likelihood outside its data space": (
        lambda c: c["space"] not in LIKELIHOODS[c["likelihood"]].spaces,
        r"model\.likelihood.*data\.space|data\.space.*model\.likelihood",
    ),
    "convolutions over what is no image": (
        lambda c: c["network"] == "conv" and len(c["data_shape"]) != 3,
        r"model\.network: conv needs images",
    ),
    "convolutions without a number of channels": (
        lambda c: c["network"] == "conv" and len(c["data_shape"]) == 3 and not c["hidden"],
        r"model\.hidden: conv needs at least one number of channels",
    ),
}
"""All that may be refused: when, and the words that name the key. Anything else must run."""

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TABLES = [(1,), (2,), (7,), (2, 3)]
IMAGES = [(1, 1, 1), (1, 5, 4), (2, 3, 7), (3, 8, 8), (1, 1, 6)]


def draw_configuration(choose: Choose) -> dict[str, Any]:
    """A `VAEConfig`'s arguments; about one in ten is in the table of refusals."""
    space = choose(list(SPACES))
    fitting = [name for name, kind in LIKELIHOODS.items() if space in kind.spaces]
    network = choose(NETWORKS)
    careless = choose(range(12)) == 0
    shapes = IMAGES if network == "conv" and not careless else TABLES + IMAGES
    widths = [(4,), (3, 5), (6, 4, 2)]
    return {
        "data_shape": choose(shapes),
        "space": space,
        "latent_dim": choose([1, 2, 5, (3, 2), (2, 4), (4, 2, 1)]),
        "likelihood": choose(list(LIKELIHOODS) if careless else fitting),
        "network": network,
        "hidden": choose([*widths, ()] if network == "mlp" or careless else widths),
        "activation": choose(list(ACTIVATIONS)),
        "posterior": choose(list(POSTERIORS)),
        "prior": choose(list(PRIORS)),
        "min_scale": choose([1e-3, 1e-4, 0.1]),
        "num_components": choose([1, 3]),
        "prior_components": choose([1, 4]),
    }


def draw_data(choose: Choose, space: str, shape: tuple[int, ...], count: int) -> Tensor:
    """(count, *shape) in data units: at random, constant, or at the edges of the space."""
    g = torch.Generator().manual_seed(choose(range(100)))
    kind = choose(["random", "constant", "edges"])
    if space == "continuous":
        scale = choose([1e-3, 1.0, 1e4])
        values = scale * (1 + torch.randn(count, *shape, generator=g, dtype=torch.float64))
        return values[:1].expand_as(values).clone() if kind == "constant" else values
    top = 1 if space == "binary" else 255
    if kind == "random":
        return torch.randint(0, top + 1, (count, *shape), generator=g).to(torch.uint8)
    if kind == "constant":
        return torch.full((count, *shape), choose([0, top]), dtype=torch.uint8)
    return (top * torch.randint(0, 2, (count, *shape), generator=g)).to(torch.uint8)


def run(choose: Choose, folder: Path, device: str = "cpu") -> str:
    """Train one step, save, load and weigh; returns "ran", or the row of REFUSALS it met."""
    content = draw_configuration(choose)
    expected = [words for applies, words in REFUSALS.values() if applies(content)]
    if expected:
        with pytest.raises(ValueError, match="model") as caught:
            VAEConfig(**content)
        message = str(caught.value)
        assert all(re.search(words, message) for words in expected), message
        assert len(message.splitlines()) == len(expected), f"more than the table allows: {message}"
        return next(name for name, (applies, _) in REFUSALS.items() if applies(content))

    config = VAEConfig(**content)
    objective = Objective(name=choose(list(ESTIMATORS)), num_samples=choose([2, 3]))
    dtype = choose([torch.float32, torch.float64])
    x = draw_data(choose, config.space, config.data_shape, 9)
    data = Dataset(train=x[:5], valid=x[5:])
    torch.manual_seed(choose(range(100)))
    model = VAE(config).to(device, dtype)
    if choose([True, True, False]) or config.space == "continuous":
        model.set_data_statistics(*data.statistics())

    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    state = TrainingState()
    one_step = TrainingConfig(epochs=1, batch_size=5, learning_rate=1e-3, gradient_clip=100.0)
    (stats,) = fit(model, data, one_step, state, objective=objective)
    assert all(value.isfinite().all() for value in model.parameters())
    assert any(not torch.equal(before[name], value) for name, value in model.named_parameters())
    assert math.isfinite(stats.valid_bound)
    assert math.isfinite(stats.train_elbo)

    save(model, folder / "vae")
    loaded = load(folder / "vae", device)
    assert loaded.config == config
    eps = torch.randn(2, 4, model.noise_dim, dtype=dtype).to(device)
    valid = data.valid.to(device)
    first: ElboTerms = model(valid, eps)
    assert torch.equal(first.elbo, loaded(valid, eps).elbo)

    options = {"num_samples": 30, "proposal": choose(["encoder", *PROPOSALS])}
    evidence, again = (
        importance_sampling(m, valid, generator=torch.Generator().manual_seed(0), **options)
        for m in (model, loaded)
    )
    assert torch.equal(evidence.log_px, again.log_px)
    assert evidence.log_px.isfinite().all()
    assert not evidence.khat.isnan().any()
    assert ((evidence.ess >= 1 - 1e-9) & (evidence.ess <= 30 + 1e-9)).all()
    assert (evidence.elbo <= evidence.log_px + 1e-9 * evidence.log_px.abs() + 1e-9).all()  # Jensen
    if config.space != "continuous":  # a mass is at most 1
        assert (evidence.log_px_z <= 1e-4).all()
    return "ran"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("seed", range(8))
def test_a_random_configuration_runs_or_is_refused_by_the_table(seed, device, tmp_path):
    run(random.Random(seed).choice, tmp_path, device)


def test_every_row_of_the_table_is_met_and_four_fifths_of_the_draws_are_outside_it():
    choose = random.Random(0).choice
    draws = [draw_configuration(choose) for _ in range(2000)]
    for applies, _ in REFUSALS.values():
        assert any(map(applies, draws))
    refused = sum(any(applies(c) for applies, _ in REFUSALS.values()) for c in draws)
    assert refused <= 0.2 * len(draws)


@pytest.mark.slow
def test_at_least_four_fifths_of_many_draws_run():
    outcomes: list[str] = []

    @settings(
        max_examples=100,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.data())
    def anything(data):
        with TemporaryDirectory() as folder:
            outcomes.append(run(lambda options: data.draw(st.sampled_from(options)), Path(folder)))

    anything()
    assert len(outcomes) >= 100
    assert outcomes.count("ran") >= 0.8 * len(outcomes)
    assert set(outcomes) <= {"ran", *REFUSALS}
