"""Contenders that live side by side and take turns of some seconds.

A shared machine's speed changes by half within a minute, so what is compared must be seconds apart,
many times over. A peer trains an epoch, or estimates log p(x), when it is asked to; of our stage,
all processes are stopped between its turns, Ray's own too.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Protocol

import psutil

from bench.ours import count_of, log_of, set_training, stage_process

TURN_SECONDS = 4.0  # of our stage, in whole epochs, and at least two of them
END_SECONDS = 60
POLL_SECONDS = 0.5
EPOCHS = "epochs.jsonl"


class Contender(Protocol):
    def turn(self) -> float:
        """Work for one turn; the rate of it, all that happens meanwhile included."""
        ...

    def close(self) -> None: ...


class Peer:
    """A process that works for each line it gets and then prints JSON with its `rate`, a line."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.answers: list[dict[str, Any]] = []
        self.errors = TemporaryFile("w+")  # noqa: SIM115  (closed with the process)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            text=True,
        )

    def turn(self) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("{"):  # what else its library says is not for us
                self.answers.append(json.loads(line))
                return self.answers[-1]["rate"]
        self.errors.seek(0)
        raise SystemExit(f"{self.process.args} ended:\n{self.errors.read()[-2000:]}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()


class Stage:
    """`dvc.yaml`'s stage train in a project of `bench.ours`, with all that it starts."""

    def __init__(self, folder: Path, batch: int) -> None:
        set_training(folder, batch=batch, epochs=1_000_000)
        self.images = count_of(folder)
        before = set(folder.rglob(EPOCHS))
        self.log = log_of(folder, "train")
        self.process = stage_process(folder, "train", apart=True)
        try:
            while not (
                new := [log for log in set(folder.rglob(EPOCHS)) - before if log.stat().st_size]
            ):
                self._wait()
        except BaseException:  # Ctrl-C too, which doesn't reach it
            self.close()
            raise
        self.epochs = new[0]
        self._send(signal.SIGSTOP)

    def turn(self) -> float:
        start = time.time()
        self._send(signal.SIGCONT)
        ends: list[float] = []
        while len(ends) < 3 or ends[-1] - ends[0] < TURN_SECONDS:
            self._wait()
            rows = map(json.loads, self.epochs.read_text().rpartition("\n")[0].splitlines())
            # the first to end began before the turn
            ends = [end for row in rows if (end := row["time"]) > start]
        self._send(signal.SIGSTOP)
        return self.images * (len(ends) - 1) / (ends[-1] - ends[0])

    def close(self) -> None:
        tree = self._tree()
        self._send(signal.SIGCONT)
        self.process.send_signal(signal.SIGINT)
        _, left = psutil.wait_procs(tree, timeout=END_SECONDS)
        for process in left:
            process.kill()
        self.process.wait()

    def _wait(self) -> None:
        if self.process.poll() is not None:
            raise SystemExit(f"train ended:\n{self.log.read_text()}")
        time.sleep(POLL_SECONDS)

    def _tree(self) -> list[psutil.Process]:
        try:
            parent = psutil.Process(self.process.pid)
            return [*parent.children(recursive=True), parent]
        except psutil.NoSuchProcess:
            return []

    def _send(self, number: signal.Signals) -> None:
        for process in self._tree():
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue


def take_turns(contenders: dict[str, Contender], count: int, what: str) -> dict[str, list[float]]:
    """The rates of each contender's turns; a first turn warms up and is not counted."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(count + 1):
        for name, contender in contenders.items():
            found[name].append(contender.turn())
        rates = ", ".join(f"{name} {rates[-1]:,.0f}" for name, rates in found.items())
        print(f"{what}, turn {number} of {count}: {rates}", flush=True)
    return {name: rates[1:] for name, rates in found.items()}
