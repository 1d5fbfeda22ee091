"""Sweeps for real, on one small Ray: what they find, and what becomes of trials that fail."""

from __future__ import annotations

import json
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import yaml

from pipeline.cluster import connect as cluster
from pipeline.params import Params, load_params
from pipeline.stage import UserError
from pipeline.sweep import Resources, sweep
from tests.pipeline import builders
from tests.pipeline.ray_cluster import ray_node

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[3]
SMALL = {
    "model": {"likelihood": "discretized_logistic", "hidden": [8]},
    "sweep": {"latent_dim": [2], "epochs": 3, "num_importance_samples": 8},
    "training": {"learning_rate": 0.01, "batch_size": 20},
}


@pytest.fixture(scope="module")
def ray() -> Iterator[dict[str, str]]:
    with ray_node() as joined:
        yield joined


@pytest.fixture
def small(project: Path, ray: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with prepared data, joined to the module's Ray."""
    for name, value in ray.items():
        monkeypatch.setenv(name, value)
    for name in ("vae", "pipeline"):
        (project / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "dvc.yaml", project)
    builders.prepared_data(project / "data" / "prepared")
    return project


def params(folder: Path, **sections: dict[str, Any]) -> Params:
    """The shipped parameters, made small, with these changes."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    for changes in (SMALL, sections):
        for section, values in changes.items():
            content[section] |= values
    (folder / "params.yaml").write_text(yaml.safe_dump(content))
    return load_params(folder / "params.yaml")


def run(folder: Path, **sections: dict[str, Any]) -> pd.DataFrame:
    """trials.csv of a sweep."""
    sweep(params(folder, **sections), folder / "data" / "prepared", folder / "sweep")
    return pd.read_csv(folder / "sweep" / "trials.csv")


def rows(folder: Path, name: str = "trials.csv") -> list[dict[str, Any]]:
    """A table of the sweep; None where a cell is empty."""
    table = pd.read_csv(folder / "sweep" / name).astype(object)
    return table.where(table.notna(), None).to_dict("records")


def best(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sweep" / "best.json").read_text())


def test_optuna_with_seeds_goes_on_where_it_was(small: Path, capfd: pytest.CaptureFixture[str]):
    rate = {"training.learning_rate": {"log_uniform": [1e-4, 1e-1]}}
    space = rate | {"model.hidden": [[8], [4, 4]], "objective.beta": [0.5, 1]}
    search: dict[str, Any] = {"search": "optuna", "num_seeds": 2, "space": space}
    trials = run(small, sweep=search | {"num_trials": 2})
    assert trials["status"].tolist() == ["ok"] * 4
    assert trials["seed"].tolist() == [0, 0, 1, 1]
    assert trials["point"].tolist() == [1, 2, 1, 2]
    points = rows(small, "points.csv")
    for point in points:
        own = [row["valid_log_px"] for row in rows(small) if row["point"] == point["point"]]
        assert point["valid_log_px"] == pytest.approx(statistics.fmean(own))
        assert point["valid_log_px_seed_se"] == pytest.approx(statistics.stdev(own) / 2**0.5)
    first, second = points
    assert first["valid_log_px"] > second["valid_log_px"]
    chosen = best(small)
    assert chosen["training"]["learning_rate"] == first["training.learning_rate"]
    assert chosen["model"]["hidden"] == yaml.safe_load(first["model.hidden"])
    assert chosen["objective"]["beta"] == first["objective.beta"]

    before = rows(small)
    longer = run(small, sweep=search | {"num_trials": 3})
    assert "goes on: 4 of 6 trials are finished" in capfd.readouterr().out
    assert len(longer) == 6
    known = {row["trial_id"] for row in before}
    kept = [row for row in rows(small) if row["trial_id"] in known]
    assert kept == before  # to the seconds of the fit


def test_a_trial_that_diverges_is_recorded_and_the_others_go_on(small: Path):
    rates = {"training.learning_rate": [0.01, 1e18, 0.02]}
    trials = run(small, sweep={"space": rates})
    assert trials["status"].tolist() == ["ok", "diverged", "ok"]
    assert "training diverged in epoch 1" in trials["error"][1]
    points = pd.read_csv(small / "sweep" / "points.csv")
    assert points["status"].tolist() == ["ok", "ok", "diverged"]
    assert points["rank"].tolist()[:2] == [1, 2]
    assert best(small)["training"]["learning_rate"] in (0.01, 0.02)
    assert mlflow_statuses(small) == {"ok": "FINISHED", "diverged": "FAILED"}


def mlflow_statuses(folder: Path) -> dict[str, str]:
    """The status of MLflow's runs of trials, by that of the trial."""
    from mlflow import MlflowClient

    database = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(database, database)
    experiment = client.get_experiment_by_name("tightbound")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.`tightbound.kind` = 'trial'")
    return {run.data.tags["trial_status"]: run.info.status for run in runs}


def test_a_trial_that_dies_is_recorded_and_gets_another_chance(small: Path):
    once = {"scaling": {"max_failures": 0}, "sweep": {"latent_dim": [2, 3], "epochs": 200}}
    with killer(lambda name: "ImplicitFunc" in name, times=1):
        trials = run(small, **once)
    assert sorted(trials["status"]) == ["died", "ok"]
    assert trials["error"].dropna().tolist() == [
        "its process died: killed, out of memory, or its node was lost"
    ]
    again = run(small, **once)
    assert again["status"].tolist() == ["ok", "ok"]
    survivor = trials[trials["status"] == "ok"]["seconds"].item()
    assert survivor in again["seconds"].tolist()  # it was not run a second time


def test_when_all_trials_fail_the_reason_is_told(small: Path):
    with pytest.raises(UserError, match=r"none of the sweep's 2 points .* training diverged"):
        run(small, sweep={"space": {"training.learning_rate": [1e18, 1e19]}})
    assert not (small / "sweep").exists()


class killer:  # noqa: N801
    """Kills so many processes with such a title while the block runs, soon after they appear."""

    def __init__(self, wanted: Callable[[str], bool], times: int) -> None:
        self.wanted, self.left, self.over = wanted, times, threading.Event()
        self.thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        while self.left and not self.over.wait(0.2):
            for process in psutil.process_iter(["cmdline"]):
                title = " ".join(process.info["cmdline"] or [])
                if title.startswith("ray::") and self.wanted(title) and self.left:
                    time.sleep(1)
                    process.kill()
                    self.left -= 1

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        assert self.left == 0


def test_asha_stops_weak_trials_early(small: Path):
    rates = [0.02, 1e-7, 1e-8, 1e-9]
    trials = run(
        small,
        sweep={
            "scheduler": "asha", "epochs": 16, "max_concurrent": 1,
            "space": {"training.learning_rate": rates},
        },
    )  # fmt: skip
    assert trials["status"].tolist() == ["ok", "stopped", "stopped", "stopped"]
    assert trials["epochs"].tolist() == [16, 1, 1, 1]
    assert best(small)["training"]["learning_rate"] == 0.02


def test_trials_of_several_workers_finish_and_equal_those_of_one(small: Path):
    """Two trials of two workers on two CPUs: both at a time would wait for each other for ever."""
    space = {"latent_dim": [2, 3]}
    one = run(small, sweep=space)
    shutil.rmtree(small / ".tightbound")
    two = run(small, sweep=space, scaling={"workers_per_trial": 2})
    assert two["trial_id"].tolist() == one["trial_id"].tolist()
    for name in ("valid_elbo", "valid_log_px", "valid_log_px_se"):
        assert two[name].tolist() == pytest.approx(one[name].tolist(), rel=1e-5)
    again = run(small, sweep=space)  # with other scaling: nothing is run again
    pd.testing.assert_frame_equal(again, two)


def test_a_trial_of_several_workers_that_diverges(small: Path):
    rates = {"training.learning_rate": [0.01, 1e18]}
    trials = run(small, sweep={"space": rates}, scaling={"workers_per_trial": 2})
    assert trials["status"].tolist() == ["ok", "diverged"]


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"workers_per_trial": 3}, "3 CPUs are asked for and 2 are there"),
        ({"workers_per_trial": 2, "threads_per_worker": 2}, "4 CPUs are asked for and 2 are there"),
        ({"threads_per_worker": 64}, "64 CPUs are asked for and 2 are there"),
        ({"use_gpu": True, "workers_per_trial": 2}, "2 GPUs are asked for and 1 are there"),
    ],
)
def test_what_would_wait_for_ever_is_refused_at_once(
    small: Path, scaling: dict[str, Any], words: str
):
    with pytest.raises(UserError, match=words):
        run(small, sweep={"latent_dim": [2, 3]}, scaling=scaling)


