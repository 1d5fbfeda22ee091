"""What `dvc repro train` costs besides training: seconds to the first step and from the last one.

    python -m bench.train_costs --repeats 3

Prepares a small project in a temporary folder, then trains it again and again, each time with
another seed. Besides the wall clock it shows the CPU seconds of each process that took part, which
tell where the time goes also on a machine that is not idle.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import pandas as pd
import psutil

from tests.end_to_end.conftest import Project, finish

SAMPLE_SECONDS = 0.1
PINNED = {"model.latent_dim": 2, "model.likelihood": "discretized_logistic"}
TITLES = {  # what a process's command line holds → what it is called here; the first that fits
    "pipeline.train": "stage",
    "bin/dvc": "dvc",
    "gcs_server": "Ray head (gcs)",
    "raylet/raylet": "raylet",
    "TrainController": "train controller",
    "RayTrainWorker": "train workers",
    "ray::IDLE": "idle Ray workers",
    "ray::": "other Ray actors",
    "ray/dashboard": "Ray's dashboard and agents",
    "site-packages/ray": "other Ray processes",
}


def prepared_project(folder: Path) -> Project:
    """A small project that is ready to train."""
    project = Project.create(folder)
    project.change(PINNED)
    project.run("dvc", "repro", "--quiet", "sweep")
    return project


def measure(project: Project) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the parts of one `dvc repro train`, and CPU seconds of its processes."""
    start = time.time()
    process = project.start("dvc", "repro", "--quiet", "--single-item", "train")
    spent: dict[psutil.Process, tuple[str, float]] = {}
    while process.poll() is None:
        sample(process.pid, spent)
        time.sleep(SAMPLE_SECONDS)
    finish(process)
    end = time.time()
    history = pd.read_csv(project.folder / "reports" / "train" / "history.csv")
    first_step = history["time"].iloc[0] - history["seconds"].iloc[0]
    last_step = history["time"].iloc[-1]
    cpu: defaultdict[str, float] = defaultdict(float)
    for title, seconds in spent.values():
        cpu[title] += seconds
    parts = {
        "to the first step": first_step - start,
        "training": last_step - first_step,
        "from the last step to exit": end - last_step,
    }
    return parts, cpu


def sample(pid: int, spent: dict[psutil.Process, tuple[str, float]]) -> None:
    """Note the CPU seconds that each process below `pid` has used so far."""
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            command, times = " ".join(process.cmdline()), process.cpu_times()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        title = next((name for key, name in TITLES.items() if key in command), "other")
        spent[process] = (title, times.user + times.system)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        project = prepared_project(Path(folder))
        results = []
        for seed in range(repeats):
            project.change({"training.seed": seed + 1})
            results.append(measure(project))
    table = pd.DataFrame([parts for parts, _ in results])
    table["fixed"] = table["to the first step"] + table["from the last step to exit"]
    print(table.round(2).to_string())
    print(f"median fixed cost: {table['fixed'].median():.1f} s")
    titles = sorted({title for _, cpu in results for title in cpu})
    medians = {
        title: statistics.median(cpu.get(title, 0.0) for _, cpu in results) for title in titles
    }
    for title, seconds in sorted(medians.items(), key=lambda item: -item[1]):
        print(f"  CPU {seconds:6.2f} s  {title}")
    print(f"  CPU {sum(medians.values()):6.2f} s  together")


if __name__ == "__main__":
    main()
