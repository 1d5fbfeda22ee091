"""Runs in MLflow equal the stages' files, whatever came before: real sqlite, a real server."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.stage import UserError
from pipeline.tracking import (
    Point,
    Store,
    known_runs,
    live as live_tracking,
    mirror as tracking,
    send,
    store as store_module,
    store_address,
    without_password,
)
from tests.pipeline import builders
from tests.pipeline.servers import free_port


@pytest.fixture(autouse=True)
def outputs(project: Path) -> None:
    """The outputs of a sweep, a training and an evaluation."""
    builders.sweep_outputs(project / "sweep")
    builders.model_stub(project / "model")
    builders.train_outputs(project / "train", project / "model")
    builders.write_json(project / "evaluate" / "metrics.json", builders.evaluate_metrics())
    (project / "evaluate" / "histogram.png").write_bytes(b"a histogram")


def mirror_all(params: Any) -> tuple[str, str]:
    """The ids of the sweep's and the model's run."""
    sweep = tracking.mirror_sweep(params, Path("sweep"))
    run = tracking.mirror_training(params, Path("train"), Path("model"), Path("sweep"))
    same = tracking.mirror_evaluation(params, Path("evaluate"), Path("train"))
    assert sweep is not None
    assert run is not None
    assert run == same
    return sweep, run


def test_what_the_registration_sends_is_not_sent_before(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "mlflow.db").unlink()
    params = builders.params()
    monkeypatch.setenv(tracking.ENSURE_FOLLOWS_VARIABLE, "1")
    assert tracking.mirror_evaluation(params, Path("evaluate"), Path("train")) is None
    assert tracking.mirror_report(params, Path("page.html"), Path("train")) is None
    assert not (project / "mlflow.db").exists()


def open_store(params: Any) -> Store:
    return Store(store_address(params.tracking.uri), params.tracking.experiment)


def known_run(name: str) -> str:
    """The id of a run of the local store, by its name in run.json."""
    return known_runs()[store_address(None)][name]


def contents(store: Store) -> dict[str, Any]:
    """All that the store holds: run id -> params, tags, every point, artifacts."""
    found = {}
    for run in store.client.search_runs([store.experiment_id]):
        history = {
            key: [
                (m.step, m.timestamp, m.value)
                for m in store.client.get_metric_history(run.info.run_id, key)
            ]
            for key in run.data.metrics
        }
        files = [
            (entry.path, entry.file_size)
            for folder in ("sweep", "train", "evaluate")
            for entry in store.client.list_artifacts(run.info.run_id, folder)
        ]
        info = (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time)
        found[run.info.run_id] = (info, run.data.params, run.data.tags, history, files)
    return found


def test_a_sweep_becomes_a_run_with_its_trials_as_children(project: Path) -> None:
    params = builders.params()
    sweep = tracking.mirror_sweep(params, project / "sweep")
    store = open_store(params)
    runs = {run.info.run_id: run for run in store.client.search_runs([store.experiment_id])}
    parent = runs.pop(sweep)
    assert parent.data.metrics["valid_bits_per_dim"] == 2.02
    assert parent.data.tags["data_hash"] == "d" * 64
    assert parent.data.tags["best_trial"] == "t2"
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {sweep}
    by_trial = {run.data.tags["trial_id"]: run for run in runs.values()}
    assert by_trial.keys() == {"t2", "t4", "t8"}
    assert by_trial["t4"].info.run_name == "discretized_logistic, 4 latent, seed 0"
    assert by_trial["t4"].data.metrics["valid_log_px"] == -99.0
    assert by_trial["t4"].data.params["latent_dim"] == "4"
    assert by_trial["t4"].info.end_time == 1000 * (builders.STARTED + 10.5)
    assert by_trial["t8"].info.status == "FAILED"
    assert by_trial["t8"].data.tags["error"] == "loss became NaN"
    assert "valid_log_px" not in by_trial["t8"].data.metrics


def test_the_model_run_holds_every_epoch_at_its_own_time() -> None:
    params = builders.params()
    sweep, run_id = mirror_all(params)
    store = open_store(params)
    history = store.client.get_metric_history(run_id, "valid/elbo")
    assert [(m.step, m.timestamp, m.value) for m in history] == [
        (epoch, 1000 * (builders.STARTED + 10 * epoch), -101.0 + epoch)
        for epoch in range(1, builders.EPOCHS + 1)
    ]
    run = store.client.get_run(run_id)
    assert run.info.run_name == "discretized_logistic, 2 latent"
    assert (run.info.start_time, run.info.end_time) == (
        1000 * builders.STARTED,
        1000 * (builders.STARTED + 100),
    )
    assert run.data.tags["sweep_run_id"] == sweep
    assert run.data.params["model.latent_dim"] == "2"
    assert run.data.params["training.epochs"] == "5"
    assert run.data.metrics["test/log_px"] == -97.5
    assert run.data.metrics["test/log_px_mc_se"] == 0.05
    assert run.data.metrics["baseline/gain"] == 22.5
    ladder = store.client.get_metric_history(run_id, "test/ladder")
    assert {m.step: m.value for m in ladder} == {1: -100.0, 10: -98.5, 50: -97.5}
    pictures = [entry.path for entry in store.client.list_artifacts(run_id, "evaluate")]
    assert pictures == ["evaluate/histogram.png", "evaluate/metrics.json"]


def test_mirroring_again_changes_nothing() -> None:
    params = builders.params()
    first = mirror_all(params)
    before = contents(open_store(params))
    assert mirror_all(params) == first
    assert contents(open_store(params)) == before
    assert len(before) == 5


def test_only_missing_epochs_are_sent() -> None:
    params = builders.params()
    shutil.rmtree("train")
    builders.train_outputs(Path("train"), Path("model"), epochs=2)
    _, run_id = mirror_all(params)
    store = open_store(params)
    early = Point(key="train/kl", value=7.0, time=builders.STARTED, step=4)
    store.log(run_id, points=[early])
    builders.train_outputs(Path("train"), Path("model"), epochs=5)
    mirror_all(params)
    history = store.client.get_metric_history(run_id, "train/kl")
    assert sorted((m.step, m.value) for m in history) == [
        (1, 9.0),
        (2, 9.0),
        (3, 9.0),
        (4, 7.0),
        (5, 9.0),
    ]


def test_a_new_evaluation_replaces_the_figures_and_pictures() -> None:
    params = builders.params()
    _, run_id = mirror_all(params)
    metrics = builders.evaluate_metrics(num_samples=500, log_px=-97.0, ladder={"500": -97.0})
    builders.write_json(Path("evaluate/metrics.json"), metrics)
    Path("evaluate/histogram.png").write_bytes(b"a longer histogram")
    mirror_all(params)
    store = open_store(params)
    run = store.client.get_run(run_id)
    assert (run.data.metrics["test/log_px"], run.data.metrics["test/num_samples"]) == (-97.0, 500)
    sizes = {f.path: f.file_size for f in store.client.list_artifacts(run_id, "evaluate")}
    assert sizes["evaluate/histogram.png"] == len(b"a longer histogram")


@pytest.mark.parametrize("lost", ["database", "run ids", "artifacts", "one run"])
def test_what_was_lost_is_made_again(lost: str) -> None:
    params = builders.params()
    sweep, run_id = mirror_all(params)
    send._store.cache_clear()
    if lost == "database":  # another file, since this process keeps the old one open
        database = "sqlite:///new.db"
        params = builders.params(uri=database)
        known = Path(".tightbound/runs.json")
        known.write_text(known.read_text().replace("mlflow.db", "new.db"))
    elif lost == "run ids":
        Path(".tightbound/runs.json").unlink()
    elif lost == "artifacts":
        shutil.rmtree("mlartifacts")
    else:
        open_store(params).client.delete_run(run_id)
    new_sweep, new_run = mirror_all(params)
    store = open_store(params)
    run = store.client.get_run(new_run)
    assert run.data.metrics["test/log_px"] == -97.5
    assert run.data.tags["sweep_run_id"] == new_sweep
    assert len(store.client.get_metric_history(new_run, "train/elbo")) == builders.EPOCHS
    assert len(store.client.list_artifacts(new_run, "evaluate")) == 2
    assert (new_sweep == sweep) == (lost in ("artifacts", "one run"))
    assert (new_run == run_id) == (lost == "artifacts")


def test_a_deleted_experiment_is_restored() -> None:
    params = builders.params()
    mirror_all(params)
    store = open_store(params)
    store.client.delete_experiment(store.experiment_id)
    send._store.cache_clear()
    _, run_id = mirror_all(params)
    assert open_store(params).client.get_run(run_id).info.lifecycle_stage == "active"


def test_infinite_and_missing_values_are_left_out() -> None:
    params = builders.params()
    store = open_store(params)
    run_id = store.run("a", title="a", started=1.0)
    values = {"good": 1.0, "inf": float("inf"), "nan": float("nan"), "none": None, "text": "x"}
    store.log(run_id, current=values)  # type: ignore[arg-type]
    assert store.client.get_run(run_id).data.metrics == {"good": 1.0}


def test_addresses(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store_address(None) == f"sqlite:///{project}/mlflow.db"
    assert store_address("sqlite:///other/runs.db") == f"sqlite:///{project}/other/runs.db"
    assert store_address("http://host:5000") == "http://host:5000"
    with pytest.raises(UserError, match=r"tracking\.uri in params\.yaml is '\./mlruns'"):
        store_address("./mlruns")
    monkeypatch.setenv(store_module.URI_VARIABLE, "sqlite:////elsewhere/m.db")
    assert store_address("http://host:5000") == "sqlite:////elsewhere/m.db"
    assert without_password("https://me:secret@host:5000/x") == "https://host:5000/x"
    copy = project / ".dvc" / "tmp" / "exps" / "tmpabc"
    copy.mkdir(parents=True)
    monkeypatch.delenv(store_module.URI_VARIABLE)
    monkeypatch.chdir(copy)
    assert store_address(None) == f"sqlite:///{project}/mlflow.db"


def test_a_store_that_is_down_costs_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    params = builders.params(uri=f"http://127.0.0.1:{free_port()}")
    with live_tracking.live_run(params, builders.run_facts("train-0001")) as run:
        run.log_epoch(builders.epoch_row(1))
    assert tracking.mirror_sweep(params, Path("sweep")) is None
    assert tracking.mirror_training(params, Path("train"), Path("model"), Path("sweep")) is None
    warnings = capsys.readouterr().err.strip().splitlines()
    assert len(warnings) == 1
    assert "was not reached (connection refused)" in warnings[0]
    assert "`make sync` sends them later" in warnings[0]
    paths = {name: Path(name) for name in ("sweep", "model", "train", "evaluate", "report")}
    with pytest.raises(UserError, match="does not answer"):
        tracking.sync(params, **paths)


def test_an_artifact_folder_that_takes_nothing_costs_one_warning(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "mlartifacts").write_text("a file where the folder should be")
    assert tracking.mirror_sweep(builders.params(), Path("sweep")) is None
    warnings = capsys.readouterr().err.strip().splitlines()
    assert len(warnings) == 1
    assert "mlartifacts" in warnings[0]
    (project / "mlartifacts").unlink()
    paths = {name: Path(name) for name in ("sweep", "model", "train", "evaluate", "report")}
    Path("report").write_text("the page")
    parts = ["sweep", "training", "evaluation", "report"]
    assert tracking.sync(builders.params(), **paths) == parts
    store = open_store(builders.params())
    (page,) = [e for e in store.client.list_artifacts(known_run("train-0001")) if not e.is_dir]
    assert (page.path, page.file_size) == ("report", 8)


def test_a_store_that_hangs_delays_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that accepts connections and never says a word."""
    monkeypatch.setattr(live_tracking, "LIVE_WAIT_SECONDS", 0.3)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        params = builders.params(uri=f"http://127.0.0.1:{listener.getsockname()[1]}")
        with live_tracking.live_run(params, builders.run_facts("train-0001")) as run:
            run.log_epoch(builders.epoch_row(1))
            waiting = [t for t in threading.enumerate() if t.name == "mlflow-epochs"]
            assert len(waiting) == 1
        assert tracking.mirror_sweep(params, Path("sweep")) is None
    warnings = capsys.readouterr().err.strip().splitlines()
    assert len(warnings) == 1
    assert "no answer within 0.3 s" in warnings[0]


