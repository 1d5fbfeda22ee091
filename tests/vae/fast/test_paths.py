"""Over the one list of fast paths: the plain way's numbers, one switch, and all without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vae import VAE, VAEConfig, acceleration
from vae.data import Dataset
from vae.evidence import importance_sampling
from vae.fast import PATHS
from vae.fast.ranks import SharingRanks
from vae.objectives import Objective, TrainingModule
from vae.training import TrainingConfig, TrainingState, fit

ROOT = Path(__file__).parents[3]


def model_of(device: str = "cpu") -> VAE:
    torch.manual_seed(0)
    config = VAEConfig(
        data_shape=(1, 6, 6), space="binary", latent_dim=3, likelihood="bernoulli", hidden=(8, 7)
    )
    return VAE(config).to(device)


def data_of(count: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, (count, 1, 6, 6), generator=generator, dtype=torch.uint8)


def estimated(fast: bool) -> list[Tensor]:
    """log p(x) of a call that is large enough to be compiled."""
    generator = torch.Generator().manual_seed(2)
    found = importance_sampling(model_of(), data_of(8), 600, generator=generator, fast=fast)
    return [found.log_px]


def gradients(fast: bool) -> list[Tensor]:
    """Of an objective that needs the decoder alone."""
    model, x = model_of(), data_of(8)
    eps = torch.randn(5, 8, 3, generator=torch.Generator().manual_seed(3))
    module = TrainingModule(model, Objective(name="iwae", num_samples=5))
    with acceleration.allowed(fast):
        module(x, eps).surrogate.sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def trained(fast: bool, device: str = "cpu") -> list[Tensor]:
    model = model_of(device)
    data = Dataset(train=data_of(), valid=data_of(16))
    config = TrainingConfig(epochs=3, batch_size=16, seed=0)
    for _ in fit(model, data, config, TrainingState(), fast=fast):
        pass
    return [p.detach().cpu() for p in model.parameters()]


RANKS = """
import sys, torch, torch.distributed as dist
from tests.vae.fast.test_paths import trained
rank, fast, folder = int(sys.argv[1]), sys.argv[2] == "True", sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet{fast}", rank=rank, world_size=2)
torch.save(trained(fast), f"{folder}/{rank}{fast}.pt")
dist.destroy_process_group()
"""


def trained_by_two(fast: bool, folder: Path) -> list[Tensor]:
    processes = [
        subprocess.Popen([sys.executable, "-c", RANKS, str(rank), str(fast), str(folder)], cwd=ROOT)
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    one, other = (torch.load(folder / f"{rank}{fast}.pt") for rank in range(2))
    assert all(map(torch.equal, one, other))
    return one


CASES: dict[str, Callable[[bool, Path], list[Tensor]]] = {
    "compiled decoder": lambda fast, folder: estimated(fast),
    "decoder node": lambda fast, folder: gradients(fast),
    "manual backward": lambda fast, folder: trained(fast),
    "shared memory": trained_by_two,
    "CUDA graphs": lambda fast, folder: trained(fast, "cuda"),
}


def test_every_path_is_tried() -> None:
    assert set(CASES) == {path.name for path in PATHS}
    assert len(PATHS) <= 8


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_a_path_comes_to_the_plain_way_s_numbers(
    path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path.name == "CUDA graphs" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr("vae.fast.compiled_decoder.WORTH_COMPILING", 1000)
    fast, plain = (CASES[path.name](way, tmp_path) for way in (True, False))
    torch.testing.assert_close(fast, plain, rtol=path.tolerance, atol=path.tolerance)
    if path.name != "CUDA graphs":
        assert path.applies(model_of())


def what_is_taken() -> list[bool]:
    """Whether each door of `vae.acceleration` gives something for a model that may have it."""
    model = model_of()
    return [
        acceleration.compiled_decoder(model, data_of(4), "fp32", 10**9) is not None,
        acceleration.decoder_node(model) is not None,
        acceleration.manual_elbo(model, 100) is not None,
    ]


def test_one_switch_for_a_process_and_one_for_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    assert what_is_taken() == [True, True, True]
    with acceleration.allowed(False):
        assert what_is_taken() == [False, False, False]
        with acceleration.allowed(True):  # within a call that goes without, all do
            assert what_is_taken() == [False, False, False]
    monkeypatch.setenv("TIGHTBOUND_PLAIN", "1")
    assert what_is_taken() == [False, False, False]
    assert not acceleration.is_allowed()
    monkeypatch.setenv("TIGHTBOUND_PLAIN", "0")
    assert what_is_taken() == [True, True, True]


def test_ranks_without_it_sum_by_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharingRanks, "__init__", lambda *_: pytest.fail("taken"))
    with acceleration.allowed(False):
        assert acceleration.sharing_ranks({}, {}) is None


# An editable installation would find the parts of a package that a copy of it lacks.
ALONE = """
import runpy, sys
editable = [f for f in sys.meta_path if "__editable__" in str(getattr(f, "__module__", ""))]
for finder in editable:
    sys.meta_path.remove(finder)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_all_runs_the_same_with_the_package_deleted(tmp_path: Path) -> None:
    """Trains, scores and loads: `vae/fast` is gone, and the numbers are those of the switch."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "vae", copy / "vae", ignore=shutil.ignore_patterns("__pycache__"))
    program = Path(__file__).with_name("plain_program.py")

    def run(home: Path, **changes: str) -> dict[str, list[float]]:
        environment = os.environ | {"PYTHONPATH": str(home)} | changes
        command = [sys.executable, "-B", "-c", ALONE, str(program), str(tmp_path / "model")]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    switched_off = run(copy, TIGHTBOUND_PLAIN="1")
    with_all = run(copy)
    shutil.rmtree(copy / "vae" / "fast")
    without = run(copy)
    assert without == switched_off | {"fast": False}
    assert with_all["fast"] is True
    torch.testing.assert_close(
        torch.tensor(without["log_px"]), torch.tensor(with_all["log_px"]), rtol=1e-5, atol=1e-5
    )
