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
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
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

    def __init__(
        self,
        stage: str,
        total: int,
        unit: str,
        bar: Progress | None,
        lines: int,
        done: int | None,
    ) -> None:
        self.stage, self.total, self.unit, self.lines = stage, total, unit, lines
        self.bar = bar
        self._task = None
        if bar is not None:
            fields = {"unit": unit, "text": "", "ends": None}
            self._task = bar.add_task(stage, total=total, completed=done or 0, **fields)
        self._since = None if done is None else (time.monotonic(), done)
        self._shown = (time.monotonic(), 0.0)

    def to(self, done: int, text: str = "") -> None:
        """`done` steps of `total` are behind us; text: what they brought."""
        now = time.monotonic()
        if self._since is None:
            self._since = (now, done)
        left = self._left(now, done)
        if self.bar is not None and self._task is not None:
            ends = None if left is None else now + left
            self.bar.update(self._task, completed=done, text=text, ends=ends)
        if verbosity() == VERBOSE or (self.bar is None and self._is_due(now, done)):
            self._shown = (now, done)
            width = len(f"{self.total:,}")
            words = "" if left is None else f"  {duration(left)} left"
            place = f"{self.unit} {done:>{width},}/{self.total:,}"
            say(f"{self.stage:<{NAME_WIDTH}}{place}  {text}{words}".rstrip())

    def _is_due(self, now: float, done: int) -> bool:
        last, before = self._shown
        tenth = self.total / self.lines
        return done >= self.total or done // tenth > before // tenth or now - last > SILENT_SECONDS

    def _left(self, now: float, done: int) -> float | None:
        """Seconds, if anything is left and a step tells how long one takes."""
        assert self._since is not None
        start, first = self._since
        if done <= first or now <= start or done >= self.total:
            return None
        return (now - start) / (done - first) * (self.total - done)


@contextmanager
def steps(
    stage: str, total: int, unit: str, *, lines: int = LINES, done: int | None = 0
) -> Iterator[Steps]:
    """Show progress in `total` steps while the block runs.

    unit: what a step is, such as "epoch". lines: how many a file gets, about. done: steps of an
    earlier start; None: not known, so that the first step tells where this one began.
    """
    bar = None
    with ExitStack() as stack:
        if sys.stdout.isatty() and verbosity() != QUIET:
            bar = stack.enter_context(_bar())
        shown = Steps(stage, total, unit, bar, lines, done)
        _shown.append(shown)
        stack.callback(_shown.remove, shown)
        yield shown


def advance(done: int, text: str = "") -> None:
    """`Steps.to` of the progress that is shown now, for callbacks that can't hold it."""
    if _shown:
        _shown[-1].to(done, text)


class _TimeLeft(ProgressColumn):
    """Counts down between the steps, which rich's own column does not."""

    def render(self, task: Task) -> Text:
        ends = task.fields["ends"]
        return Text("" if ends is None else f"{duration(max(0, ends - time.monotonic()))} left")


class _Outcome(ProgressColumn):
    """What the last step brought, cut where the terminal ends."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["text"], no_wrap=True, overflow="ellipsis")


def _bar() -> Progress:
    def whole() -> Column:
        return Column(no_wrap=True)

    place = "{task.fields[unit]} {task.completed:,.0f}/{task.total:,.0f}"
    return Progress(
        TextColumn("[bold cyan]{task.description:<10}", table_column=whole()),
        BarColumn(bar_width=24, table_column=whole()),
        TextColumn(place, table_column=whole()),
        _TimeLeft(table_column=whole()),
        _Outcome(),
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
