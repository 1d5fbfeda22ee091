"""From Ray to the terminal: each finished trial and each epoch, as they are reported."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from pipeline.stage import advance

POLL_SECONDS = 0.5


class EpochLog(UserCallback):
    """Appends each epoch's figures to a file; Ray Train calls it in the controller's process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        first = metrics[0]
        with self.path.open("a") as log:
            for row in first.get("epochs", [first]):
                log.write(json.dumps(row) + "\n")


class EpochLines:
    """Shows each epoch: the ELBO's terms on the validation split, and the speed."""

    def __init__(self, on_epoch: Callable[[dict[str, Any]], None]) -> None:
        self.on_epoch = on_epoch
        self.diverged = ""

    def show(self, row: dict[str, Any]) -> None:
        if "diverged" in row:
            self.diverged = row["diverged"]
            return
        self.on_epoch(row)
        advance(
            row["epoch"],
            f"elbo {row['valid_elbo']:.2f}  log p(x|z) {row['valid_log_px_z']:.2f}  "
            f"KL {row['valid_kl']:.2f}  {row['images_per_s']:,.0f} examples/s",
        )


@contextmanager
def follow(path: Path, show: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Call `show` with each row that is appended to `path` while the block runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    stop = threading.Event()

    def read() -> None:
        with path.open() as log:
            log.seek(0, 2)
            while True:
                last_round = stop.is_set()
                position = log.tell()
                line = log.readline()
                if line.endswith("\n"):
                    show(json.loads(line))
                    continue
                log.seek(position)
                if last_round:
                    return
                stop.wait(POLL_SECONDS)

    reader = threading.Thread(target=read, name="epoch-lines", daemon=True)
    reader.start()
    try:
        yield
    finally:
        stop.set()
        reader.join(timeout=10)
