"""The training loop: resumes to the bit, is the same on two ranks, stops where it should."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from vae.data import Dataset
from vae.models import VAE, VAEConfig
from vae.objectives import Objective
from vae.optimizers import OPTIMIZERS
from vae.training import (
    DivergenceError,
    TrainingConfig,
    TrainingState,
    fit,
    load_state,
    save_state,
    trainer,
)

SHAPE = (1, 4, 4)
CONFIG = TrainingConfig(epochs=4, batch_size=64, learning_rate=3e-3)


def dataset(count=200, seed=0, space="grey8"):
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 2, (count + 64, 1, 1, 1), generator=generator)
    noise = torch.rand(count + 64, *SHAPE, generator=generator)
    pixels = (40 + 150 * kind + 30 * noise).to(torch.uint8)
    if space == "binary":
        return Dataset(train=pixels[:count], valid=pixels[count:] // 128, binarize=True)
    return Dataset(train=pixels[:count], valid=pixels[count:])


def new_model(likelihood="discretized_logistic", seed=0):
    torch.manual_seed(seed)
    space = "binary" if likelihood == "bernoulli" else "grey8"
    model = VAE(
        VAEConfig(data_shape=SHAPE, space=space, latent_dim=2, likelihood=likelihood, hidden=(16,))
    )
    model.set_data_statistics(*dataset(space=space).statistics())
    return model


def train(model, config=CONFIG, state=None, data=None, **options):
    data = data or dataset(space=model.config.space)
    return list(fit(model, data, config, state, **options))


def same_weights(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_bound_rises_and_best_weights_are_those_of_the_best_epoch():
    model, state = new_model(), TrainingState()
    history = train(model, replace(CONFIG, epochs=8), state)
    assert [stats.epoch for stats in history] == list(range(1, 9))
    assert history[-1].valid_elbo > history[0].valid_elbo + 5
    bounds = [stats.valid_bound for stats in history]
    assert state.best_bound == max(bounds)
    assert state.best_epoch == bounds.index(max(bounds)) + 1
    model.load_state_dict(state.best_weights)
    again = train(model, replace(CONFIG, learning_rate=1e-30, epochs=1))
    assert again[0].valid_bound == pytest.approx(max(bounds), rel=1e-6)


def test_figures_are_means_over_examples_not_over_batches():
    """200 examples in batches of 64 leave a last one of 8: its weight must be 8/200."""
    model = new_model()
    frozen = replace(CONFIG, learning_rate=1e-30, epochs=1)
    (uneven,) = train(model, frozen)
    (whole,) = train(model, replace(frozen, batch_size=200))
    # The noise differs between the two, the closed-form KL does not.
    assert uneven.train_kl == pytest.approx(whole.train_kl, rel=1e-5)
    assert uneven.valid_kl == pytest.approx(whole.valid_kl, rel=1e-5)


@pytest.mark.parametrize("likelihood", ["discretized_logistic", "gaussian", "bernoulli"])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_training_is_bit_identical(tmp_path, likelihood, schedule, optimizer):
    config = replace(
        CONFIG, schedule=schedule, optimizer=optimizer, weight_decay=0.01, gradient_clip=5.0
    )
    undisturbed = new_model(likelihood)
    state = TrainingState()
    expected = train(undisturbed, config, state)

    killed = new_model(likelihood)
    killed_state = TrainingState()
    for stats in fit(killed, dataset(space=killed.config.space), config, killed_state):
        if stats.epoch == 2:
            save_state(killed, killed_state, tmp_path / "state")
            break
    resumed = new_model(likelihood, seed=99)
    resumed_state = load_state(resumed, tmp_path / "state")
    train(resumed, config, resumed_state)

    assert same_weights(undisturbed.state_dict(), resumed.state_dict())
    assert same_weights(state.best_weights, resumed_state.best_weights)
    assert [s.valid_bound for s in resumed_state.history] == [s.valid_bound for s in expected]


def test_same_seed_same_weights_other_seed_other_weights():
    first, second, other = new_model(), new_model(), new_model()
    for model, seed in ((first, 0), (second, 0), (other, 1)):
        train(model, replace(CONFIG, seed=seed))
    assert same_weights(first.state_dict(), second.state_dict())
    assert not same_weights(first.state_dict(), other.state_dict())


def test_patience_stops_after_so_many_epochs_without_a_better_bound():
    config = replace(CONFIG, epochs=50, learning_rate=1e-30, patience=3)
    state = TrainingState()
    train(new_model(), config, state)
    assert state.best_epoch == 1
    assert state.epoch == 4
    assert train(new_model(), config, state) == []


def test_cosine_schedule_ends_near_zero():
    history = train(new_model(), replace(CONFIG, schedule="cosine"))
    steps = 4 * math.ceil(200 / 64)
    expected = 3e-3 * 0.5 * (1 + math.cos(math.pi * (steps - 1) / steps))
    assert history[-1].learning_rate == pytest.approx(expected)


def test_divergence_names_epoch_step_and_term_and_keeps_the_weights():
    model = new_model()
    data = dataset()
    table = Dataset(train=data.train.double(), valid=data.valid.double())
    table.train[:] = math.nan
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DivergenceError, match=r"epoch 1, step 1: .* is not finite"):
        train(model, data=table)
    assert same_weights(before, model.state_dict())


def test_a_last_step_that_ruins_the_only_weights_is_a_divergence():
    """One step of an enormous length: the loss before it was finite, and no loss comes after it."""
    config = replace(CONFIG, epochs=1, batch_size=10_000, learning_rate=1e30)
    with pytest.raises(DivergenceError, match="epoch 1, step 1: the validation bound is not"):
        train(new_model(), config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 0),
        ("batch_size", -1),
        ("optimizer", "mun"),
        ("learning_rate", 0.0),
        ("learning_rate", math.inf),
        ("schedule", "cosin"),
        ("weight_decay", -0.1),
        ("gradient_clip", 0.0),
        ("patience", 0),
        ("seed", -1),
    ],
)
def test_wrong_settings_are_refused_by_key(key, value):
    with pytest.raises(ValueError, match=f"training.{key}: .*{value}"):
        TrainingConfig(**{key: value})


OBJECTIVES = {
    "elbo": Objective(),
    "by hand": Objective(),
    "muon": Objective(),
    "clipped": Objective(),
    "sum": Objective(num_samples=2, reduction="sum", free_bits=0.1, beta=0.5),
    "iwae": Objective(name="iwae", num_samples=3),
    "dreg": Objective(name="dreg", num_samples=3),
    "iwae of few": Objective(name="iwae", num_samples=6, backward_samples=2),
    "dreg of few": Objective(name="dreg", num_samples=6, backward_samples=2),
    "stl": Objective(name="stl", num_samples=2),
    "score_function": Objective(name="score_function", num_samples=3),
}
GREY = "discretized_logistic"
LIKELIHOODS = {"by hand": "bernoulli", "clipped": "bernoulli"}  # `vae.fast.perceptron`'s; else GREY
CONFIGS = {
    "muon": replace(CONFIG, optimizer="muon", learning_rate=0.02),
    "clipped": replace(CONFIG, gradient_clip=0.3, weight_decay=0.1),
}


def _rank(rank, world_size, folder, ddp):
    torch.set_num_threads(1)
    if ddp:
        trainer.DDP_DEVICES = ("cpu",)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
    )
    for name, objective in OBJECTIVES.items():
        likelihood = LIKELIHOODS.get(name, GREY)
        model = new_model(likelihood, seed=rank)  # every rank starts from rank 0's weights
        state = TrainingState()
        train(model, CONFIGS.get(name, CONFIG), state, objective=objective)
        if rank == 0:
            save_state(model, state, Path(folder) / name)
    assert ("torch._dynamo" in sys.modules) == ddp  # seconds of imports
    _diverges(Path(folder), rank)
    if not ddp:  # which refuses such a model
        _leaves_alone_what_has_no_gradient()
        _are_apart_in_the_end(rank)
    dist.destroy_process_group()


def _leaves_alone_what_has_no_gradient():
    for likelihood in ("bernoulli", GREY):  # by hand and not
        model = new_model(likelihood)
        model.of_no_use = torch.nn.Parameter(torch.ones(3))
        frozen = model.decoder.output.weight.requires_grad_(False).clone()
        train(model, replace(CONFIG, weight_decay=0.5))
        assert torch.equal(model.of_no_use, torch.ones(3))
        assert torch.equal(model.decoder.output.weight, frozen)


def _are_apart_in_the_end(rank):
    model, state = new_model(), TrainingState()
    train(model, state=state)
    own = [*model.parameters(), *state.optimizer.values()]
    with torch.no_grad():
        for tensor in own:
            tensor.fill_(rank)
    dist.barrier()
    assert all((tensor == rank).all() for tensor in own)
    dist.barrier()


def _diverges(folder, rank):
    """On one rank's examples only; every rank says so, and keeps the weights."""
    model, data = new_model(), dataset()
    table = Dataset(train=data.train.double(), valid=data.valid.double())
    steps = fit(model, table, replace(CONFIG, batch_size=200))
    next(steps)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table.train[:] = math.nan if rank == 1 else table.train
    with pytest.raises(DivergenceError, match=r"epoch 2, step 1: .* is not finite"):
        next(steps)
    assert same_weights(before, model.state_dict())
    (folder / f"diverged-{rank}").touch()


