"""`dvc repro` from nothing to a registered champion, and what each change then reruns."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest

from pipeline.stage import load_split
from tests.end_to_end.conftest import LONGEST_SECONDS, Project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * LONGEST_SECONDS)]

STAGES = ["prepare", "selfcheck", "sweep", "train", "evaluate", "register", "report"]
NAME = "tightbound-mnist5k-grey8"
MOST_LINES = 120

# Beginnings of the lines that our stages and DVC write.
OURS = ("prepare ", "selfcheck", "sweep ", "train ", "evaluate ", "register ", "report ")
DVCS = (
    "Running stage '",
    "> python -m pipeline.",
    "Generating lock file 'dvc.lock'",
    "Updating lock file 'dvc.lock'",
    "To track the changes with git, run:",
    "To enable auto staging, run:",
    "Use `dvc push` to send your updates to remote storage.",
    "\tgit add dvc.lock",
    "\tdvc config core.autostage true",
)
FOREIGN = ("Warning", "WARNING", "INFO", "Traceback")

REGISTRY = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1], sys.argv[1])
model = client.get_registered_model(sys.argv[2])
versions = client.search_model_versions(f"name='{model.name}'")
print(json.dumps({
    "aliases": {alias: int(number) for alias, number in model.aliases.items()},
    "weights": {int(version.version): version.tags["weights_hash"] for version in versions},
}))
"""
SCORE = """
import sys
import mlflow, numpy
model = mlflow.pyfunc.load_model(sys.argv[1])
print(model.predict(numpy.load(sys.argv[2])).to_json(orient="records"))
"""


def ran(output: str) -> list[str]:
    """The stages that DVC ran."""
    return re.findall(r"Running stage '(\w+)'", output)


def read(project: Project, path: str) -> Any:
    return json.loads((project.folder / "reports" / path).read_text())


def database(project: Project, name: str = "mlflow.db") -> str:
    return f"sqlite:///{project.folder / name}"


def registry(project: Project, address: str | None = None) -> dict[str, Any]:
    """Aliases, and each version's weights, as another process finds them in the registry."""
    output = project.run(sys.executable, "-c", REGISTRY, address or database(project), NAME)
    content = json.loads(output.splitlines()[-1])
    return content | {"weights": {int(k): v for k, v in content["weights"].items()}}


def weights_hash(project: Project) -> str:
    config = json.loads((project.folder / "models" / "vae" / "config.json").read_text())
    return config["weights_sha256"]


def score(project: Project, folder: Path, address: str | None = None) -> dict[str, float]:
    """The champion's answer for the first test image, far from the project's code."""
    np.save(folder / "image.npy", first_test_image(project))
    far = Project(folder)
    output = far.run(
        *(sys.executable, "-c", SCORE, f"models:/{NAME}@champion", "image.npy"),
        MLFLOW_TRACKING_URI=address or database(project),
    )
    (answer,) = json.loads(output.splitlines()[-1])
    return answer


def first_test_image(project: Project) -> np.ndarray:
    return load_split(project.folder / "data" / "prepared", "test").x[:1].astype(np.float32)


@dataclass(frozen=True)
class FirstRun:
    """The first `dvc repro` of a project: what it printed, what git saw, and all that it left."""

    project: Project
    output: str
    git_status: str
    saved: Path


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> FirstRun:
    project = Project.create(tmp_path_factory.mktemp("project"))
    output = project.run("dvc", "repro")
    git_status = project.git("status", "--short")
    project.commit("first run")
    saved = tmp_path_factory.mktemp("saved") / "project"
    shutil.copytree(project.folder, saved)
    return FirstRun(project, output, git_status, saved)


@pytest.fixture
def project(first_run: FirstRun) -> Project:
    """The project as the first run left it, in the same place: stores hold absolute paths."""
    shutil.rmtree(first_run.project.folder)
    shutil.copytree(first_run.saved, first_run.project.folder)
    return first_run.project


def test_the_first_run_ends_with_a_champion(first_run: FirstRun, project: Project):
    assert ran(first_run.output) == STAGES
    assert first_run.git_status == "?? dvc.lock\n"
    result = read(project, "register.json")
    assert (result["verdict"], result["version"]) == ("champion", 1)
    assert registry(project) == {
        "aliases": {"champion": 1},
        "weights": {1: weights_hash(project)},
    }
    assert (project.folder / "reports" / "report.html").stat().st_size > 100_000
    assert list(project.folder.rglob(".tmp-*")) == []


