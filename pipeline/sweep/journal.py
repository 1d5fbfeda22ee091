"""What is known of a sweep's trials, in the run's storage: one small file each, trials/<id>.json.

A trial is named by all that it depends on within its run: the complete job. So whatever else of
the sweep changes, a trial that is finished is never run again, and an interrupted one goes on from
its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pyarrow import fs

from pipeline.cluster import Storage
from pipeline.params import Point, section_values
from pipeline.train import TrainingJob

# In the run's folder: Tune's own folder of one start of the sweep, and the runs of the workers of
# trials that have several.
ATTEMPT, WORKERS = "attempt_", "workers"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training of the sweep: a point and a seed."""

    point: Point
    seed: int


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a trial that was started.

    number: counts the run's trials in the order in which they started. checkpoint: where the last
    one is. row: that of trials.csv, once the trial is over.
    """

    number: int
    point: Point
    seed: int
    checkpoint: str | None = None
    row: dict[str, Any] | None = None

    @property
    def finished(self) -> bool:
        """Whether it won't run again; one that died gets another chance."""
        return self.row is not None and self.row["status"] != "died"


def job_at(job: TrainingJob, trial: Trial) -> TrainingJob:
    """The job of a trial: `job` with the trial's point and seed in place of its own."""

    def values(section: str) -> dict[str, Any]:
        return section_values(trial.point, section)

    return replace(
        job,
        model=replace(job.model, **values("model")),
        objective=replace(job.objective, **values("objective")),
        training=replace(job.training, **values("training"), seed=trial.seed),
    )


def trial_id(job: TrainingJob, trial: Trial) -> str:
    """Ten hex digits that name a trial of `job`."""
    found = job_at(job, trial)
    content = [found.model.to_dict(), asdict(found.objective), asdict(found.training)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


class Journal:
    """The records of a run's trials, by id; every change is written at once."""

    def __init__(self, storage: Storage, run: str, job: TrainingJob) -> None:
        self.storage, self.job = storage, job
        self.folder, self.root = f"{run}/trials", f"{storage.root}/{run}"
        storage.filesystem.create_dir(f"{storage.root}/{self.folder}", recursive=True)
        self.records = dict(self._read())

    def id(self, trial: Trial) -> str:
        return trial_id(self.job, trial)

    def start(self, trial: Trial) -> None:
        """Note that a trial is started, if it isn't known yet."""
        name = self.id(trial)
        if name not in self.records:
            number = 1 + max((record.number for record in self.records.values()), default=0)
            self._write(name, Record(number=number, point=trial.point, seed=trial.seed))

    def save(self, trial: Trial, checkpoint: str) -> None:
        """Note a trial's last checkpoint, a path in the storage's filesystem."""
        name = self.id(trial)
        self._write(name, replace(self.records[name], checkpoint=checkpoint))

    def finish(self, trial: Trial, row: Mapping[str, Any]) -> None:
        """Note a trial's end."""
        self.start(trial)
        name = self.id(trial)
        self._write(name, replace(self.records[name], row=dict(row)))

    def checkpoints(self) -> dict[str, str]:
        """Where trials that were interrupted can go on, as `ray.tune.Checkpoint` takes it."""
        scheme = "s3://" if self.storage.remote else ""
        return {
            name: scheme + record.checkpoint
            for name, record in self.records.items()
            if record.checkpoint and not record.finished and self._exists(record.checkpoint)
        }

    def clear(self) -> None:
        """Delete checkpoints and all else that Ray wrote, unless a trial may go on from there."""
        if not all(record.finished for record in self.records.values()):
            return
        for entry in self.storage.filesystem.get_file_info(fs.FileSelector(self.root)):
            if entry.base_name.startswith((ATTEMPT, WORKERS)):
                self.storage.filesystem.delete_dir(entry.path)

    def _exists(self, path: str) -> bool:
        return self.storage.filesystem.get_file_info(path).type == fs.FileType.Directory

    def _read(self) -> Iterator[tuple[str, Record]]:
        selector = fs.FileSelector(f"{self.storage.root}/{self.folder}")
        for entry in self.storage.filesystem.get_file_info(selector):
            if entry.base_name.startswith(".") or entry.extension != "json":
                continue  # left half-written
            content = self.storage.read(f"{self.folder}/{entry.base_name}")
            if content:  # a kill may have cut one short
                record = Record(**{key: _as_tuples(value) for key, value in content.items()})
                yield entry.base_name.removesuffix(".json"), record

    def _write(self, name: str, record: Record) -> None:
        self.records[name] = record
        self.storage.write(f"{self.folder}/{name}.json", asdict(record))


def _as_tuples(value: Any) -> Any:
    """What JSON made lists of is tuples again, in mappings too."""
    if isinstance(value, dict):
        return {key: _as_tuples(item) for key, item in value.items()}
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
