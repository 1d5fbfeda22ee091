"""Registration on real stores: versions, aliases, repair; models are untrained but real."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.evaluate import score_split
from pipeline.register import TAKEN_BACK_TAG, Paths, Registry, is_stale, register
from pipeline.stage import UserError, load_meta, load_split
from pipeline.tracking import send
from tests.pipeline import builders
from tests.pipeline.servers import free_port
from vae.evidence import EvidenceSettings
from vae.models import load

NAME = "tightbound-blobs-grey8"
ROOT = Path(__file__).resolve().parents[3]


def registry(params: Any, name: str = NAME) -> Registry:
    return Registry(send.open_store(params), name)


def another_model(folder: Path, name: str, **changes: Any) -> Paths:
    """New outputs in the same places, as a changed parameter makes them."""
    for part in ("model", "train", "evaluate", "sweep"):
        shutil.rmtree(folder / part, ignore_errors=True)
    return builders.pipeline_outputs(folder, name=name, **changes)


def test_the_first_model_becomes_champion_and_loads(project: Path) -> None:
    params = builders.params()
    paths = builders.pipeline_outputs(project)
    result = register(params, paths)
    assert (result["model_name"], result["version"]) == (NAME, 1)
    assert (result["alias"], result["verdict"]) == ("champion", "champion")
    assert result["reasons"] == ["it is the first: there was no champion"]
    found = registry(params)
    version = found.versions()[0]
    assert found.alias("champion") == 1
    assert found.alias("challenger") is None
    weights = (paths.model / "weights.safetensors").read_bytes()
    assert version.tags["weights_hash"] == hashlib.sha256(weights).hexdigest()
    assert version.tags["bits_per_dim"] == "8.79"
    assert version.tags["measure"] == "grey8 1x4x4"
    assert version.run_id == result["run_id"]
    run = found.client.get_run(version.run_id)
    assert run.data.metrics["test/log_px"] == result["log_px"]
    assert run.data.metrics["shifted/inverted"] == 0.97
    register(params, paths)
    (data,) = found.client.get_run(version.run_id).inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("blobs", result["data_hash"][:36])
    assert json.loads(data.dataset.profile) == {"train": 100, "valid": 60, "test": 40}
    assert run.info.end_time == 1000 * (builders.STARTED + 100)
    folder = found.download(1, project / "download")
    x = torch.tensor(load_split(paths.prepared, "test").x)
    ours = score_split(load(folder), x, EvidenceSettings(num_samples=50, seed=0)).log_px
    stored = pd.read_parquet(paths.evaluate / "per_example.parquet")["log_px"]
    np.testing.assert_array_equal(ours, stored)


def test_the_version_carries_its_card(project: Path) -> None:
    params = builders.params()
    result = register(params, builders.pipeline_outputs(project))
    assert result["gate"] == {"passed": True, "standard_errors": 2.0, "most_bad_khat": 0.1}
    assert result["selfcheck"] == {"passed": True, "passed_checks": 0, "num_checks": 0}
    found = registry(params)
    page = found.client.get_model_version(NAME, "1").description
    meta = load_meta(project / "data")
    for words in (
        "**champion**: it is the first: there was no champion.",
        "± 1.25 nats (K = 50; error across 40 test examples; Monte-Carlo error 0.050)",
        "| ladder | K = 1: −100.00, K = 10: −98.50, K = 50: −97.50 |",
        "| observation model p(x\\|z) | discretized_logistic |",
        "| baseline | factor analysis: −120.00 nats; gain 22.5 ± 1.5 |",
        "| examples | training 100, validation 60, test 40 |",
        f"| content hash | {meta.hash} |",
        "▁▃▅▆█ validation ELBO over 5 epochs, −100.0 to −96.0 nats",
        "weak detector of out-of-distribution data",
        "inverted 0.97",
        f'mlflow.pyfunc.load_model("models:/{NAME}/1")',
    ):
        assert words in page, (words, page)
    tags = found.versions()[0].tags
    assert (tags["looks"], tags["gate"], tags["selfcheck"]) == ("1", "passed", "0 of 0 passed")


def test_register_json_is_stale_when_the_registry_says_otherwise(project: Path) -> None:
    params = builders.params()
    paths = builders.pipeline_outputs(project, name="train-poor", start_at_mean=False)
    old = register(params, paths)
    assert not is_stale(old, register(params, paths, ensure=True))
    another_model(project, "train-good")
    register(params, paths)
    another_model(project, "train-poor", start_at_mean=False)  # as DVC's run-cache restores it
    assert is_stale(old, register(params, paths, ensure=True))


def test_the_same_weights_make_no_second_version(project: Path) -> None:
    params = builders.params()
    paths = builders.pipeline_outputs(project)
    first = register(params, paths)
    again = register(params, paths)
    assert again | {"reasons": first["reasons"]} == first
    assert again["reasons"] == ["it is the first: there was no champion"]
    assert len(registry(params).versions()) == 1
    assert len(registry(params).history()) == 1


def test_a_better_model_takes_over_by_its_paired_gain_and_a_worse_does_not(project: Path) -> None:
    params = builders.params()
    paths = builders.pipeline_outputs(project, name="train-poor", start_at_mean=False)
    register(params, paths)
    before = pd.read_parquet(paths.evaluate / "per_example.parquet").set_index("id")["log_px"]
    another_model(project, "train-good")
    result = register(params, paths)
    after = pd.read_parquet(paths.evaluate / "per_example.parquet").set_index("id")["log_px"]
    gains = after - before
    assert result["gain"] == pytest.approx(gains.mean(), rel=1e-12)
    assert result["gain_se"] == pytest.approx(gains.sem(), rel=1e-12)
    assert result["gain"] > 2 * result["gain_se"]
    assert (result["version"], result["alias"], result["looks"]) == (2, "champion", 2)
    assert result["compared_with"] == 1
    another_model(project, "train-poor-2", start_at_mean=False, seed=1)
    worse = register(params, paths)
    assert (worse["version"], worse["alias"], worse["verdict"]) == (3, "challenger", "challenger")
    assert worse["gain"] < 0
    found = registry(params)
    assert (found.alias("champion"), found.alias("challenger")) == (2, 3)
    assert [entry["version"] for entry in found.history()] == [1, 2]


def test_earlier_outputs_find_their_version_again(project: Path) -> None:
    """DVC restores a stage's outputs without running it; `--ensure` follows."""
    params = builders.params()
    paths = builders.pipeline_outputs(project, name="train-poor", start_at_mean=False)
    register(params, paths)
    another_model(project, "train-good")
    register(params, paths)
    another_model(project, "train-poor", start_at_mean=False)
    result = register(params, paths, ensure=True)
    assert (result["version"], result["alias"]) == (1, "challenger")
    found = registry(params)
    assert (found.alias("champion"), found.alias("challenger")) == (2, 1)
    assert len(found.versions()) == 2


