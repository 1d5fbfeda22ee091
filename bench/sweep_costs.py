"""What a sweep costs besides training: its wall clock against its trials' fit seconds.

    python -m bench.sweep_costs --epochs 20

Runs the sweep of the shipped params.yaml (12 trials on 5,000 digits) in a temporary folder and
prints one JSON object. `ratio` is wall clock ÷ (sum of fit seconds ÷ cores), start-up included; 1
would be a sweep that does nothing but train, on all cores, to the end. The
last two are the seconds before the first trial trains and after the last one has ended.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from pathlib import Path

import pandas as pd

from tests.end_to_end.conftest import Project, finish

FULL = {"data.limit": None, "model.hidden": [200, 200], "sweep.latent_dim": [4, 16, 32]}
LIKELIHOODS = ["gaussian", "gaussian_shared", "continuous_bernoulli", "discretized_logistic"]


def measure(folder: Path, epochs: int) -> dict[str, float]:
    """Seconds of one sweep, which starts with nothing but the prepared data."""
    project = Project.create(folder)
    samples = {"sweep.num_importance_samples": 64, "sweep.likelihood": LIKELIHOODS}
    project.change(FULL | samples | {"sweep.epochs": epochs})
    project.stage("prepare")
    project.stage("selfcheck")
    start = time.monotonic()
    process = project.start(*project.stage_command("sweep"))
    assert process.stdout is not None
    ends = [
        (time.monotonic() - start, float(found[1]))
        for line in process.stdout
        if (found := re.search(r"bits/dim +([\d.]+) s\b", line))
    ]
    finish(process)
    wall = time.monotonic() - start
    trials = pd.read_csv(folder / "reports" / "sweep" / "trials.csv")
    fit = float(trials["seconds"].to_numpy().sum())
    cores = len(os.sched_getaffinity(0))
    return {
        "trials": len(trials),
        "cores": cores,
        "wall": wall,
        "sum_of_fit": fit,
        "longest_fit": float(trials["seconds"].to_numpy().max()),
        "ratio": wall / (fit / cores),
        "until_first_fit": min(end - seconds for end, seconds in ends),
        "after_last_fit": wall - ends[-1][0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20, help="of each trial")
    epochs = parser.parse_args().epochs
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), epochs)
    print(json.dumps({key: round(value, 2) for key, value in found.items()}, indent=2))


if __name__ == "__main__":
    main()
