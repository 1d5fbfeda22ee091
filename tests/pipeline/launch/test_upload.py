"""What a submitted job gets of the working tree, and what would be lost on the way."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from pipeline.launch import (
    Tree,
    check_nothing_is_lost,
    decode_lock,
    encode_lock,
    environment_fault,
    forwarded,
    remote_name,
    run_dvc,
)
from pipeline.params import Params, load_params
from pipeline.stage import UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with DVC's configuration and one output that DVC holds."""
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    for name in ("params.yaml", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc" / "config", tmp_path / ".dvc")
    shutil.copy(ROOT / ".dvc" / ".gitignore", tmp_path / ".dvc")
    return tmp_path


def params(root: str) -> Params:
    content = yaml.safe_load(Path("params.yaml").read_text())
    content["data"]["root"] = root
    Path("params.yaml").write_text(yaml.safe_dump(content))
    return load_params()


def test_the_tree_is_what_git_would_add(repository: Path):
    (repository / "new.py").write_text("a = 1\n")
    (repository / "reports").mkdir()
    (repository / "reports" / "report.html").write_text("ignored")
    (repository / ".dvc" / "config.local").write_text("a secret")
    (repository / "gone.py").write_text("")
    subprocess.run(["git", "add", "gone.py"], check=True)
    (repository / "gone.py").unlink()
    tree = Tree.of_here()
    names = {str(path) for path in tree.files}
    own = {"params.yaml", ".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore"}
    assert names == own | {"new.py"}
    tree.copy_to(repository / "copy")
    assert (repository / "copy" / "new.py").read_text() == "a = 1\n"


def test_the_hash_of_a_tree_follows_names_and_bytes(repository: Path):
    digests = [Tree.of_here().digest]
    assert Tree.of_here().digest == digests[0]
    for name, content in (("a", "x"), ("b", "x"), ("b", "y")):
        (repository / name).write_text(content)
        digests.append(Tree.of_here().digest)
    assert len(set(digests)) == 4


def test_no_git_and_too_much_to_upload_are_told(repository: Path, monkeypatch: pytest.MonkeyPatch):
    (repository / "big.bin").write_bytes(bytes(3 * 2**20))
    monkeypatch.setattr("pipeline.launch.upload.LARGEST_BYTES", 2**20)
    with pytest.raises(UserError, match=r"has 3 MiB to upload .* largest file is big\.bin"):
        Tree.of_here()
    shutil.rmtree(repository / ".git")
    with pytest.raises(UserError, match=r"is no git repository"):
        Tree.of_here()


def test_the_remote_is_one_that_the_copy_can_reach(repository: Path):
    with pytest.raises(UserError, match=r"names no default one; `dvc remote add"):
        remote_name(None)
    with pytest.raises(UserError, match=r"DVC remote team is not in \.dvc/config"):
        remote_name("team")
    run_dvc("remote", "add", "--local", "mine", "s3://bucket/mine")
    with pytest.raises(UserError, match=r"DVC remote mine is not in \.dvc/config"):
        remote_name("mine")
    run_dvc("remote", "add", "--default", "beside", "../store")
    with pytest.raises(UserError, match=r"beside is the relative path .*store"):
        remote_name(None)
    run_dvc("remote", "add", "team", "s3://bucket/team")
    assert remote_name("team") == "team"


def test_data_that_the_copy_would_lack_is_told(repository: Path):
    data = repository / "images"
    data.mkdir()
    (data / "a.png").write_bytes(b"a")
    check_nothing_is_lost(params("images"), Tree.of_here())
    with (repository / ".gitignore").open("a") as ignored:
        ignored.write("/images\n")
    with pytest.raises(UserError, match=r"data\.root images is ignored by git .* `dvc add images`"):
        check_nothing_is_lost(params("images"), Tree.of_here())
    run_dvc("add", "--quiet", "images")
    check_nothing_is_lost(params("images"), Tree.of_here())
    for elsewhere in ("s3://bucket/images", "/mnt/images"):
        check_nothing_is_lost(params(elsewhere), Tree.of_here())


def test_output_that_results_would_replace_is_told(repository: Path):
    (repository / "made").write_text("by the pipeline")
    run_dvc("add", "--quiet", "made")
    check_nothing_is_lost(params("data/own"), Tree.of_here())
    (repository / "made").write_text("by hand")
    with pytest.raises(UserError, match=r"made differs from what dvc\.lock holds"):
        check_nothing_is_lost(params("data/own"), Tree.of_here())


def test_only_named_variables_are_forwarded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("MY_TOKEN", "mine")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the cluster")
    assert forwarded(())["AWS_SECRET_ACCESS_KEY"] == "secret"
    assert not {"MY_TOKEN", "RAY_AUTH_TOKEN", "PATH", "HOME"} & forwarded(()).keys()
    assert forwarded(("MY_TOKEN",))["MY_TOKEN"] == "mine"
    with pytest.raises(UserError, match=r"submit\.forward names NOT_SET, which is not set"):
        forwarded(("MY_TOKEN", "NOT_SET"))


def test_dvc_lock_travels_in_a_line_of_the_log():
    lock = (ROOT / "dvc.yaml").read_bytes()
    line = encode_lock(lock)
    assert "\n" not in line
    assert decode_lock(f"epoch 1\n{line}\nepoch 2") == lock
    assert decode_lock(f"{encode_lock(b'an earlier one')}\n{line}\n") == lock
    assert decode_lock("epoch 1\n") is None
    assert decode_lock(line[: len(line) // 2]) is None


def test_another_environment_is_told(tmp_path: Path):
    lock = ROOT / "requirements.lock"
    assert environment_fault(lock) is None
    other = tmp_path / "requirements.lock"
    other.write_text(lock.read_text().replace("\nmlflow==", "\nmlflow==9"))
    fault = environment_fault(other)
    assert fault is not None
    assert "on the cluster has mlflow 3" in fault
    assert "submit.python" in fault