def test_trials_share_a_gpu(small: Path):
    """Four trials of a quarter of the GPU are at work at the same time, each on that one GPU."""
    quarter = Resources(workers=1, cpus=0.5, gpus=0.25)
    assert Resources.of(params(small, scaling={"use_gpu": True}).scaling).gpus == 1
    found = params(small, scaling={"use_gpu": True, "gpus_per_trial": 0.25})
    assert Resources.of(found.scaling).gpus == quarter.gpus
    with cluster.connect():
        import ray
        from ray import tune

        assert quarter.at_once() == 4

        class Meeting:
            count = 0

            def come(self) -> None:
                self.count += 1

            def there(self) -> Any:
                return self.count

        meeting: Any = ray.remote(num_cpus=0)(Meeting).remote()

        def present() -> Any:
            return ray.get(meeting.there.remote())

        def trial(config: dict[str, Any]) -> None:
            ray.get(meeting.come.remote())
            deadline = time.monotonic() + 300
            while present() < 4 and time.monotonic() < deadline:
                time.sleep(0.1)
            gpus = ray.get_runtime_context().get_accelerator_ids()["GPU"]
            tune.report({"gpus": gpus, "met": present()})

        grid = tune.Tuner(
            tune.with_resources(trial, quarter.request()),
            param_space={"number": tune.grid_search([0, 1, 2, 3])},
            run_config=tune.RunConfig(storage_path=str(small / "share"), verbose=0),
        ).fit()
        assert [result.error for result in grid] == [None] * 4
        assert [(result.metrics or {})["met"] for result in grid] == [4] * 4
        assert [(result.metrics or {})["gpus"] for result in grid] == [["0"]] * 4
