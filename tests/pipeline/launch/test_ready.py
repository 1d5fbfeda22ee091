"""What `make run` tells before DVC starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.launch import preflight
from pipeline.stage import UserError


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    Path(".dvc/tmp").mkdir(parents=True)
    return tmp_path


def test_data_that_is_not_there(project: Path):
    Path("params.yaml").write_text("data:\n  root: my/pictures\n")
    with pytest.raises(UserError, match=r"data\.root in params\.yaml is 'my/pictures', and"):
        preflight.check_data()
    Path("my/pictures").mkdir(parents=True)
    preflight.check_data()
    Path("params.yaml").write_text("data:\n  root: s3://bucket/pictures\n")
    preflight.check_data()


def test_a_run_that_is_at_work_and_one_that_has_died():
    """DVC's own lock file, once with a process that lives and once with what is left of it."""
    command = [sys.executable, "-c", "input()", "dvc"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        holder = {"pid": process.pid, "cmd": "dvc repro"}
        locks = {"read": {"/p/params.yaml": [holder]}, "write": {"/p/models/vae": holder}}
        preflight.LOCKS.write_text(json.dumps(locks))
        with pytest.raises(UserError, match=rf"\(process {process.pid}: dvc repro\); wait for"):
            preflight.check_nobody_is_at_work()
        process.kill()
    preflight.check_nobody_is_at_work()
    preflight.LOCKS.unlink()
    preflight.check_nobody_is_at_work()
