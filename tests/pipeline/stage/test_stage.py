"""How a stage's process ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ENDS = """
import atexit
from pipeline.stage import UserError
from pipeline.stage import run_stage

class Freed:
    def __del__(self):
        print("freed by the interpreter")

def main():
    global kept
    kept = Freed()
    atexit.register(lambda: print("told at exit"))
    print("done", end=" ")
    {ending}

run_stage(main)
"""


@pytest.mark.parametrize(
    ("ending", "code", "told"),
    [
        ("return", 0, ""),
        ("raise UserError('expected this')", 1, "error: expected this\n"),
        (
            "raise MemoryError('that')",
            1,
            "error: MemoryError: that\n       (TIGHTBOUND_DEBUG=1 shows where)\n",
        ),
    ],
)
def test_a_stage_ends_with_all_that_is_to_be_done_at_exit_and_without_pythons_teardown(
    ending: str, code: int, told: str
):
    done = subprocess.run(
        [sys.executable, "-c", ENDS.format(ending=ending)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "done told at exit\n", told)
