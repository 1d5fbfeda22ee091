"""Ctrl-C, and the death of DVC: nothing that a stage started outlives either.

With Ctrl-C the prompt is back within seconds.

The first one interrupts the stage as Python does, so that it can clean up. Whatever it makes of
it, after `GRACE_SECONDS`, or at a second Ctrl-C, all that it started is ended and it leaves.
Nothing is lost by that: outputs appear whole or not at all, and runs go on from checkpoints.

A killed `dvc repro` would leave its stage at work, and the next one would start beside it.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

MESSAGE = "interrupted; the same command goes on from here"
GRACE_SECONDS = 6.0
EXIT_CODE = 128 + signal.SIGINT
STAGE_VARIABLE = "DVC_STAGE"  # set by DVC for the stages that it runs
ORPHANED = "dvc has died, so its stage ends too; the same command goes on from here"
LOOK_SECONDS = 0.2
CTRL_C = bytes([signal.SIGINT])

_message = MESSAGE


def tell_instead(message: str) -> None:
    """Words for Ctrl-C from now on, in a process that leaves something at work behind it."""
    global _message
    _message = message


def message() -> str:
    """What a person is told at Ctrl-C."""
    return _message


def leave_at_once() -> None:
    """Until `watch` takes over, Ctrl-C leaves with a line, not a traceback: nothing has begun."""

    def leave(signum: int, frame: FrameType | None) -> None:
        _leave([])

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


def leave_with_dvc() -> None:
    """From now on end this process, and all that it started, once the DVC that runs it is gone."""
    if STAGE_VARIABLE not in os.environ:
        return
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        _leave(_children(), ORPHANED, 1)

    threading.Thread(target=look, name="parent", daemon=True).start()


@contextmanager
def watch() -> Iterator[None]:
    """Make Ctrl-C end the block, by KeyboardInterrupt, and then this process, in time.

    A thread is told of the signal by the interpreter's own C code, whatever handler Ray may have
    put in place of Python's and whatever the main thread is waiting for.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        yield
        return
    pressed = threading.Event()

    def interrupt(signum: int, frame: FrameType | None) -> None:
        pressed.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_wait, args=(reader, pressed), name="ctrl-c", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        if pressed.is_set():
            sys.stdout.flush()
            os.write(writer, 2 * CTRL_C)  # as if pressed again: the stage has cleaned up
            watcher.join()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.set_wakeup_fd(before)
        os.close(writer)


def _wait(reader: int, pressed: threading.Event) -> None:
    """Read the numbers of signals as they come, and leave soon after the first Ctrl-C."""
    while number := os.read(reader, 1):
        if number == CTRL_C:
            pressed.set()
            # Those of now too: a process whose parent ends before it can't be found any more.
            children = _children()
            _wait_for_another(reader)
            _leave([*children, *_children()])
    os.close(reader)


def _wait_for_another(reader: int) -> None:
    """Wait for a Ctrl-C, for `GRACE_SECONDS` at most."""
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    deadline = time.monotonic() + GRACE_SECONDS
    while (left := deadline - time.monotonic()) > 0 and poll.poll(left * 1000):
        if os.read(reader, 1) == CTRL_C:
            return


def _leave(children: list[psutil.Process], said: str | None = None, code: int = EXIT_CODE) -> None:
    for process in children:
        with suppress(psutil.Error):
            process.kill()
    with suppress(OSError):
        show_cursor = "\x1b[?25h" if os.isatty(1) else ""  # a bar of progress hides it
        os.write(1, f"{show_cursor}{said or _message}\n".encode())
    os._exit(code)


def _children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)
