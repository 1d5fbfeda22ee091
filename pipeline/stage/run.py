"""What every stage shares: one way to fail, to write whole outputs, and to find the project."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from pipeline.stage import interrupt
from pipeline.stage.faults import DEBUG_VARIABLE, UserError, fault_of_the_disk
from pipeline.stage.files import project_root, read_json, whole_file, write_json
from pipeline.stage.terminal import say, tell_fault
from vae.system import scratch_directory, whole_directory

__all__ = [
    "EXPERIMENT_VARIABLE",
    "UserError",
    "end_process",
    "project_root",
    "read_json",
    "run_stage",
    "say",
    "scratch_directory",
    "spared",
    "whole_directory",
    "whole_file",
    "write_json",
]

EXPERIMENT_VARIABLE = "DVC_EXP_NAME"  # set by `dvc exp run`, in the workspace, --temp and --queue


def run_stage(main: Callable[[], None]) -> None:
    """Run a script's `main`, and end the process with it.

    A fault becomes one message and exit code 1, Ctrl-C exit code 130. The traceback is shown only
    with `TIGHTBOUND_DEBUG=1`.
    """
    code = _run(main)
    getattr(atexit, "_run_exitfuncs", lambda: None)()
    end_process(code)


def _run(main: Callable[[], None]) -> int:
    """The exit code."""
    try:
        with interrupt.watch():
            main()
    except KeyboardInterrupt:
        say(interrupt.message())
        return interrupt.EXIT_CODE
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE) == "1":
            traceback.print_exc()
        told = isinstance(error, UserError) or fault_of_the_disk(error)
        message = told if isinstance(told, str) else str(error)
        tell_fault(f"error: {message if told else f'{type(error).__name__}: {error}'}")
        if not told:
            tell_fault(f"       ({DEBUG_VARIABLE}=1 shows where)")
        return 1
    return 0


def end_process(code: int) -> NoReturn:
    """End the process at once, without freeing torch and Ray.

    That takes a second or two, and crashes at times: Ray's threads outlive `ray.shutdown`, and read
    what the end of a process frees.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    os._exit(code)


def spared(stage: str, what: str, make: Callable[[], Any]) -> Any:
    """What `make` gives; where it fails, None and a warning: what is done so far is not lost to it.

    For what comes after long work, and is less than it: a picture, a baseline.
    """
    try:
        return make()
    except Exception as error:  # whatever a library stumbles over
        words = (str(error).strip().splitlines() or [""])[-1][:200]
        say(f"{stage:<10} warning: no {what} ({type(error).__name__}: {words})")
        return None
