"""Files that appear whole or not at all, and what killed processes leave."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vae.system import scratch_directory, whole_directory

HOLD = """
import sys, time
from vae.system import whole_directory
with whole_directory(sys.argv[1]) as fresh:
    (fresh / "half").write_text("half")
    print("begun", flush=True)
    time.sleep(600)
"""


def begun(path: Path) -> subprocess.Popen[str]:
    """A process that is in the middle of writing `path`."""
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_process_left_goes_with_the_next_and_a_living_ones_stays(tmp_path: Path):
    path = tmp_path / "out"
    killed, living = begun(path), begun(path)
    killed.kill()
    killed.wait()
    assert len(names(tmp_path)) == 2
    with whole_directory(path) as fresh:
        (fresh / "whole").write_text("whole")
        assert len(names(tmp_path)) == 2  # this one and the living one's
    assert names(path) == ["whole"]
    living.kill()
    living.wait()
    with whole_directory(path) as fresh:
        (fresh / "again").write_text("again")
    assert names(tmp_path) == ["out"]
    assert names(path) == ["again"]


def test_a_fault_leaves_the_former_folder(tmp_path: Path):
    with whole_directory(tmp_path / "out") as fresh:
        (fresh / "former").write_text("")

    def fail() -> None:
        with whole_directory(tmp_path / "out") as fresh:
            (fresh / "half").write_text("")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["former"]


def test_names_that_begin_alike_or_have_wildcards_are_left_alone(tmp_path: Path):
    (tmp_path / ".tmp-out2-x").mkdir()
    (tmp_path / ".tmp-[ab]-x").mkdir()
    (tmp_path / ".tmp-a-x").mkdir()
    with scratch_directory(tmp_path, "out"), scratch_directory(tmp_path, "[ab]"):
        pass
    assert names(tmp_path) == [".tmp-a-x", ".tmp-out2-x"]


def test_many_at_once_keep_their_folders(tmp_path: Path):
    faults: list[Exception] = []

    def work() -> None:
        try:
            for _ in range(100):
                with scratch_directory(tmp_path, "one") as folder:
                    (folder / "file").write_text("")
        except OSError as error:
            faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert names(tmp_path) == []
