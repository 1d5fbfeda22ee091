"""dvc.yaml: what a change reruns, asked of DVC itself; no stage runs here."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
ORDER = ["prepare", "selfcheck", "sweep", "train", "evaluate", "register", "report"]

# What carries values and files from here to there, and decides no result.
CARRIERS = tuple(f"pipeline/{name}/" for name in ("params", "cluster", "tracking", "stage"))
CARRIERS += ("pipeline/__init__.py", "vae/system/", "vae/__init__.py", "vae/checks.py")
# What is imported by what a stage imports, and decides nothing of what the stage writes. A picture
# of the sweep is no reason to train again; register reads what train and evaluate made.
UNUSED = {
    "prepare": ("pipeline/figures/", "vae/trust.py"),
    "sweep": ("pipeline/figures/",),
    "train": ("pipeline/figures/", "vae/evidence/", "vae/trust.py"),
    "register": ("pipeline/figures/", "pipeline/evaluate/", "pipeline/report/", "vae/"),
    "report": ("vae/",),
}


def local_imports(path: Path) -> set[Path]:
    """The project's own modules that a file imports, anywhere in it."""
    names: list[str] = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    paths = {Path(*name.split(".")).with_suffix(".py") for name in names}
    paths |= {Path(*name.split("."), "__init__.py") for name in names if "." in name}
    # through a face: the module that the name comes from
    for face in [path for path in paths if path.name == "__init__.py" and (ROOT / path).exists()]:
        tree = ast.parse((ROOT / face).read_text())
        lazy = [node for node in tree.body if isinstance(node, ast.If)]
        lines = [
            x for node in lazy for x in node.body if isinstance(x, ast.ImportFrom) and x.module
        ]
        wanted = {name.rpartition(".")[2] for name in names}
        for line in lines:
            if any(alias.name in wanted for alias in line.names):
                paths.add(Path(*str(line.module).split(".")).with_suffix(".py"))
    return {
        path for path in paths if path.parts[0] in ("vae", "pipeline") and (ROOT / path).exists()
    }


def closure(path: Path) -> set[Path]:
    """A file and all of the project that it imports, directly or not, but through no carrier."""
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            if not str(current).startswith(CARRIERS):
                waiting += local_imports(current)
    return found


def code_deps(stage: str) -> list[Path]:
    deps = STAGES[stage]["deps"]
    return [Path(dep) for dep in deps if dep.startswith(("pipeline/", "vae"))]


def main_of(stage: str) -> Path:
    package = Path("pipeline") / stage / "__main__.py"
    return package if (ROOT / package).exists() else Path("pipeline") / f"{stage}.py"


def test_the_stages_and_their_order():
    assert list(STAGES) == ORDER


def test_few_lines_name_code():
    assert sum(len(code_deps(stage)) for stage in STAGES) <= 30


@pytest.mark.parametrize("stage", ORDER)
def test_a_stage_depends_on_its_own_code_and_on_what_exists(stage: str):
    deps = code_deps(stage)
    assert any(main_of(stage).is_relative_to(dep) for dep in deps)
    assert [dep for dep in deps if not (ROOT / dep).exists()] == []


@pytest.mark.parametrize("stage", ORDER)
def test_all_that_a_stage_imports_is_a_dependency_or_decides_no_result(stage: str):
    """New code must lie in a folder that dvc.yaml names, or here with its reason."""
    unnamed = [
        str(path)
        for path in closure(main_of(stage))
        if not any(path.is_relative_to(dep) for dep in code_deps(stage))
        and not str(path).startswith((*CARRIERS, *UNUSED.get(stage, ())))
    ]
    assert unnamed == []


@pytest.mark.parametrize("stage", ORDER)
def test_every_output_and_input_is_passed_as_a_flag(stage: str):
    words = shlex.split(STAGES[stage]["cmd"])
    assert words[:3] == ["python", "-m", f"pipeline.{stage}"]
    assert all(word.startswith("--") for word in words[3::2])
    passed = [Path(word) for word in words[4::2]]
    named = [*STAGES[stage]["outs"], *STAGES[stage]["deps"]]
    data = [Path(path) for path in named if path.startswith(("data/", "models/", "reports/"))]
    assert [path for path in data if not any(path.is_relative_to(flag) for flag in passed)] == []


@contextmanager
def opened(folder: Path) -> Iterator[Any]:
    """DVC's repository in `folder`, which is the current one meanwhile."""
    from dvc.repo import Repo

    with chdir(folder), Repo(str(folder)) as repo:
        yield repo


