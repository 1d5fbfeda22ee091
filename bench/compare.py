"""Side by side with what a user would pick instead: `make bench MNIST=<folder>`.

Runs every contender in turn, several times over, each in processes of its own that stay alive, with
the same number of threads, and writes bench/results.json and the tables of bench/README.md. `MNIST`
is the root that torchvision.datasets.MNIST takes; it is downloaded there when missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
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
from pipeline.train import build_model
from vae.data import Dataset
from vae.models import save
from vae.training import TrainingConfig, fit

HERE = Path(__file__).parent
WORK = HERE.parent / ".tightbound" / "bench"
RESULTS = HERE / "results.json"
README = HERE / "README.md"
MARKS = ("<!-- tables begin -->", "<!-- tables end -->")

BATCHES = (128, 512, 2048)
TRAINERS = ("pythae", "lightning", "examples", "bare", "products")
ONE_WORKER = "ours, 1 worker"
OURS_BF16 = "ours, bf16"
PAIRS = (("ours", "pythae"), ("ours", "bare"), ("ours", "products"))
TRAINING_PAIRS = (*PAIRS, (ONE_WORKER, "pythae"), (ONE_WORKER, "bare"))
EVIDENCE_IMAGES = {"ours": 300, OURS_BF16: 300, "pythae": 50, "bare": 80, "products": 300}
"""As many as take some seconds; of the same noise in both of ours."""

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


def evidence_command(name: str, threads: int) -> list[str]:
    """log p(x) by one contender, for each line it gets."""
    count = EVIDENCE_IMAGES[name]
    options = ["--images", str(count), "--samples", "5000", "--threads", str(threads)]
    if name.startswith("ours"):
        command = [sys.executable, str(HERE / "ours.py"), str(WORK / "mnist.npz"), *options]
        command += ["--weights", str(WORK / "model")]
        return [*command, *(["--precision", "bf16"] if name == OURS_BF16 else [])]
    options += ["--batch", str(EVIDENCE_BATCH[name]), "--weights", str(WORK / "weights.npz")]
    return peer_command("evidence", name, *options)


def compare_training(root: Path, turns: int, threads: int) -> dict[str, Any]:
    """Images a second, by batch size and contender, of each turn.

    Ours with as many workers as threads, of one thread each, as the pipeline is shipped for two;
    and with one worker of all threads.
    """
    results = {}
    with (
        project(root, workers=threads, threads=1) as many,
        project(root, threads=threads) as one,
    ):
        for batch in BATCHES:
            options = ("--batch", str(batch), "--threads", str(threads))
            with ExitStack() as living:
                contenders: dict[str, Contender] = {}
                for name, folder in (("ours", many), (ONE_WORKER, one)):
                    contenders[name] = stage = Stage(folder, batch)
                    living.callback(stage.close)
                for name in TRAINERS:
                    peer = Peer(peer_command("train", name, *options), environment())
                    living.callback(peer.close)
                    contenders[name] = peer
                results[str(batch)] = take_turns(contenders, turns, f"training, batch {batch}")
    return results


def compare_evidence(turns: int, threads: int) -> dict[str, Any]:
    """Images × samples a second on the same weights, and the same images' mean log p(x)."""
    with ExitStack() as living:
        peers: dict[str, Peer] = {}
        for name in EVIDENCE_IMAGES:
            peers[name] = Peer(evidence_command(name, threads), environment())
            living.callback(peers[name].close)
        rates = take_turns(dict(peers), turns, "log p(x)")
    found = {
        name: np.mean([answer["log_px"] for answer in peer.answers], axis=0)
        for name, peer in peers.items()
    }
    agreement = {}
    for name in (OURS_BF16, "pythae", "bare"):
        count = min(len(found[name]), len(found["ours"]))
        difference = found[name][:count] - found["ours"][:count]
        error = difference.std(ddof=1) / count**0.5
        agreement[name] = {"mean_difference": difference.mean(), "standard_error": error}
    return {"rates": rates, "agreement": agreement}


def table(rows: dict[str, dict[str, list[float]]], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Medians of the contenders' rates, and of the turns' ratios of pairs; a row for each batch."""
    names = list(next(iter(rows.values())))
    lines: list[list[str]] = [["batch", *names, *(f"{one} / {other}" for one, other in pairs)]]
    lines.append(["---"] * len(lines[0]))
    for label, rates in rows.items():
        ratios = (np.divide(rates[one], rates[other]) for one, other in pairs)
        medians = [f"{np.median(rates[name]):,.0f}" for name in names]
        lines.append([label, *medians, *(f"{np.median(ratio):.2f}" for ratio in ratios)])
    if len(rows) == 1:
        lines = [line[1:] for line in lines]
    return ["| " + " | ".join(line) + " |" for line in lines]


def tables(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = results["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, "
        + ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
        + f"; medians of {machine['turns']} turns, and of the turns' ratios.",
        "",
        "Training, images a second:",
        "",
        *table(results["training"], TRAINING_PAIRS),
        "",
        "log p(x) by importance sampling, K = 5,000, images × samples a second:",
        "",
        *table({"": results["evidence"]["rates"]}, (*PAIRS, (OURS_BF16, "pythae"))),
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
    parser.add_argument("--turns", type=int, default=7)
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
        "versions": {name: version(name) for name in ("torch", "ray", "mlflow")},
    }
    if given.only in (None, "evidence"):
        results["evidence"] = compare_evidence(given.turns, given.threads)
    if given.only in (None, "training"):
        results["training"] = compare_training(given.mnist, given.turns, given.threads)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    before, rest = README.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    text = tables(results)
    README.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")
    print(text)


if __name__ == "__main__":
    main()
