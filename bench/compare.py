"""Side by side with what a user would pick instead: `make bench MNIST=<folder>`.

Runs every contender in turn, several times over, each in a process of its own with the same number
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
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.datasets import MNIST

from bench.network import TABLE_1, arrays_of
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


def measure(name: str, task: str, options: list[str], root: Path) -> dict[str, Any]:
    """One run of one contender in a process of its own."""
    if name.startswith("ours"):
        data = str(root) if task == "train" else str(WORK / "mnist.npz")
        script = [sys.executable, str(HERE / "ours.py"), task, data]
        script += [] if task == "train" else ["--weights", str(WORK / "model")]
        script += ["--precision", "bf16"] if name == OURS_BF16 else []
    else:
        python = str(HERE.parent / ".venv-bench" / "bin" / "python")
        script = [python, str(HERE / "peers.py"), task, name, str(WORK / "mnist.npz")]
        script += [] if task == "train" else ["--weights", str(WORK / "weights.npz")]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(script + options, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name}, {task}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(
    names: tuple[str, ...], repetitions: int, run: Callable[[str], dict[str, Any]], what: str
) -> dict[str, list[dict[str, Any]]]:
    """Every contender once, then every contender again: a slow minute of the machine hits all."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for repetition in range(repetitions):
        for name in names:
            found[name].append(run(name))
            figure = next(iter(found[name][-1].values()))
            print(f"{what}, {repetition + 1} of {repetitions}: {name} {figure:,.0f}", flush=True)
    return found


def compare_training(root: Path, repetitions: int, threads: int) -> dict[str, Any]:
    results = {}
    for batch in BATCHES:

        def run(name: str, batch: int = batch) -> dict[str, Any]:
            epochs = 8 if name == "ours" else 3
            options = ["--batch", str(batch), "--epochs", str(epochs), "--threads", str(threads)]
            return measure(name, "train", options, root)

        results[str(batch)] = in_turn(TRAINERS, repetitions, run, f"training, batch {batch}")
    return results


def compare_evidence(root: Path, repetitions: int, threads: int) -> dict[str, Any]:
    """Images × samples a second on the same weights, and the same images' mean log p(x)."""
    images = {"ours": 200, OURS_BF16: 200, "pythae": 20, "bare": 40, "products": 100}

    def run(name: str) -> dict[str, Any]:
        options = ["--images", str(images[name]), "--samples", "5000", "--threads", str(threads)]
        if name in EVIDENCE_BATCH:
            options += ["--batch", str(EVIDENCE_BATCH[name])]
        return measure(name, "evidence", options, root)

    found = in_turn(tuple(images), repetitions, run, "log p(x)")
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


def tables(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = results["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, "
        + ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
        + f"; medians of {machine['repetitions']} runs in turn.",
        "",
        "Training, images a second:",
        "",
        "| batch | " + " | ".join(TRAINERS) + " | ours / pythae | ours / bare | ours / products |",
        "|---|" + "---|" * (len(TRAINERS) + 3),
    ]
    for batch, found in results["training"].items():
        rate = {n: statistics.median(r["images_per_s"] for r in runs) for n, runs in found.items()}
        cells = [f"{rate[name]:,.0f}" for name in TRAINERS]
        cells += [f"{rate['ours'] / rate[name]:.2f}" for name in ("pythae", "bare", "products")]
        lines.append(f"| {batch} | " + " | ".join(cells) + " |")
    found = results["evidence"]["runs"]
    rate = {n: statistics.median(r["samples_per_s"] for r in runs) for n, runs in found.items()}
    lines += [
        "",
        "log p(x) by importance sampling, K = 5,000, images × samples a second:",
        "",
        "| " + " | ".join(rate) + " | ours / pythae | ours / bare | ours / products |",
        "|" + "---|" * (len(rate) + 3),
        "| "
        + " | ".join(f"{value:,.0f}" for value in rate.values())
        + "".join(f" | {rate['ours'] / rate[n]:.2f}" for n in ("pythae", "bare", "products"))
        + " |",
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
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=("evidence", "training"), help="keep the other figures")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    prepare(given.mnist)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if given.only else {}
    results["machine"] = {
        "cpu": cpu_name(),
        "threads": given.threads,
        "repetitions": given.repetitions,
        "versions": {name: version(name) for name in ("torch", "ray", "mlflow")},
    }
    for part, compare in (("evidence", compare_evidence), ("training", compare_training)):
        if given.only in (None, part):
            results[part] = compare(given.mnist, given.repetitions, given.threads)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    text = README.read_text()
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    table = tables(results)
    README.write_text(f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{after}")
    print(table)


if __name__ == "__main__":
    main()