def stale_stages(folder: Path) -> set[str]:
    with opened(folder) as repo:
        return set(repo.status())


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project whose stages all count as done, with made-up outputs."""
    from dvc.repo import Repo

    folder = tmp_path_factory.mktemp("project")
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, folder)
    for name in ("vae", "pipeline"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "data" / "own", folder / "data" / "own")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["data"]["root"] = "data/own"
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    for stage in STAGES.values():
        for path in [folder / path for path in [*stage["outs"], *stage["deps"]] if "$" not in path]:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.suffix:
                path.mkdir(exist_ok=True)
                (path / "made_up").write_text(path.name)
            elif not path.exists():
                path.write_text(path.name)
    with chdir(folder):
        Repo.init(no_scm=True).close()
    with opened(folder) as repo:
        repo.commit(force=True)
    return folder


@pytest.fixture
def stale(committed: Path) -> Callable[[Path, Callable[[str], str]], set[str]]:
    """Stages that DVC would run after a file's text is changed; the file is put back."""

    def ask(path: Path, change: Callable[[str], str]) -> set[str]:
        file = committed / path
        before = file.read_text()
        assert change(before) != before
        file.write_text(change(before))
        try:
            return stale_stages(committed)
        finally:
            file.write_text(before)

    return ask


def test_nothing_changed_nothing_to_do(committed: Path):
    assert stale_stages(committed) == set()


@pytest.mark.parametrize(
    ("knob", "values", "stages"),
    [
        ("data.seed", (0, 1), {"prepare"}),
        ("model.prior", ("normal", "vamp"), {"sweep"}),
        ("objective.beta", (1.0, 2.0), {"sweep"}),
        ("sweep.epochs", (20, 30), {"sweep"}),
        ("training.epochs", (50, 100), {"train"}),
        ("training.patience", (15, None), {"train"}),
        ("training.optimizer", ("adam", "muon"), {"sweep", "train"}),
        ("training.learning_rate", (1e-3, 2e-3), {"sweep", "train"}),
        ("scaling.num_workers", (2, 4), set()),
        ("evaluate.num_importance_samples", (1000, 5000), {"evaluate"}),
        ("evaluate.target_se", (None, 0.1), {"evaluate"}),
        ("evaluate.proposal", ("encoder", "refined"), {"evaluate"}),
        ("register.promote", (None, True), {"register"}),
        ("tracking.experiment", ("tightbound", "other"), set()),
    ],
)
def test_a_changed_knob_reruns_the_stages_that_read_it(
    knob: str,
    values: tuple[Any, Any],
    stages: set[str],
    stale: Callable[[Path, Callable[[str], str]], set[str]],
):
    section, key = knob.split(".")

    def change(text: str) -> str:
        content = yaml.safe_load(text)
        one, other = values
        content[section][key] = one if content[section][key] != one else other
        return yaml.safe_dump(content)

    assert stale(Path("params.yaml"), change) == stages


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("data/own/README.md", {"prepare"}),
        ("pipeline/prepare/sources/table.py", {"prepare"}),
        ("pipeline/stage/files.py", set()),
        ("pipeline/tracking/mirror.py", set()),
        ("vae/models/likelihoods.py", {"selfcheck", "sweep", "train", "evaluate"}),
        ("vae/training/trainer.py", {"selfcheck", "sweep", "train", "evaluate"}),
        ("vae/evidence/estimators.py", {"selfcheck", "sweep", "evaluate"}),
        ("pipeline/train/worker.py", {"sweep", "train"}),
        ("pipeline/register/gate.py", {"register"}),
        ("pipeline/report/hover.js", {"report"}),
        ("pipeline/report/template.html", {"report"}),
    ],
)
def test_a_changed_file_reruns_the_stages_that_use_it(
    file: str, stages: set[str], stale: Callable[[Path, Callable[[str], str]], set[str]]
):
    assert stale(Path(file), lambda text: text + "\n") == stages


def test_a_file_added_under_data_root_prepares_again(committed: Path):
    extra = committed / "data" / "own" / "more.png"
    extra.write_bytes(b"picture")
    try:
        assert stale_stages(committed) == {"prepare"}
    finally:
        extra.unlink()


@pytest.mark.parametrize("name", [".gate.py.swp", "notes.md", "gate.py~", "__pycache__/gate.pyc"])
def test_what_an_editor_and_python_leave_reruns_nothing(committed: Path, name: str):
    extra = committed / "pipeline" / "register" / name
    extra.parent.mkdir(exist_ok=True)
    extra.write_text("left")
    try:
        assert stale_stages(committed) == set()
    finally:
        extra.unlink()


@pytest.mark.parametrize("folder", ["data", "data/own", "models/vae", "reports", "reports/train"])
def test_what_a_kill_leaves_half_written_reruns_nothing(committed: Path, folder: str):
    rest = committed / folder / ".tmp-metrics.json-x7k2"
    rest.write_text("half")
    try:
        assert stale_stages(committed) == set()
    finally:
        rest.unlink()


def test_the_page_of_dvc_plots_needs_no_network():
    config = ConfigParser()
    config.read(ROOT / ".dvc" / "config")
    page = (ROOT / ".dvc" / config["plots"]["html_template"]).read_text()
    assert page.count("{plot_divs}") == 1
    assert page.count("{refresh_tag}") == 1
    assert "{scripts}" not in page  # where DVC puts its links to a content network
    for library in ("vega", "vega-lite", "vega-embed"):
        assert re.search(rf"<script>/\* {library} \d", page)
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "src=" not in markup
    assert "href=" not in markup
