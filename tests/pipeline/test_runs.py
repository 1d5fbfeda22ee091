"""Names of Ray runs: the same command finds its run, a changed one never does."""

import subprocess
import sys

import pytest
import yaml

from pipeline import runs
from pipeline.stage import UserError


@pytest.fixture
def stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIGHTBOUND_STORAGE", str(tmp_path / "storage"))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "deep.py").write_text("a = 1\n")
    (tmp_path / "train.py").write_text("b = 1\n")
    (tmp_path / "data.bin").write_text("not code")
    content = {"stages": {"train": {"deps": ["code", "train.py", "data.bin"]}}}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def test_hash_follows_parameters_data_and_code_bytes_and_nothing_else(stages):
    content = {"lr": 0.1, "data": "abc"}
    first = runs.stage_hash("train", content)
    assert runs.stage_hash("train", dict(reversed(content.items()))) == first
    (stages / "data.bin").write_text("data is known by its own hash")
    assert runs.stage_hash("train", content) == first
    hashes = {first, runs.stage_hash("train", content | {"lr": 0.2})}
    for name in ("train.py", "code/deep.py"):
        (stages / name).write_text("changed = True\n")
        hashes.add(runs.stage_hash("train", content))
    assert len(hashes) == 4


def test_a_run_is_held_by_one_process(stages):
    program = (
        "from pipeline import runs\n"
        "with runs.claim('train', 'abc'):\n"
        "    print('held', flush=True); input()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(runs.__file__).rsplit("/pipeline/", 1)[0]}
        | {"TIGHTBOUND_STORAGE": str(stages / "storage")},
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(UserError, match=f"process {holder.pid} is still working"),
        runs.claim("train", "abc"),
    ):
        pass
    holder.kill()
    holder.communicate()
    with runs.claim("train", "abc") as folder:
        assert folder.is_dir()


def test_the_last_five_runs_of_a_stage_are_kept(stages):
    import os

    for number in range(7):
        with runs.claim("train", f"{number}") as folder:
            (folder / "checkpoint").write_text("x")
        os.utime(folder, (number, number))
    with runs.claim("sweep", "other"):
        pass
    with runs.claim("train", "7"):
        pass
    kept = sorted(path.name for path in (stages / "storage").iterdir() if path.is_dir())
    assert kept == ["sweep-other", "train-3", "train-4", "train-5", "train-6", "train-7"]
    assert len(list((stages / "storage").glob("train-*.lock"))) == 5
