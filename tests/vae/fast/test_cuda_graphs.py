"""Which steps a CUDA graph takes, and that it can: a step reads no value off the device.

Where there is a device, `test_cuda.py` compares the graphs with the steps that they replay.
"""

import warnings
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vae.data import Dataset
from vae.fast import cuda_graphs, perceptron
from vae.fast.cuda_graphs import WARM_UP, GraphedSteps, Replay
from vae.models import LIKELIHOODS, VAE, VAEConfig
from vae.objectives import ESTIMATORS, Objective
from vae.optimizers import OPTIMIZERS
from vae.training import Trainer, TrainingConfig, TrainingState

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "lift_fresh"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class NoWaiting(TorchDispatchMode):
    """Refuses what makes Python wait for the device, and `torch.tensor` of a number."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        assert name not in WAITING, f"{func} needs a value of the device, or brings one"
        if name in INDEXING:
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{func} counts the mask first"
        return func(*args, **(kwargs or {}))


def binary(**changes):
    return {"space": "binary", "likelihood": "bernoulli"} | changes


SETTINGS = [
    *({"space": sorted(kind.spaces)[-1], "likelihood": name} for name, kind in LIKELIHOODS.items()),
    binary(network="conv", hidden=(4, 8), activation="relu"),
    binary(posterior="full", prior="mixture"),
    binary(posterior="flow", prior="vamp"),
    binary(latent_dim=(3, 2)),
    binary(latent_dim=(3, 2), posterior="flow", prior="vamp"),
]
OBJECTIVES = [
    *({"name": name, "num_samples": 3} for name in ESTIMATORS),
    {"name": "iwae", "num_samples": 3, "backward_samples": 2},
    {"name": "dreg", "num_samples": 3, "backward_samples": 2},
    {"name": "elbo", "free_bits": 0.1, "reduction": "sum"},
]


def trainer(setting, objective, batch_size=32, **config):
    torch.manual_seed(0)
    setting = {"data_shape": (1, 4, 4), "latent_dim": 2, "hidden": (8,)} | setting
    model = VAE(VAEConfig(**setting))
    top = 2 if model.config.space == "binary" else 256
    x = torch.randint(0, top, (64, 1, 4, 4), dtype=torch.uint8)
    x = x.double() if model.config.space == "continuous" else x
    data = Dataset(train=x, valid=x)
    config = TrainingConfig(batch_size=batch_size, gradient_clip=1.0, weight_decay=0.1, **config)
    return Trainer(model, data, config, Objective(**objective), TrainingState())


def check(trainer):
    first, second = trainer.train_batches(epoch=1)
    trainer.gradient(first, 1.0)
    trainer.update(0.01)
    beta, learning_rate = torch.tensor(1.0), torch.tensor(0.01)
    before = [p.detach().clone() for p in trainer.parameters]
    with NoWaiting():
        trainer.gradient(second, beta)
        trainer.update(learning_rate)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """By hand goes only on a CPU."""
    for name in ("supports", "supports_decoder"):
        monkeypatch.setattr(perceptron, name, lambda model: False)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_model_waits_for_the_device(setting, precision):
    check(trainer(setting, {"name": "elbo"}, precision=precision))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_objective_and_no_optimizer_waits_for_the_device(objective, optimizer):
    check(trainer(binary(), objective, optimizer=optimizer))


def test_what_waits_is_found():
    x = torch.rand(3)
    for waiting in (x.sum().item, lambda: x[x > 0.5], lambda: torch.tensor(2.0)):
        with pytest.raises(AssertionError), NoWaiting():
            waiting()


class CallsAgain(Replay):
    """A replay whose graph is the function itself."""

    def __init__(self, function, *inputs):
        self.function, self.calls = function, 0
        self.inputs = [None if value is None else value.clone() for value in inputs]
        self.graph: Any = self

    def replay(self):
        self.calls += 1
        self.outputs = self.function(*self.inputs)


def graphed_trainer(monkeypatch, replay, batch_size=20) -> tuple[Trainer, Any]:
    """64 examples in batches of 20 leave a last one of 4."""
    monkeypatch.setattr(cuda_graphs, "Replay", replay)
    monkeypatch.setattr(
        GraphedSteps, "_gradient_aside", lambda self, batch, beta: self._gradient(batch, beta)
    )
    objective = {"name": "elbo", "beta_warmup_epochs": 4}
    plain, graphed = (trainer(binary(), objective, batch_size, schedule="cosine") for _ in range(2))
    graphed.graphed = GraphedSteps(graphed.gradient, graphed.update, graphed.parameters, batch_size)
    return plain, graphed


def same_training(plain, graphed):
    for _ in range(4):
        expected, found = plain.epoch(), graphed.epoch()
        assert found.train_elbo == pytest.approx(expected.train_elbo, rel=1e-6)
    for a, b in zip(plain.parameters, graphed.parameters, strict=True):
        torch.testing.assert_close(a, b)


def test_full_batches_are_replayed_after_the_first_few(monkeypatch):
    plain, graphed = graphed_trainer(monkeypatch, CallsAgain)
    same_training(plain, graphed)
    steps = graphed.graphed
    assert [replay.calls for replay in steps.replays] == [4 * 3 - WARM_UP] * 2
    assert not steps.replaying  # the last batch was smaller
    graphed.close()
    assert graphed.graphed is None


def test_parameters_that_moved_are_captured_anew(monkeypatch):
    plain, graphed = graphed_trainer(monkeypatch, CallsAgain)
    same_training(plain, graphed)
    before = graphed.graphed.replays
    assert before is not None
    for parameter in graphed.parameters:
        parameter.data = parameter.data.clone()  # as `model.cpu()` and `model.cuda()` do
    same_training(plain, graphed)
    assert graphed.graphed.replays is not before


def test_a_capture_that_fails_is_told_once_and_training_goes_on(monkeypatch):
    def refuse(function, *inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    plain, graphed = graphed_trainer(monkeypatch, refuse)
    with pytest.warns(UserWarning, match="without CUDA graphs: operation not permitted") as told:
        same_training(plain, graphed)
    assert len(told) == 1
    assert graphed.graphed.failed


def test_training_on_a_cpu_takes_no_graphs():
    one = trainer(binary(), {"name": "elbo"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.epoch()
    assert one.graphed is None
