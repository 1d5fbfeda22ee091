"""Side by side with what a user would pick instead: `make bench MNIST=<folder>`.

Runs every contender in turn, several times over, each in processes of its own with the same number
of threads, and writes bench/results.json and the tables of bench/README.md. `MNIST` is the root
that torchvision.datasets.MNIST takes; it is downloaded there when missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.datasets import MNIST

from bench.network import TABLE_1, arrays_of
from bench.ours import project
from bench.turns import Contender, Peer, Stage, take_turns
from pipeline.worker import build_model
from vae import save
from vae.data import Dataset
from vae.training import TrainingConfig, fit

HERE = Path(__file__).parent
WORK = HERE.parent / ".tightbound" / "bench"
RESULTS = HERE / "results.json"
README = HERE / "README.md"
MARKS = ("<!-- tables begin -->", "<!-- tables end -->")

BATCHES = (128, 512, 2048)
TRAINERS = ("ours", "pythae", "lightning", "examples", "bare", "products")
OURS_BF16 = "ours, bf16"
EVIDENCE_BATCH = {"pythae": 1000, "bare": 500, "products": 500}
"""Samples of one image at a time: each contender's fastest of 100, 250, 500, 1000 and 2500."""


def prepare(root: Path) -> None:
    """MNIST as arrays, and one trained model whose weights all contenders evaluate."""
    WORK.mkdir(parents=True, exist_ok=True)
    splits = {
        name: MNIST(root, train=name == "train", download=True).data for name in ("train", "test")
    }
    generator = torch.Generator().manual_seed(0)
    test = torch.bernoulli(splits["test"].float() / 255, generator=generator).to(torch.uint8)
    train = splits["train"]
    np.savez(WORK / "mnist.npz", train=train.flatten(1).numpy(), test=test.flatten(1).numpy())
    data = Dataset(train=train[:, None], valid=test[:1000, None], binarize=True)
    model = build_model(TABLE_1, data, seed=0)
    for _ in fit(model, data, TrainingConfig(epochs=5, batch_size=256, learning_rate=2e-3)):
        pass
    save(model, WORK / "model")
    arrays = {name: weight.numpy() for name, weight in arrays_of(model).items()}
    np.savez(WORK / "weights.npz", allow_pickle=False, **arrays)


def peer_command(task: str, name: str, *options: str) -> list[str]:
    python = str(HERE.parent / ".venv-bench" / "bin" / "python")
    return [python, str(HERE / "peers.py"), task, name, str(WORK / "mnist.npz"), *options]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(HERE.parent)}


def estimate(name: str, options: list[str]) -> dict[str, Any]:
    """log p(x) by one contender, in a process of its own."""
    if name.startswith("ours"):
        command = [sys.executable, str(HERE / "ours.py"), str(WORK / "mnist.npz"), *options]
        command += ["--weights", str(WORK / "model")]
        command += ["--precision", "bf16"] if name == OURS_BF16 else []
    else:
        command = peer_command("evidence", name, *options, "--weights", str(WORK / "weights.npz"))
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise SystemExit(f"{name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare_training(root: Path, turns: int, threads: int) -> dict[str, Any]:
    """Images a second, by batch size and contender, of each turn."""
    results = {}
    with project(root, threads=threads) as folder:
        for batch in BATCHES:
            options = ("--batch", str(batch), "--threads", str(threads))
            with ExitStack() as living:
                contenders: dict[str, Contender] = {"ours": Stage(folder, batch)}
                living.callback(contenders["ours"].close)
                for name in TRAINERS[1:]:
                    peer = Peer(peer_command("train", name, *options), environment())
                    living.callback(peer.close)
                    contenders[name] = peer
                results[str(batch)] = take_turns(contenders, turns, f"training, batch {batch}")
    return results


def compare_evidence(repetitions: int, threads: int) -> dict[str, Any]:
    """Images × samples a second on the same weights, and the same images' mean log p(x)."""
    images = {"ours": 200, OURS_BF16: 200, "pythae": 20, "bare": 40, "products": 100}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in images}
    for repetition in range(repetitions):
        for name, count in images.items():
            options = ["--images", str(count), "--samples", "5000", "--threads", str(threads)]
            if name in EVIDENCE_BATCH:
                options += ["--batch", str(EVIDENCE_BATCH[name])]
            found[name].append(estimate(name, options))
            rate = found[name][-1]["samples_per_s"]
            print(f"log p(x), {repetition + 1} of {repetitions}: {name} {rate:,.0f}", flush=True)
    ours = np.mean([run["log_px"] for run in found["ours"]], axis=0)
    agreement = {}
    for name in (OURS_BF16, "pythae", "bare"):
        theirs = np.mean([run["log_px"] for run in found[name]], axis=0)
        difference = theirs - ours[: len(theirs)]
        error = difference.std(ddof=1) / len(difference) ** 0.5
        agreement[name] = {"mean_difference": difference.mean(), "standard_error": error}
    for runs in found.values():
        for run_ in runs:
            del run_["log_px"]
    return {"runs": found, "agreement": agreement}


