"""How a stage's process ends."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENDS_WELL = """
import atexit
from pipeline.stage import run_stage

class Freed:
    def __del__(self):
        print("freed by the interpreter")

def main():
    global kept
    kept = Freed()
    atexit.register(lambda: print("told at exit"))
    print("done", end=" ")

run_stage(main)
"""


def test_a_stage_ends_with_all_that_is_to_be_done_at_exit_and_without_pythons_teardown():
    done = subprocess.run(
        [sys.executable, "-c", ENDS_WELL],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done told at exit\n", "")
