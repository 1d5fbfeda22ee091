"""Names of Ray runs: the same command finds its run, a changed one never does."""

import os
import subprocess
import sys

import pytest
import yaml

from pipeline.cluster import runs
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
        "from pipeline.cluster import runs\n"
        "with runs.claim('train', 'abc', None):\n"
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
        pytest.raises(UserError, match=rf"process {holder.pid} on \S+ is still working"),
        runs.claim("train", "abc", None),
    ):
        pass
    holder.kill()
    holder.communicate()
    with runs.claim("train", "abc", None) as run:
        assert run.folder.is_dir()


def test_the_last_five_runs_of_a_stage_are_kept_and_those_at_work(stages):
    storage = stages / "storage"
    with runs.claim("train", "0", None):
        for number in range(7):
            if number:
                with runs.claim("train", f"{number}", None) as run:
                    (run.folder / "checkpoint").write_text("x")
            os.utime(storage / f"train-{number}.lock", (number, number))
        with runs.claim("sweep", "other", None):
            pass
        with runs.claim("train", "7", None):
            pass
    kept = {path.name for path in storage.iterdir() if path.is_dir()}
    assert kept == {"sweep-other", *(f"train-{number}" for number in (0, 3, 4, 5, 6, 7))}
    assert {path.stem for path in storage.glob("*.lock")} == kept
