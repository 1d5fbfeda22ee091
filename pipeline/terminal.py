"""What a person sees: a stage's purpose, its progress with the time left, its result in one line.

On a terminal in colour and with a bar that goes when it is done; in a file plain, with about ten
lines of progress. `TIGHTBOUND_VERBOSITY`: quiet (faults alone) | normal | verbose (every step).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

VERBOSITY_VARIABLE = "TIGHTBOUND_VERBOSITY"
QUIET, NORMAL, VERBOSE = "quiet", "normal", "verbose"
LINES = 10
SILENT_SECONDS = 60.0
NAME_WIDTH = 11  # of a stage's name with the blanks after it

_shown: list[Steps] = []  # the one that is shown now, if any


def verbosity() -> str:
    """quiet, normal or verbose; anything else in the variable counts as normal."""
    chosen = os.environ.get(VERBOSITY_VARIABLE, NORMAL)
    return chosen if chosen in (QUIET, VERBOSE) else NORMAL


def say(message: str) -> None:
    """Print one line for the person at the terminal, at once; its stage's name stands out."""
    if verbosity() == QUIET:
        return
    if not sys.stdout.isatty():
        print(message, flush=True)
        return
    line = Text(message)
    if message[NAME_WIDTH - 1 : NAME_WIDTH] == " ":
        line.stylize("bold cyan", 0, NAME_WIDTH)
    bar = _shown[-1].bar if _shown else None
    console = bar.console if bar is not None else Console(highlight=False)
    console.print(line, soft_wrap=True)


def tell_fault(message: str) -> None:
    """Print a fault on standard error, red on a terminal."""
    if sys.stderr.isatty():
        Console(stderr=True, highlight=False).print(Text(message, style="red"), soft_wrap=True)
    else:
        print(message, file=sys.stderr)


class Steps:
    """Progress in steps; `to` says how far it is. Made by `steps`."""

    def __init__(self, stage: str, total: int, unit: str, bar: Progress | None, lines: int) -> None:
        self.stage, self.total, self.unit, self.lines = stage, total, unit, lines
        self.bar = bar
        self._task = None if bar is None else bar.add_task(stage, total=total, unit=unit, text="")
        self._since: tuple[float, int] | None = None
        self._shown = (time.monotonic(), 0.0)

    def to(self, done: int, text: str = "") -> None:
        """`done` steps of `total` are behind us; text: what they brought."""
        now = time.monotonic()
        if self._since is None:
            self._since = (now, done)
        if self.bar is not None and self._task is not None:
            self.bar.update(self._task, completed=done, text=text)
        if verbosity() == VERBOSE or (self.bar is None and self._is_due(now, done)):
            self._shown = (now, done)
            width = len(f"{self.total:,}")
            left = "" if done >= self.total else self._left(now, done)
            place = f"{self.unit} {done:>{width},}/{self.total:,}"
            say(f"{self.stage:<{NAME_WIDTH}}{place}  {text}{left}".rstrip())

    def _is_due(self, now: float, done: int) -> bool:
        last, before = self._shown
        tenth = self.total / self.lines
        return done >= self.total or done // tenth > before // tenth or now - last > SILENT_SECONDS

    def _left(self, now: float, done: int) -> str:
        assert self._since is not None
        start, first = self._since
        if done <= first or now <= start:
            return ""
        return f"  {duration((now - start) / (done - first) * (self.total - done))} left"


@contextmanager
def steps(stage: str, total: int, unit: str, *, lines: int = LINES) -> Iterator[Steps]:
    """Show progress in `total` steps while the block runs.

    unit: what a step is, such as "epoch". lines: how many a file gets, about.
    """
    bar = None
    with ExitStack() as stack:
        if sys.stdout.isatty() and verbosity() != QUIET:
            bar = stack.enter_context(_bar())
        shown = Steps(stage, total, unit, bar, lines)
        _shown.append(shown)
        stack.callback(_shown.remove, shown)
        yield shown


def advance(done: int, text: str = "") -> None:
    """`Steps.to` of the progress that is shown now, for callbacks that can't hold it."""
    if _shown:
        _shown[-1].to(done, text)


def _bar() -> Progress:
    return Progress(
        TextColumn("[bold cyan]{task.description:<10}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[unit]} {task.completed:,.0f}/{task.total:,.0f}"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[text]}", markup=False),
        console=Console(highlight=False),
        transient=True,
    )


def duration(seconds: float) -> str:
    """As a person says it: 8 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