def test_the_terminal_tells_our_story_and_nothing_else(first_run: FirstRun):
    lines = [line for line in first_run.output.splitlines() if line]
    assert len(first_run.output.splitlines()) < MOST_LINES
    assert [line for line in lines if not line.startswith(OURS + DVCS)] == []
    assert [line for line in lines if any(word in line for word in FOREIGN)] == []
    assert sum(line.startswith("train      epoch") for line in lines) == 4
    trials = [line for line in lines if line.startswith("sweep      trial ")]
    assert [line.split()[2] for line in trials] == ["1/4", "2/4", "3/4", "4/4"]
    assert all("bits/dim" in line for line in trials)


def test_the_champion_scores_an_image(project: Project, tmp_path: Path):
    answer = score(project, tmp_path)
    table = pd.read_parquet(project.folder / "reports" / "evaluate" / "per_example.parquet")
    expected, se = table.loc[0, ["log_px", "se"]].astype(float)
    # Another proposal and number of samples: both are lower bounds in expectation.
    assert answer["log_px"] == pytest.approx(expected, abs=10 * se + 5 * answer["se"] + 2)
    assert answer["bits_per_dim"] == pytest.approx(-answer["log_px"] / (784 * np.log(2)))


def test_dvc_shows_the_evidence_and_finds_nothing_to_do(project: Project):
    assert project.run("dvc", "status").strip() == "Data and pipelines are up to date."
    shown = json.loads(project.run("dvc", "metrics", "show", "--json"))
    (files,) = (revision["data"] for revision in shown.values())
    evidence = files["reports/evaluate/metrics.json"]["data"]
    assert evidence == read(project, "evaluate/metrics.json")
    assert evidence["log_px"] < 0 < evidence["bits_per_dim"]
    assert evidence["baseline"]["gain"] > 4 * evidence["baseline"]["gain_se"]
    again = project.run("dvc", "repro")
    assert ran(again) == []
    assert again.count("didn't change, skipping") == len(STAGES)
    assert project.git("status", "--short") == ""


def test_more_importance_samples_rerun_the_evaluation_and_what_follows(project: Project):
    project.change({"evaluate.num_importance_samples": 60})
    assert ran(project.run("dvc", "repro")) == ["evaluate", "register", "report"]
    assert read(project, "evaluate/metrics.json")["num_samples"] == 60
    assert list(registry(project)["weights"]) == [1]


def test_a_biased_estimator_stops_the_pipeline(project: Project):
    """Editing the model's code reruns what uses it; the self-check is the first to do so."""
    evidence = project.folder / "vae" / "evidence.py"
    honest = evidence.read_text()
    evidence.write_text(honest + BIAS)
    status = json.loads(project.run("dvc", "status", "--json"))
    assert set(status) == {"selfcheck", "sweep", "evaluate"}
    before = (project.folder / "reports" / "report.html").read_bytes()
    output = project.run("dvc", "repro", expect=255)
    assert ran(output) == ["selfcheck"]
    assert "exited with 1" in output
    assert "Traceback" not in output
    assert re.search(r"error: \d+ of \d+ self-checks failed", output)
    assert (project.folder / "reports" / "report.html").read_bytes() == before
    evidence.write_text(honest)
    assert ran(project.run("dvc", "repro")) == []


BIAS = """
_honest = importance_sampling


def importance_sampling(*arguments, **options):
    from dataclasses import replace

    evidence = _honest(*arguments, **options)
    return replace(evidence, log_px=evidence.log_px + 0.5)
"""


def test_a_misspelt_key_is_told_in_a_sentence(project: Project):
    """DVC clears a stage's outputs before it runs; mended, they come back and nothing runs."""
    weights = weights_hash(project)
    params = project.folder / "params.yaml"
    right = params.read_text()
    params.write_text(right.replace("  patience:", "  patence:"))
    fault = "training.patence: there is no such key; did you mean training.patience?"
    output = project.run(sys.executable, "-m", "pipeline.params", expect=1)
    assert output.startswith("error: params.yaml has 2 faults:\n")
    assert fault in output
    assert weights_hash(project) == weights
    output = project.run("dvc", "repro", expect=255)
    assert fault in output
    assert "Traceback" not in output
    params.write_text(right)
    assert ran(project.run("dvc", "repro")) == []
    assert weights_hash(project) == weights