def test_the_champion_is_scored_again_with_another_number_of_samples(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = builders.params()
    paths = builders.pipeline_outputs(project, name="train-poor", start_at_mean=False)
    register(params, paths)
    champion = load(paths.model)
    another_model(project, "train-good", num_samples=70)
    result = register(params, paths)
    assert "scores champion version 1" in capsys.readouterr().out
    x = torch.tensor(load_split(paths.prepared, "test").x)
    old = score_split(champion, x, EvidenceSettings(num_samples=70, seed=0)).log_px
    new = score_split(load(paths.model), x, EvidenceSettings(num_samples=70, seed=0)).log_px
    assert result["gain"] == pytest.approx((new - old).mean(), rel=1e-12)
    register(params, paths)
    another_model(project, "train-third", num_samples=70, seed=5, start_at_mean=False)
    register(params, paths)
    assert "scores champion" not in capsys.readouterr().out


def test_on_changed_data_the_champion_is_compared_without_what_it_saw(project: Path) -> None:
    params = builders.params()
    paths = builders.pipeline_outputs(project, name="train-poor", start_at_mean=False)
    register(params, paths)
    champion = load(paths.model)
    train, valid = (load_split(paths.prepared, name).x for name in ("train", "valid"))
    shutil.rmtree(paths.prepared)
    seen = np.concatenate([train[90:], valid[:5]])  # under other ids and in another order now
    builders.prepared_data(paths.prepared, seed=1, more_test=seen)
    another_model(project, "train-good")
    result = register(params, paths)
    x = torch.tensor(load_split(paths.prepared, "test").x)
    new = score_split(load(paths.model), x, EvidenceSettings(num_samples=50, seed=0)).log_px
    old = score_split(champion, x, EvidenceSettings(num_samples=50, seed=0)).log_px
    assert (result["num_pairs"], result["num_left_out"]) == (40, 15)
    assert result["gain"] == pytest.approx((new - old)[15:].mean(), rel=1e-12)
    assert "(40 pairs, without 15 that it was trained or selected on)" in result["reasons"][0]
    assert result["looks"] == 1


def test_another_measure_is_not_comparable(project: Path) -> None:
    params = builders.params()
    paths = builders.pipeline_outputs(project, name="train-poor", start_at_mean=False)
    register(params, paths)
    registry(params).tag(1, {"measure": "grey8 1x8x8"})
    another_model(project, "train-good")
    result = register(params, paths)
    assert (result["alias"], result["verdict"]) == ("challenger", "not comparable")
    assert "it models grey8 1x8x8, this one grey8 1x4x4" in result["reasons"][0]


def test_untrustworthy_weights_forbid_the_alias(project: Path) -> None:
    params = builders.params()
    result = register(params, builders.pipeline_outputs(project, khat_bad_fraction=0.2))
    assert result["alias"] == "challenger"
    assert registry(params).alias("champion") is None


def test_an_experiment_is_challenger_only(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = builders.pipeline_outputs(project)
    monkeypatch.setenv("DVC_EXP_NAME", "drawn-mink")
    result = register(builders.params(), paths)
    assert result["alias"] == "challenger"
    assert "experiment drawn-mink" in result["reasons"][0]
    assert register(builders.params(promote=True), paths)["alias"] == "champion"


def test_promotion_and_rollback_by_hand_outlast_the_gate(project: Path) -> None:
    params = builders.params()
    paths = builders.pipeline_outputs(project, name="train-poor", start_at_mean=False)
    register(params, paths)
    another_model(project, "train-good")
    register(params, paths)
    found = registry(params)
    assert found.rollback() == 1
    assert found.alias("champion") == 1
    result = register(params, paths, ensure=True)
    assert (result["alias"], result["gain"] > 2 * result["gain_se"]) == ("challenger", True)
    assert "rolled back by hand" in result["reasons"][0]
    with pytest.raises(UserError, match="no earlier champion"):
        found.rollback()
    assert found.promote(2)
    assert not found.promote(2)
    assert found.alias("champion") == 2
    assert TAKEN_BACK_TAG not in found.versions()[1].tags
    assert found.rollback() == 1
    asked = register(builders.params(promote=True), paths)
    assert asked["alias"] == "champion"
    assert [entry["version"] for entry in found.history()] == [1, 2, 1, 2, 1, 2]
    with pytest.raises(UserError, match="has no version 7; there are: 1, 2"):
        found.promote(7)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_make_promote_and_make_rollback_move_the_alias_on_the_record(project: Path) -> None:
    params = builders.params()
    shutil.copy(ROOT / "params.yaml", project)
    paths = builders.pipeline_outputs(project, name="train-poor", start_at_mean=False)
    register(params, paths)
    another_model(project, "train-good")
    builders.write_json(project / "reports" / "register.json", register(params, paths))

    def make(*words: str) -> tuple[int, str]:
        installed = ["-o", ".venv/.installed"]  # this very environment
        done = subprocess.run(
            ["make", "-f", str(ROOT / "Makefile"), *installed, *words],
            cwd=project,
            env=os.environ
            | {
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
            },
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    found = registry(params)
    assert make("rollback") == (0, f"champion   of {NAME} is version 1 again\n")
    assert found.alias("champion") == 1
    code, told = make("rollback")
    assert (code, f"error: {NAME} has no earlier champion to go back to" in told) == (2, True)
    assert make("promote", "VERSION=2") == (0, f"champion   of {NAME} is version 2, by hand\n")
    assert found.alias("champion") == 2
    for words, sentence in (
        (["VERSION=7"], f"error: {NAME} has no version 7; there are: 1, 2"),
        (["VERSION=best"], "invalid int value: 'best'"),
        ([], "which one? make promote VERSION=3"),
    ):
        code, told = make("promote", *words)
        assert (code, sentence in told, "Traceback" in told) == (2, True, False), told
    record = [(entry["version"], entry["by"]) for entry in found.history()]
    assert record[1][1].startswith("+")  # the gate's own reason
    assert [record[0][0], *record[2:]] == [1, (1, "rollback"), (2, "promoted by hand")]
    tags = {version.number: version.tags for version in found.versions()}
    assert tags[1][TAKEN_BACK_TAG].startswith("replaced by version 2 by hand on ")
    assert TAKEN_BACK_TAG not in tags[2]


def test_lost_files_of_a_version_come_back(project: Path) -> None:
    params = builders.params()
    paths = builders.pipeline_outputs(project)
    register(params, paths)
    shutil.rmtree("mlartifacts")
    register(params, paths, ensure=True)
    folder = registry(params).download(1, project / "download")
    weights = (folder / "weights.safetensors").read_bytes()
    assert weights == (paths.model / "weights.safetensors").read_bytes()
    assert len(registry(params).versions()) == 1


def test_a_failed_selfcheck_or_changed_weights_register_nothing(project: Path) -> None:
    params = builders.params()
    paths = builders.pipeline_outputs(project)
    builders.write_json(paths.selfcheck, {"passed": False})
    with pytest.raises(UserError, match="disagree with exact answers"):
        register(params, paths)
    builders.write_json(paths.selfcheck, {"passed": True})
    with (paths.model / "weights.safetensors").open("ab") as weights:
        weights.write(b"x")
    with pytest.raises(UserError, match=r"weights\.safetensors is not what config\.json says"):
        register(params, paths)


def test_a_registry_that_is_down_is_said_in_a_sentence(project: Path) -> None:
    params = builders.params(uri=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match=r"does not answer .connection refused.; start it"):
        register(params, builders.pipeline_outputs(project))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["a new database", "server"])
def test_two_pipelines_register_at_once(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Two projects with the same data, one store: both models are versions, one is champion."""
    shared = f"sqlite:///{tmp_path}/shared/mlflow.db"
    address = request.getfixturevalue("server") if kind == "server" else shared
    started = [
        start_register(builders.pipeline_outputs(tmp_path / name, name=name, seed=seed), address)
        for seed, name in enumerate(("one", "two"))
    ]
    for process in started:
        said = process.communicate(timeout=800)[0]
        assert process.returncode == 0, said
        assert "Traceback" not in said
        assert "warning" not in said
    found = registry(builders.params(uri=address))
    hashes = {
        hashlib.sha256((tmp_path / name / "model/weights.safetensors").read_bytes()).hexdigest()
        for name in ("one", "two")
    }
    versions = found.versions()
    assert sorted(version.number for version in versions) == [1, 2]
    assert {version.tags["weights_hash"] for version in versions} == hashes
    assert found.alias("champion") in (1, 2)
    for version in versions:
        history = found.client.get_metric_history(version.run_id, "valid/elbo")
        assert len(history) == builders.EPOCHS


def start_register(paths: Paths, address: str) -> subprocess.Popen[str]:
    """The register stage at work in the folder that holds `paths`."""
    folder = paths.model.parent
    shutil.copy(ROOT / "params.yaml", folder)
    arguments = [f"--{name}={path}" for name, path in vars(paths).items()]
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.register", *arguments, f"--register={folder}/out.json"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ensure_repairs_a_deleted_database_and_a_changed_address(
    project: Path, server: str
) -> None:
    """Through the command line, in processes of its own, as `make run` calls it."""
    shutil.copy(ROOT / "params.yaml", project / "params.yaml")
    (project / "dvc.lock").write_text("locked: true\n")
    paths = builders.pipeline_outputs(project)
    out = project / "register.json"
    arguments = [f"--{name}={path}" for name, path in vars(paths).items()]
    page = project / "page.html"
    page.write_text("the page")
    arguments += [f"--register={out}", f"--report={page}"]

    def call(*more: str, **environment: str) -> str:
        command = [sys.executable, "-m", "pipeline.register"]
        done = subprocess.run(
            [*command, *arguments, *more],
            env=os.environ | {"PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    assert "version 1: champion; it is the first: there was no champion" in call()
    written = out.read_text()
    (project / "mlflow.db").unlink()
    assert "version 1: champion; it is the first: there was no champion" in call("--ensure")
    assert "version 1: champion; it is the first: there was no champion" in call("--ensure")
    assert out.read_text() == written
    params = builders.params()
    version = registry(params).versions()[0]
    sent = {file.path for file in registry(params).store.client.list_artifacts(version.run_id)}
    assert {"page.html", "evaluate"} <= sent
    assert version.tags["dvc_lock"] == hashlib.sha256(b"locked: true\n").hexdigest()
    call("--ensure", MLFLOW_TRACKING_URI=server)
    remote = registry(builders.params(uri=server))
    assert remote.alias("champion") == 1
    folder = remote.download(1, project / "download")
    assert json.loads((folder / "config.json").read_text())["model"]["latent_dim"] == 2
    run = remote.client.get_run(remote.versions()[0].run_id)
    assert run.data.params["model.latent_dim"] == "2"
    assert len(remote.client.get_metric_history(run.info.run_id, "valid/elbo")) == builders.EPOCHS


@pytest.mark.slow
def test_the_first_champion_set_by_two_at_once(server: str) -> None:
    """MLflow looks for the alias and then inserts it, so that one of the two may fail."""
    params = builders.params(uri=server)
    together = threading.Barrier(2)

    def champion(number: int, name: str) -> None:
        found = registry(params, name)
        set_alias = found.client.set_registered_model_alias

        def beside_the_other(*arguments: str) -> None:
            with suppress(threading.BrokenBarrierError):
                together.wait(1)
            set_alias(*arguments)

        found.client.set_registered_model_alias = beside_the_other
        found.set_champion(number, "the gate")

    with ThreadPoolExecutor(2) as pool:
        for attempt in range(12):
            name = f"race-{attempt}"
            found = registry(params, name)
            found.client.create_registered_model(name)
            for _ in range(2):
                found.client.create_model_version(name, "s3://none/model")
            together.reset()
            list(pool.map(champion, (1, 2), (name, name)))
            assert found.alias("champion") in (1, 2)
            assert found.history()[-1]["version"] in (1, 2)
