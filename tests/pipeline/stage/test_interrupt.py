"""Ctrl-C on a real terminal: of a stage that cleans up, that hangs, and that hasn't begun."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.terminal import Terminal

LINE = "interrupted; the same command goes on from here"
# A stage with a child that ignores Ctrl-C, as Ray's processes do.
STAGE = """
import signal, subprocess, sys, time
from pipeline.stage import interrupt
from pipeline.stage import run_stage

def main():
    ignore = lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    subprocess.Popen(["sleep", "600"], preexec_fn=ignore)
    try:
        print("at work", flush=True)
        time.sleep(600)
    finally:
        WAYS[sys.argv[1]]()
        print("cleaned up", flush=True)

def replace_handler():  # as Ray Train does
    signal.signal(signal.SIGINT, lambda *_: None)
    print("swallowed", flush=True)
    time.sleep(600)

def fail():
    raise RuntimeError("a consequence of the interruption")

WAYS = {"tidy": lambda: None, "hangs": replace_handler, "fails": fail}
interrupt.GRACE_SECONDS = float(sys.argv[2])
run_stage(main)
"""
ROOT = Path(__file__).parents[3]


def stage(way: str, grace: float) -> Terminal:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    terminal = Terminal(ROOT, environment, sys.executable, "-c", STAGE, way, str(grace))
    terminal.wait_for("at work")
    return terminal


def check_gone(terminal: Terminal) -> None:
    code, _ = terminal.end()
    assert code == 130
    assert terminal.shown.count(LINE) == 1
    assert "Traceback" not in terminal.shown
    assert terminal.processes() == []


def test_a_stage_that_cleans_up_leaves_when_it_has():
    terminal = stage("tidy", grace=600)
    terminal.press_ctrl_c()
    check_gone(terminal)
    assert "cleaned up" in terminal.shown


def test_a_stage_that_hangs_is_ended_after_the_grace():
    terminal = stage("hangs", grace=2)
    terminal.press_ctrl_c()
    check_gone(terminal)
    assert "cleaned up" not in terminal.shown


def test_a_second_ctrl_c_does_not_wait():
    terminal = stage("hangs", grace=600)
    terminal.press_ctrl_c()
    terminal.wait_for("swallowed")
    terminal.press_ctrl_c()
    check_gone(terminal)


def test_an_error_that_follows_from_the_interruption_is_none():
    terminal = stage("fails", grace=600)
    terminal.press_ctrl_c()
    check_gone(terminal)
    assert "RuntimeError" not in terminal.shown


@pytest.mark.parametrize("seconds", [0.3, 1.0])
def test_while_a_stage_is_still_being_imported(seconds: float):
    command = [sys.executable, "-X", "importtime", "-m", "pipeline.sweep", "--help"]
    terminal = Terminal(ROOT, dict(os.environ), *command)
    terminal.wait_for("pipeline.stage.interrupt")  # from here on Ctrl-C is answered
    time.sleep(seconds)
    terminal.press_ctrl_c()
    code, _ = terminal.end()
    assert (code, LINE in terminal.shown) in [(130, True), (0, False)]  # or it was faster
    assert "Traceback" not in terminal.shown


# What DVC runs, which has a child of its own.
ORPHAN = """
import os, subprocess, sys, time
from pipeline.stage import interrupt
interrupt.leave_with_dvc()
child = subprocess.Popen(["sleep", "600"])
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("stage", ["train", None])
def test_the_death_of_dvc_ends_its_stage_and_nothing_else(stage: str | None):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("DVC_STAGE", None)
    if stage is not None:
        environment["DVC_STAGE"] = stage
    dvc = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    parent = subprocess.Popen(
        [sys.executable, "-c", dvc, ORPHAN], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    orphans = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(orphans, timeout=60 if stage else 2)
    assert set(alive) == (set() if stage else set(orphans))
    for process in alive:
        process.kill()
    said = parent.stdout.read()
    assert ("dvc has died" in said) == (stage is not None)