def test_a_pinned_axis_is_not_swept_and_the_way_back_runs_nothing(project: Project):
    chosen = read(project, "sweep/best.json")["model"]["latent_dim"]
    other = {2: 4, 4: 2}[chosen]
    output = project.run("dvc", "exp", "run", "-S", f"model.latent_dim={other}")
    assert ran(output) == ["sweep", "train", "evaluate", "register", "report"]
    trials = pd.read_csv(project.folder / "reports" / "sweep" / "trials.csv")
    assert trials["latent_dim"].tolist() == [other, other]
    assert sorted(trials["likelihood"]) == ["continuous_bernoulli", "discretized_logistic"]
    result = read(project, "register.json")
    assert (result["version"], result["alias"], result["champion"]) == (2, "challenger", 1)
    pinned = weights_hash(project)

    project.git("checkout", "-q", "--", "params.yaml")
    back = project.run("dvc", "repro")
    assert ran(back) == []
    first = weights_hash(project)
    assert first != pinned
    told = project.run(sys.executable, "-m", "pipeline.register", "--ensure")
    assert f"{NAME} version 1: champion" in told
    assert registry(project)["weights"] == {1: first, 2: pinned}
    assert registry(project)["aliases"]["champion"] == 1
    assert project.run("dvc", "status").strip() == "Data and pipelines are up to date."


@pytest.fixture
def stopped_worker(project: Project) -> Iterator[None]:
    """Ends a queue worker that a failed test leaves."""
    yield
    for process in queue_workers(project):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def queue_workers(project: Project) -> list[psutil.Process]:
    """DVC's queue workers of this project; they end by themselves when the queue is empty."""
    found = []
    for file in (project.folder / ".dvc" / "tmp" / "exps" / "celery").glob("*.pid"):
        with suppress(psutil.NoSuchProcess, ValueError):
            found.append(psutil.Process(int(file.read_text())))
    return found


def in_a_temporary_copy(project: Project) -> str:
    better = ("-S", f"training.epochs={BETTER_EPOCHS}")
    return project.run("dvc", "exp", "run", "--temp", "-n", "apart", *better)


def by_the_queue(project: Project) -> str:
    better = ("-S", f"training.epochs={BETTER_EPOCHS}")
    project.run("dvc", "exp", "run", "--queue", "-n", "apart", *better)
    project.run("dvc", "queue", "start")
    deadline = time.monotonic() + LONGEST_SECONDS
    while not re.search("Success|Failed", project.run("dvc", "queue", "status")):
        assert time.monotonic() < deadline, "the queue is still at work"
        time.sleep(2)
    output = project.run("dvc", "queue", "logs", "apart")
    psutil.wait_procs(queue_workers(project), timeout=LONGEST_SECONDS)
    return output


BETTER_EPOCHS = 12


@pytest.mark.usefixtures("stopped_worker")
@pytest.mark.parametrize("how", [in_a_temporary_copy, by_the_queue])
def test_an_experiment_apart_registers_in_the_projects_own_store(project: Project, how: Any):
    """Significantly better than the champion, and still a challenger only."""
    champion = weights_hash(project)
    output = how(project)
    assert ran(output) == ["train", "evaluate", "register", "report"]
    assert "experiment apart registers as challenger only" in output
    assert "Traceback" not in output
    found = registry(project)
    assert found["aliases"] == {"champion": 1, "challenger": 2}
    assert found["weights"][1] == champion == weights_hash(project)
    assert read(project, "register.json")["version"] == 1
    project.run("dvc", "exp", "apply", "apart")
    result = read(project, "register.json")
    assert result["weights_hash"] == weights_hash(project) == found["weights"][2]
    assert result["tracking_uri"] == database(project)
    assert result["gain"] > 2 * result["gain_se"]
    assert result["champion"] == 1
    stray = [path for path in project.folder.rglob("mlflow.db") if path.parent != project.folder]
    assert stray == []


@pytest.mark.parametrize("loss", ["database and artifacts", "another address"])
def test_ensure_brings_the_registry_back(project: Project, tmp_path: Path, loss: str):
    before = read(project, "register.json")
    address = database(project)
    if loss == "another address":
        address = database(project, "elsewhere.db")
    else:
        (project.folder / "mlflow.db").unlink()
        shutil.rmtree(project.folder / "mlartifacts")
    command = (sys.executable, "-m", "pipeline.register", "--ensure")
    told = project.run(*command, MLFLOW_TRACKING_URI=address)
    assert [line.startswith("register   ") for line in told.splitlines()] == [True, True]
    assert f"register   {NAME} version 1: champion; " in told
    weights = {1: weights_hash(project)}
    assert registry(project, address) == {"aliases": {"champion": 1}, "weights": weights}
    assert score(project, tmp_path, address)["log_px"] < 0
    after = read(project, "register.json")
    assert after["run_id"] != before["run_id"]
    assert after["tracking_uri"] == address
    page = (project.folder / "reports" / "report.html").read_text()
    assert after["run_id"] in page
    assert before["run_id"] not in page
    assert project.run("dvc", "status").strip() == "Data and pipelines are up to date."
    again = project.run(*command, MLFLOW_TRACKING_URI=address)
    assert len(again.splitlines()) == 1
