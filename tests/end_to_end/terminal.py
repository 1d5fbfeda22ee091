"""A command on a real pseudo-terminal, where Ctrl-C reaches its whole process group."""

from __future__ import annotations

import os
import pty
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "TIGHTBOUND_TEST_MARK"


class Terminal:
    """A command that runs on a terminal of its own; what it shows is kept in `shown`."""

    def __init__(self, folder: Path, environment: dict[str, str], *command: str) -> None:
        self.command = command
        self.mark = uuid.uuid4().hex
        self.shown = ""
        self.pid, self.screen = pty.fork()
        if self.pid == 0:  # the command, in the foreground of its terminal
            os.chdir(folder)
            os.execvpe(command[0], command, environment | {MARK: self.mark})
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # EIO: the last process has closed the terminal
            while data := os.read(self.screen, 4096):
                self.shown += data.decode(errors="replace")

    def wait_for(self, text: str, seconds: float = 300) -> None:
        """Wait until the screen shows `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, f"{text!r} never came:\n{self.shown}"
            assert self.running(), f"it ended before {text!r}:\n{self.shown}"
            time.sleep(0.02)

    def wait_for_process(self, title: str, seconds: float = 300) -> None:
        """Wait until one of the processes that the command started has this title."""
        deadline = time.monotonic() + seconds
        while not any(title in name for name in self.processes()):
            assert time.monotonic() < deadline, f"no process {title}:\n{self.shown}"
            assert self.running(), f"it ended before {title!r} ran:\n{self.shown}"
            time.sleep(0.05)

    def running(self) -> bool:
        """Whether the command has not ended yet."""
        return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE

    def press_ctrl_c(self) -> None:
        os.write(self.screen, b"\x03")

    def end(self, seconds: float = 120) -> tuple[int, float]:
        """The command's exit code (128 + n for signal n) and how long it took to end."""
        start = time.monotonic()
        while not (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            assert time.monotonic() - start < seconds, f"it goes on:\n{self.shown}"
            time.sleep(0.02)
        took = time.monotonic() - start
        self.reader.join(timeout=5)
        code = os.waitstatus_to_exitcode(found[1])
        return (code if code >= 0 else 128 - code), took

    def processes(self) -> list[str]:
        """Titles of all living processes that the command started, directly or not."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                ours = process.environ().get(MARK) == self.mark
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:200]}")
        return found