def test_live_epochs_and_the_mirror_make_one_run_without_duplicates() -> None:
    params = builders.params()
    facts = builders.run_facts("train-0001", **{"model.latent_dim": 2})
    with live_tracking.live_run(params, facts) as run:
        for epoch in (1, 2, 3):
            run.log_epoch(builders.epoch_row(epoch))
    store = open_store(params)
    live = known_runs()[store.public_address]["train-0001"]
    assert len(store.client.get_metric_history(live, "valid/elbo")) == 3
    _, run_id = mirror_all(params)
    assert run_id == live
    steps = [m.step for m in store.client.get_metric_history(run_id, "valid/elbo")]
    assert sorted(steps) == [1, 2, 3, 4, 5]


def test_live_epochs_are_sent_once_and_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that goes on repeats an epoch or two; its cost must not grow with the epochs."""
    from mlflow import MlflowClient

    params = builders.params()
    facts = builders.run_facts("train-0001")
    looked_up = []
    history = MlflowClient.get_metric_history
    monkeypatch.setattr(
        MlflowClient,
        "get_metric_history",
        lambda self, run_id, key: looked_up.append(key) or history(self, run_id, key),
    )
    for epochs in (range(1, 31), range(29, 61)):
        looked_up.clear()
        with live_tracking.live_run(params, facts) as run:
            for epoch in epochs:
                run.log_epoch(builders.epoch_row(epoch))
                time.sleep(0.001)
            run.log_epoch(builders.epoch_row(epochs[-1]))
        assert sorted(looked_up) == sorted(send.EPOCH_METRICS.values())
    run_id = known_run("train-0001")
    steps = [m.step for m in history(open_store(params).client, run_id, "valid/elbo")]
    assert sorted(steps) == list(range(1, 61))


def test_a_dvc_experiments_run_bears_its_name(project: Path) -> None:
    facts = builders.run_facts("train-0002", **{"model.likelihood": "gaussian"})
    facts["params"]["model.latent_dim"] = 2
    builders.write_json(project / "train" / "run.json", facts | {"experiment": "longer"})
    store = open_store(builders.params())
    run = store.client.get_run(send.model_run(store, project / "train"))
    assert run.info.run_name == "longer: gaussian, 2 latent"


def test_a_run_shows_the_load_of_the_machine_while_it_trains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    params = builders.params()
    name = "system/system_memory_usage_percentage"

    def train(until: int) -> list[int]:
        """Steps of the machine's memory, once the run has shown at least `until` of them."""
        with live_tracking.live_run(params, builders.run_facts("train-0001")) as run:
            store = open_store(params)
            run.log_epoch(builders.epoch_row(1))
            deadline = time.monotonic() + 120
            steps: list[int] = []
            while len(steps) < until:
                assert time.monotonic() < deadline, steps
                time.sleep(0.1)
                known = known_runs().get(store.public_address, {}).get("train-0001")
                if known is not None:
                    steps = [m.step for m in store.client.get_metric_history(known, name)]
        return steps

    first = train(until=2)
    again = train(until=len(first) + 2)  # resumed after an interruption
    assert sorted(set(again)) == list(range(len(again)))
    assert capsys.readouterr().err == ""
    assert not [t for t in threading.enumerate() if t.name == "SystemMetricsMonitor"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_gets_what_the_database_gets(
    server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also after the address changed: everything is there, once."""
    local = builders.params(experiment="moved")
    mirror_all(local)
    remote = builders.params(uri=server, experiment="moved")
    first = mirror_all(remote)
    before = contents(open_store(remote))
    assert mirror_all(remote) == first
    assert contents(open_store(remote)) == before

    def without_ids(store: Store) -> list[Any]:
        volatile = ("mlflow.parentRunId", "sweep_run_id")
        runs = [
            (
                info,
                params,
                {k: v for k, v in tags.items() if k not in volatile},
                {k: h for k, h in history.items() if k.split("/")[0] in ("train", "valid")},
                files,
            )
            for info, params, tags, history, files in contents(store).values()
        ]
        return sorted(runs, key=lambda run: run[0])

    assert str(without_ids(open_store(remote))) == str(without_ids(open_store(local)))
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_runs_that_name_the_same_data_at_once(server: str) -> None:
    """MLflow looks for the data and then adds it: of several at once, all but one are refused."""
    store = Store(server, "same data")
    runs = [store.run(f"run {i}", title=f"run {i}", started=time.time()) for i in range(4)]
    facts = {"dataset": "digits", "source": "digits", "space": "binary", "data_shape": [1, 8, 8]}
    facts |= {"counts": {"train": 3, "valid": 2, "test": 1}}
    hashes = [f"{i:036d}" for i in range(10)]
    with ThreadPoolExecutor(len(runs)) as pool:
        for digest in hashes:
            list(pool.map(store.log_data, runs, [facts | {"hash": digest}] * len(runs)))
    for run in runs:
        named = store.client.get_run(run).inputs.dataset_inputs
        assert sorted(entry.dataset.digest for entry in named) == hashes
