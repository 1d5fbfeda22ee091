"""What `make run` takes besides its numerical work, stage by stage: bench/run_costs.csv.

    python -m bench.run_costs --repeats 3

Runs the shipped pipeline in a temporary folder, in turn as it is and with next to nothing to
compute: one epoch, one sample, the encoder's own proposals, all else the same. What the second
takes, less the seconds that its trials and its training say they computed and that the self-check
and the baselines take alone, is start-up, data, files, Ray, MLflow, pictures and page, and what
evaluation and registration still compute.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from pipeline.evaluate import Baseline, fit_baselines
from pipeline.selfcheck import selfcheck
from pipeline.stage import SPLITS, load_meta, load_split
from pipeline.tracking import ENSURE_FOLLOWS_VARIABLE
from tests.end_to_end.conftest import REPOSITORY, Project, finish
from vae.models import load

HERE = Path(__file__).parent
NOTHING = {
    "sweep.epochs": 1,
    "sweep.num_importance_samples": 1,
    "training.epochs": 1,
    "evaluate.num_importance_samples": 1,
    "evaluate.proposal": "encoder",
}
BEFORE, AFTER = "ready", "ensure"  # what `make run` does before and after DVC


def shipped_project(folder: Path) -> Project:
    """The pipeline with the parameters, threads and environment of `make run`."""
    project = Project.create(folder)
    del project.environment["OMP_NUM_THREADS"]
    project.environment[ENSURE_FOLLOWS_VARIABLE] = "1"
    shutil.copy(REPOSITORY / "params.yaml", folder)
    return project


def seconds_of_run(project: Project) -> dict[str, float]:
    """Wall-clock seconds of each stage of a first `make run`."""
    began = {BEFORE: time.monotonic()}
    project.run(sys.executable, "-m", "pipeline.params")
    project.run(sys.executable, "-m", "pipeline.launch.preflight")
    began["dvc"] = time.monotonic()
    process = project.start("dvc", "repro")
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.match(r"Running stage '(\w+)'", line):
            began[found[1]] = time.monotonic()
        elif line.startswith("error"):
            print(line, end="")
    finish(process)
    began[AFTER] = time.monotonic()
    project.run(sys.executable, "-m", "pipeline.register", "--ensure")
    times = [*began.values(), time.monotonic()]
    return {name: times[place + 1] - times[place] for place, name in enumerate(began)}


def computed(project: Project) -> dict[str, float]:
    """Wall-clock seconds of numerical work: as trials and training report it, or taken anew."""
    reports = project.folder / "reports"
    trials = pd.read_csv(reports / "sweep" / "trials.csv")["seconds"].to_numpy()
    epochs = pd.read_csv(reports / "train" / "history.csv")["seconds"].to_numpy()
    return {
        "selfcheck": seconds_of(selfcheck),
        "sweep": trials.sum() / len(os.sched_getaffinity(0)),
        "train": epochs.sum(),
        "evaluate": seconds_of(lambda: baselines(project.folder)),
    }


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock seconds of what is called, alone and in this process."""
    start = time.monotonic()
    work()
    return time.monotonic() - start


def baselines(folder: Path) -> list[Baseline]:
    """The baselines that the evaluation of a project with `NOTHING` fits."""
    prepared = folder / "data" / "prepared"
    meta, config = load_meta(prepared), load(folder / "models" / "vae").config
    train, valid, test = (torch.tensor(load_split(prepared, name).x) for name in SPLITS)
    return fit_baselines(
        train,
        valid,
        test,
        space=meta.space,
        latent_dim=sum(config.latent_dims),
        min_scale=config.min_scale,
        num_samples=1,
        seed=0,
        binarize=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    rows = []
    for repeat in range(parser.parse_args().repeats):
        for kind, changes in (("whole", {}), ("besides", NOTHING)):
            with tempfile.TemporaryDirectory() as folder:
                project = shipped_project(Path(folder))
                project.change(changes)
                seconds = seconds_of_run(project)
                if kind == "besides":
                    for stage, numerical in computed(project).items():
                        seconds[stage] -= numerical
            rows.append({"run": kind} | seconds)
            print(f"{repeat + 1}: {kind} {sum(seconds.values()):.1f} s", flush=True)
    table = pd.DataFrame(rows).groupby("run", sort=False).median().T
    table.loc["together"] = table.sum()
    table["share"] = table["besides"] / table["whole"]
    table.rename_axis("stage").round(2).to_csv(HERE / "run_costs.csv")
    print(table.round(2).to_string())


if __name__ == "__main__":
    main()
