"""What a sweep tells of its trials."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ray.tune import Callback

from pipeline.cluster import DEATH, fault_of_a_worker
from pipeline.params import describe
from pipeline.stage import advance
from pipeline.sweep.journal import Journal
from pipeline.sweep.search import SCORE, Space
from pipeline.sweep.trial import REPLAYED
from vae.models import VAEConfig

RESULTS = (  # of a trial's result, what its row keeps
    "valid_elbo",
    "valid_log_px",
    "valid_log_px_se",
    "khat_bad_fraction",
    "num_samples",
    SCORE,
)


LESS_MEMORY = "training.batch_size, the sizes under sweep, or sweep.max_concurrent"


class TrialLog(Callback):
    """Writes each trial's start, checkpoints and end into the journal, and shows its end.

    Tune calls it in the driver. A trial is shown when it is safe: it will never be run again.
    """

    def __init__(
        self, space: Space, journal: Journal, model: VAEConfig, before: int, last: bool
    ) -> None:
        """before: trials that were finished by an earlier start and are not run. last: no further
        run takes up the trials that this one leaves.
        """
        self.space, self.journal, self.before, self.last = space, journal, before, last
        self.discrete = model.space != "continuous"
        self.dims = math.prod(model.data_shape)

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.journal.start(self.space.trial(trial.config))

    def on_checkpoint(
        self, iteration: int, trials: list, trial: Any, checkpoint: Any, **info: Any
    ) -> None:
        self.journal.save(self.space.trial(trial.config), checkpoint.path)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        result = trial.last_result
        if REPLAYED in result:
            advance(self._done(trials, trial), "finished before")
            return
        log_px = result.get("valid_log_px")
        if "diverged" in result:
            row, outcome = {"status": "diverged", "error": result["diverged"]}, "diverged"
        elif log_px is None:
            row = {"status": "stopped", "error": "stopped early by the scheduler"}
            outcome = "stopped early"
        else:
            row = {"status": "ok"}
            bits = -log_px / (self.dims * math.log(2))
            outcome = f"{bits:8.4f} bits/dim" if self.discrete else f"{-log_px:10.3f} nats"
        self._finish(trials, trial, row, outcome)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        # Tune gives up at once a trial whose process dies before the trial has begun in it.
        if not self.last and trial.run_metadata.num_failures <= trial.max_failures:
            return
        row = {"status": "died", "error": _reason(trial)}
        self._finish(trials, trial, row, "died; the others go on")

    def _finish(self, trials: list, trial: Any, row: dict[str, Any], outcome: str) -> None:
        known, result = self.space.trial(trial.config), trial.last_result
        figures = {key: result[key] for key in RESULTS if key in result}
        self.journal.finish(
            known,
            {"trial_id": self.journal.id(known), **known.point, "seed": known.seed}
            | figures
            | {"epochs": result.get("epoch"), "seconds": result.get("fit_seconds")}
            | row,
        )
        seconds = result.get("fit_seconds")
        took = "" if seconds is None else f"  {seconds:5.1f} s"
        advance(self._done(trials, trial), f"{describe(known.point):<34}  {outcome.strip()}{took}")

    def _done(self, trials: list, trial: Any) -> int:
        return self.before + sum(other.is_finished() or other is trial for other in trials)


def _reason(trial: Any) -> str:
    """The one line of a trial's error that tells a person what went wrong."""
    path = trial.error_file
    text = Path(path).read_text().strip() if path else ""
    if not text:
        return DEATH
    told = fault_of_a_worker(text, key=LESS_MEMORY, storage=trial.storage.storage_fs_path)
    return told or text.splitlines()[-1].strip()
