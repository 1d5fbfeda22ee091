"""What every stage shares: one way to fail, to write whole outputs, and to find the project."""

from __future__ import annotations

import atexit
import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from pipeline import interrupt
from pipeline.terminal import say, tell_fault
from vae.files import scratch_directory, whole_directory

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

DEBUG_VARIABLE = "TIGHTBOUND_DEBUG"
EXPERIMENT_VARIABLE = "DVC_EXP_NAME"  # set by `dvc exp run`, in the workspace, --temp and --queue


class UserError(Exception):
    """A fault that its reader can mend: expected, found, and the params key or file to change."""


def run_stage(main: Callable[[], None]) -> None:
    """Run a script's `main`, and end the process with it.

    A fault becomes one message and exit code 1, Ctrl-C exit code 130. The traceback is shown only
    with `TIGHTBOUND_DEBUG=1`.
    """
    code = _run(main)
    atexit._run_exitfuncs()
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


def fault_of_the_disk(error: Exception) -> str | None:
    """A sentence for a full disk, or a place where nothing may be written; None for all else."""
    if not isinstance(error, OSError):
        return None
    text, place = str(error), error.filename or "."
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or is_full_disk(text):
        return full_disk(place)
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{place}: {error.strerror}; the project's folder has to be writable"
    return None


def is_full_disk(text: str) -> bool:
    """Whether an error's text, of whatever library, is about a disk without room."""
    return any(sign in text for sign in ("No space left", "disk is full", "Disk quota exceeded"))


def full_disk(place: object) -> str:
    """What a person is told when there is no room at `place`."""
    return (
        f"the disk is full ({place}, {Path.cwd()}); make some space, and the same command goes "
        "on; what was there before is untouched"
    )


def project_root() -> Path:
    """The user's repository, also from DVC's temporary copy of it (`dvc exp run --temp`).

    Stores that outlive a run (registry, artifacts, Ray's runs) resolve against it.
    """
    here = Path.cwd().resolve()
    for folder in (here, *here.parents):
        if folder.match(".dvc/tmp/exps"):
            return folder.parents[2]
    return Path(os.environ.get("DVC_ROOT", here)).resolve()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that takes `path`'s place only if the block succeeds."""
    path = Path(path)
    with scratch_directory(path.parent, path.name) as folder:
        yield folder / path.name
        (folder / path.name).replace(path)


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


def write_json(path: Path, content: Any) -> None:
    """Write JSON with sorted structure kept, NaN refused, whole or not at all."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with whole_file(path) as fresh:
        fresh.write_text(text)


def read_json(path: Path) -> Any:
    """Read JSON; raises UserError naming the file when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; `dvc repro` makes it") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); `dvc repro --force` remakes it"
        ) from None