def row(rates: dict[str, list[float]], label: str = "") -> str:
    """A table's row: medians of each contender, and of the turns' ratios of ours to the others."""
    cells = [label] if label else []
    cells += [f"{statistics.median(values):,.0f}" for values in rates.values()]
    for name in ("pythae", "bare", "products"):
        ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates[name], strict=True)]
        cells.append(f"{statistics.median(ratios):.2f}")
    return "| " + " | ".join(cells) + " |"


def heading(*names: str) -> list[str]:
    cells = [*names, "ours / pythae", "ours / bare", "ours / products"]
    return ["| " + " | ".join(cells) + " |", "|" + "---|" * len(cells)]


def tables(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = results["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, "
        + ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
        + f"; medians of {machine['turns']} turns in training and {machine['repetitions']} of "
        "log p(x), and of the turns' ratios.",
        "",
        "Training, images a second:",
        "",
        *heading("batch", *TRAINERS),
        *(row(rates, batch) for batch, rates in results["training"].items()),
    ]
    found = results["evidence"]["runs"]
    lines += [
        "",
        "log p(x) by importance sampling, K = 5,000, images × samples a second:",
        "",
        *heading(*found),
        row({name: [run["samples_per_s"] for run in runs] for name, runs in found.items()}),
        "",
    ]
    for name, facts in results["evidence"]["agreement"].items():
        lines.append(
            f"Mean log p(x) of {name} minus ours, same weights and images: "
            f"{facts['mean_difference']:+.4f} ± {facts['standard_error']:.4f} nats."
        )
    return "\n".join(lines)


def cpu_name() -> str:
    """What the processor calls itself, and how many of them there are."""
    path = Path("/proc/cpuinfo")
    names = [
        line.split(":")[1].strip()
        for line in (path.read_text().splitlines() if path.exists() else [])
        if line.startswith("model name")
    ]
    return f"{os.cpu_count()} × {names[0] if names else platform.processor()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist", type=Path, default=WORK / "torchvision")
    parser.add_argument("--turns", type=int, default=7, help="of training")
    parser.add_argument("--repetitions", type=int, default=5, help="of log p(x)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=("evidence", "training"), help="keep the other figures")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    prepare(given.mnist)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if given.only else {}
    results["machine"] = {
        "cpu": cpu_name(),
        "threads": given.threads,
        "turns": given.turns,
        "repetitions": given.repetitions,
        "versions": {name: version(name) for name in ("torch", "ray", "mlflow")},
    }
    if given.only in (None, "evidence"):
        results["evidence"] = compare_evidence(given.repetitions, given.threads)
    if given.only in (None, "training"):
        results["training"] = compare_training(given.mnist, given.turns, given.threads)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    text = README.read_text()
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    table = tables(results)
    README.write_text(f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{after}")
    print(table)


if __name__ == "__main__":
    main()