@pytest.fixture(scope="module", params=[False, True], ids=["summed", "ddp"])
def trained_by_two_ranks(request, tmp_path_factory):
    """By the sums that CPUs take and by DDP, which GPUs do."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(_rank, args=(2, str(folder), request.param), nprocs=2)
    return folder


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_ranks_train_as_one(trained_by_two_ranks, name):
    """200 examples in batches of 64: the last batch of 8 leaves one rank with none."""
    likelihood = LIKELIHOODS.get(name, GREY)
    alone, state = new_model(likelihood), TrainingState()
    train(alone, CONFIGS.get(name, CONFIG), state, objective=OBJECTIVES[name])
    together = new_model(likelihood, seed=5)
    shared = load_state(together, trained_by_two_ranks / name)
    for one, two in zip(state.history, shared.history, strict=True):
        assert two.valid_bound == pytest.approx(one.valid_bound, rel=1e-5)
        assert two.train_log_px_z == pytest.approx(one.train_log_px_z, rel=1e-5)
        assert two.train_kl == pytest.approx(one.train_kl, rel=1e-4)
    for parameter, other in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-3, atol=1e-5)


def test_every_rank_sees_a_divergence_on_one(trained_by_two_ranks):
    assert all((trained_by_two_ranks / f"diverged-{rank}").exists() for rank in (0, 1))


def _interrupted_rank(rank, world_size, folder):
    """Trains to the end, and again with an interruption half-way; rank 0 writes both."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
    )
    config = replace(CONFIG, batch_size=96)
    for name, stops in {"straight": (4,), "resumed": (2, 4)}.items():
        state = TrainingState()
        for stop in stops:
            model = new_model()
            if stop == 4 and name == "resumed":
                state = load_state(model, Path(folder) / "half")
            train(model, replace(config, epochs=stop), state)
            dist.barrier()
            if rank == 0:
                save_state(model, state, Path(folder) / ("half" if stop == 2 else name))
            dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_go_on_are_equal_to_the_bit(tmp_path, world_size):
    """Sums over three ranks depend on their order."""
    spawn(_interrupted_rank, args=(world_size, str(tmp_path)), nprocs=world_size)
    straight, resumed = new_model(), new_model()
    load_state(straight, tmp_path / "straight")
    load_state(resumed, tmp_path / "resumed")
    assert same_weights(straight.state_dict(), resumed.state_dict())


def test_training_in_one_process_never_loads_torchs_compiler():
    """It costs 1.4 s; torch.optim.Optimizer would load it."""
    code = (
        "import sys; from tests.vae.training.test_training import new_model, train;"
        "train(new_model());"
        "assert 'torch._dynamo' not in sys.modules"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
