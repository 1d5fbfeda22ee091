"""Claims on runs and their pruning, in a folder and on S3, and the copy of data from S3."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pyarrow import fs

from pipeline.cluster import STORAGE_VARIABLE, Held, Storage, download, open_storage
from pipeline.prepare import prepare
from pipeline.stage import Meta, UserError
from tests.pipeline.builders import TABLE
from tests.pipeline.servers import running_s3

BUCKET = "team"
HOLDER = """
import sys, time
from pipeline.cluster import open_storage
with open_storage(sys.argv[1]).held("train-1"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    with running_s3(BUCKET) as variables:
        yield variables


@pytest.fixture
def s3(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """S3, as the environment names it."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture(params=["folder", "s3"])
def storage(
    request: pytest.FixtureRequest,
    s3: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Storage:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(STORAGE_VARIABLE, raising=False)
    return open_storage("runs" if request.param == "folder" else f"s3://{BUCKET}/{tmp_path.name}")


def held_by_another(storage: Storage) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, storage.address]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def names(storage: Storage) -> set[str]:
    found = storage.filesystem.get_file_info(fs.FileSelector(storage.root))
    return {entry.base_name for entry in found}


def test_one_process_holds_a_run_until_it_dies(storage: Storage):
    other = held_by_another(storage)
    try:
        with pytest.raises(Held, match=f"^process {other.pid} on "), storage.held("train-1"):
            pytest.fail("two processes hold it")
        with storage.held("train-2"):
            pass
    finally:
        other.kill()
        other.wait()
    with storage.held("train-1"):
        pass


def test_the_last_used_run_is_kept_and_held_ones(storage: Storage):
    runs = ("train-1", "train-2", "train-3", "train-4", "sweep-1")
    for name in runs:
        storage.filesystem.create_dir(f"{storage.root}/{name}", recursive=True)
        storage.write(f"{name}/state", {"epoch": 1})
    other = held_by_another(storage)
    try:
        for name in runs[1:]:
            with storage.held(name):
                pass
        time.sleep(1.1)  # S3 tells whole seconds
        with storage.held("train-3"):
            storage.prune("train-", keep=1)
    finally:
        other.kill()
        other.wait()
    kept = {name for name in names(storage) if not name.endswith(".lock")}
    assert kept == {"train-1", "train-3", "sweep-1"}
    assert storage.read("train-1/state") == {"epoch": 1}
    assert names(storage) - kept == {f"{name}.lock" for name in kept}


def test_a_place_that_is_not_there_is_told(
    s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UserError, match=r"s3://none/runs \(scaling\.storage\) can't be used: Buck"):
        open_storage("s3://none/runs")
    monkeypatch.setenv(STORAGE_VARIABLE, "/proc/none")
    with pytest.raises(UserError, match=r"/proc/none \(TIGHTBOUND_STORAGE\) can't be used"):
        open_storage(None)
    with pytest.raises(UserError, match=r"data\.root s3://team/none can't be read: there is noth"):
        download("s3://team/none", tmp_path)


def test_data_on_s3_is_prepared_as_data_here_is(s3: dict[str, str], tmp_path: Path):
    """A folder of tables, and one of them; a fault names the address that the user knows."""
    bucket = fs.S3FileSystem(
        access_key=s3["AWS_ACCESS_KEY_ID"],
        secret_key=s3["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=s3["AWS_ENDPOINT_URL"],
    )
    here = tmp_path / "tables"

    def put(name: str, content: str) -> None:
        here.mkdir(exist_ok=True)
        (here / name).write_text(content)
        with bucket.open_output_stream(f"{BUCKET}/data/tables/{name}") as stream:
            stream.write(content.encode())

    def prepared(root: str) -> Meta:
        return prepare(replace(TABLE, root=root), tmp_path / "out")

    rows = np.random.default_rng(0).normal(size=(200, 3)).round(3)
    frame = pd.DataFrame(rows, columns=["a", "b", "c"])
    put("one.csv", frame[:100].to_csv(index=False))
    put("two.csv", frame[100:].to_csv(index=False))
    for name in ("tables", "tables/one.csv"):
        assert prepared(f"s3://{BUCKET}/data/{name}") == prepared(str(tmp_path / name))
    put("one.csv", "a,b,c\n1,2,x\n")
    with pytest.raises(UserError, match=r"s3://team/data/tables") as fault:
        prepared(f"s3://{BUCKET}/data/tables")
    assert str(tmp_path) not in str(fault.value)
    assert list(tmp_path.glob(".tmp-*")) == []
