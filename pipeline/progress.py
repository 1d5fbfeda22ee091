"""From Ray to the terminal: each finished trial and each epoch, as they are reported."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.train import UserCallback
from ray.tune import Callback

from pipeline.terminal import advance
from vae.model import VAEConfig

POLL_SECONDS = 0.5


class TrialProgress(Callback):
    """Shows each finished trial of the sweep; Tune calls it in the driver."""

    def __init__(self, model: VAEConfig) -> None:
        self.discrete = model.space != "continuous"
        self.dims = math.prod(model.data_shape)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        result = trial.last_result
        log_px = result.get("valid_log_px")
        if "diverged" in result:
            outcome = "diverged; the others go on"
        elif log_px is None:
            outcome = "stopped early"
        elif self.discrete:
            outcome = f"{-log_px / (self.dims * math.log(2)):8.4f} bits/dim"
        else:
            outcome = f"{-log_px:10.3f} nats"
        self._line(trials, trial, outcome)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._line(trials, trial, "failed; the others go on")

    def _line(self, trials: list, trial: Any, outcome: str) -> None:
        # Those finished before an interruption count too.
        done = sum(other.is_finished() or other is trial for other in trials)
        point = trial.config["point"]
        seconds = trial.last_result.get("fit_seconds")
        took = "" if seconds is None else f"  {seconds:5.1f} s"
        text = f"{point['likelihood']}, {point['latent_dim']} latent"
        advance(done, f"{text:<34}{outcome}{took}")


class EpochLog(UserCallback):
    """Appends each epoch's figures to a file; Ray Train calls it in the controller's process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        with self.path.open("a") as log:
            log.write(json.dumps(metrics[0]) + "\n")


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
