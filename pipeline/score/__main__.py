"""Score new data of any size by a registered model, in parallel, through Ray Data.

    python -m pipeline.score --model models:/NAME@champion --data PATH --out scores.parquet

PATH is a folder of images, an npz, csv or Parquet file, or a folder of those. One row for each
example, in the data's order: `id` (the file's name, the column `id`, else the row's number) and the
columns that the model's task answers; the figures are those of the served model. Interrupted, the
same command goes on: finished chunks lie in `scores.parquet.parts` until all are there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cluster import connect as cluster
from pipeline.score.inputs import Input, open_input
from pipeline.score.packed_model import PackedModel, champion_uri, fetch
from pipeline.score.worker import PLAN_KEY, REASON, Reader, answer, read_part
from pipeline.stage import UserError, run_stage, say, steps, whole_file, write_json
from vae.system import held
from vae.trust import KHAT_LIMIT

READ_CPUS, SCORE_CPUS = 0.25, 0.75  # so that one reads beside the others on any machine
PLAN = "plan.json"
PART = re.compile(r"\d{6}-\d{6}\.parquet")  # stream and chunk; all else is no part


@dataclass(frozen=True)
class Task:
    """What is asked of the model: score or encode, with K and the seed (None: the model's own)."""

    name: str = "score"
    num_samples: int | None = None
    seed: int | None = None

    @property
    def params(self) -> dict[str, Any]:
        chosen = {"task": self.name, "num_samples": self.num_samples, "seed": self.seed}
        return {name: value for name, value in chosen.items() if value is not None}


def score(model_uri: str, data: Path, out: Path, task: Task | None = None) -> int:
    """Answer `task` for every example of `data` and write `out`, whole; returns their number.

    Raises UserError for data that the model does not take, naming file or row; what is scored by
    then is kept.
    """
    task = task or Task()
    if out.suffix != ".parquet":
        raise UserError(f"--out: expected a name that ends in .parquet, got {out}")
    parts = out.with_name(f"{out.name}.parts").resolve()
    parts.mkdir(parents=True, exist_ok=True)
    try:
        with held(parts):
            return _score(model_uri, data, out, task, parts)
    except BlockingIOError:
        raise UserError(
            f"--out: another process is scoring into {parts}; wait for it, or name another file"
        ) from None


def _score(model_uri: str, data: Path, out: Path, task: Task, parts: Path) -> int:
    model = _model(model_uri, parts)
    draws = (task.num_samples or model.num_samples) if task.name == "score" else 1
    source = open_input(data, model, draws)
    plan = _plan(model, source, task)
    if out.is_file() and _made_from(out) == plan:
        say(f"{task.name:<10} {out} is there already, from this model and this data")
        shutil.rmtree(parts, ignore_errors=True)
        return pq.read_metadata(out).num_rows
    done = _finished(parts, plan)
    say(
        f"{task.name:<10} {source.rows:,} examples of {data} by {model_uri}"
        + (f"; {sum(done.values()):,} were done before" if done else "")
    )
    _work(model, source, task, parts, plan, done)
    count = _assemble(parts, out, plan)
    shutil.rmtree(parts, ignore_errors=True)
    return count


def _model(uri: str, parts: Path) -> PackedModel:
    """The model's files beside the parts, where all workers see them; fetched anew at each start.

    An alias may have moved since the interruption; `_plan` notices.
    """
    shutil.rmtree(parts / "model", ignore_errors=True)
    (parts / "model").mkdir(parents=True)
    try:
        return fetch(uri, parts / "model")
    except UserError:
        if not _parts(parts):
            shutil.rmtree(parts, ignore_errors=True)
        raise


def _plan(model: PackedModel, source: Input, task: Task) -> str:
    content = [model.weights_hash, source.fingerprint, source.layout.rows, task.params]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _made_from(out: Path) -> str | None:
    try:
        found = (pq.read_schema(out).metadata or {}).get(PLAN_KEY)
    except (pa.ArrowException, OSError):
        return None
    return None if found is None else found.decode()


def _finished(parts: Path, plan: str) -> dict[str, int]:
    """The chunks that an interrupted run of the same plan has finished, with their rows.

    What else lies there goes: parts of another plan, and what a process left that died while it
    wrote, whatever its last byte was.
    """
    write_json(parts / PLAN, {"plan": plan})
    done: dict[str, int] = {}
    for path in parts.iterdir():
        if path.name in (PLAN, "model"):
            continue
        rows = read_part(path, plan) if PART.fullmatch(path.name) else None
        if rows is not None:
            done[path.stem] = rows
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return done


def _parts(parts: Path) -> list[Path]:
    """The files of finished chunks, in the data's order."""
    return sorted(path for path in parts.iterdir() if PART.fullmatch(path.name))


def _work(
    model: PackedModel, source: Input, task: Task, parts: Path, plan: str, done: dict[str, int]
) -> None:
    """Read, answer and write all chunks that are not done, on all CPUs of the cluster."""
    with cluster.connect(), steps(task.name, source.rows, "example", done=None) as shown:
        import ray.data

        # A chunk is a block, so that any worker may take it.
        cluster.data_context().target_max_block_size = 1
        streams = ray.data.from_items(
            [{"stream": number} for number in range(len(source.streams))],
            override_num_blocks=len(source.streams),
        )
        chunks = streams.flat_map(
            Reader(source.streams, source.layout, frozenset(done)), num_cpus=READ_CPUS
        )
        answers = chunks.map_batches(
            partial(
                answer, model=str(model.folder), params=task.params, parts=str(parts), plan=plan
            ),
            batch_size=1,
            num_cpus=SCORE_CPUS,
        )
        count = sum(done.values())
        shown.to(count)
        for row in answers.iter_rows():
            if row["fault"]:
                raise UserError(f"{row['fault']}; mend it, and the same command goes on")
            count += int(row["rows"])
            shown.to(count)


def _assemble(parts: Path, out: Path, plan: str) -> int:
    """Join the parts, in the data's order, into `out`; returns the number of rows.

    Raises UserError where a part is damaged or missing: what is whole stays, and only that is done
    again.
    """
    paths = _parts(parts)
    if not paths:
        raise UserError("--data holds no example")
    damaged = [path for path in paths if read_part(path, plan) is None]
    for path in damaged:
        path.unlink()
    if damaged or not _is_gapless([path.stem for path in paths]):
        raise UserError(f"{parts} lacks parts of the answer; the same command makes them again")
    schema = pq.read_schema(paths[0]).with_metadata({PLAN_KEY: plan.encode()})
    count = 0
    with whole_file(out) as fresh, pq.ParquetWriter(fresh, schema) as writer:
        for path in paths:
            table = pq.read_table(path).replace_schema_metadata(schema.metadata)
            writer.write_table(table)
            count += len(table)
    return count


def _is_gapless(names: list[str]) -> bool:
    """Whether the chunks of each stream are numbered from 0 on, with none missing between."""
    by_stream: dict[str, list[int]] = {}
    for name in names:
        stream, _, number = name.partition("-")
        by_stream.setdefault(stream, []).append(int(number))
    return all(found == list(range(len(found))) for found in by_stream.values())


def tell(out: Path, count: int) -> None:
    """What the scores say, in one line."""
    table = pd.read_parquet(out, columns=["id", "log_px", "khat", "percentile", REASON])
    unscored = table[table[REASON].notna()]
    if len(unscored):
        first = unscored.iloc[0]
        say(
            f"score      {len(unscored):,} of {count:,} examples have no figures, by the column "
            f"{REASON}; the first is {first['id']}: {first[REASON]}"
        )
    table = table.loc[table[REASON].isna()]
    if table.empty:
        return
    unusual = (table["percentile"] < 5).mean()
    khat = table["khat"].to_numpy()
    khat = khat[~np.isnan(khat)]
    trust = f", khat > {KHAT_LIMIT:g} on {(khat > KHAT_LIMIT).mean():.1%}" if len(khat) else ""
    say(
        f"score      {out}: {len(table):,} examples, mean log p(x) {table['log_px'].mean():.2f} "
        f"nats, {unusual:.1%} below the 5th percentile of the validation data{trust}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all tasks over data share."""
    parser.add_argument("--model", help="models:/NAME@champion (the default), models:/NAME/3 or …")
    parser.add_argument("--data", type=Path, required=True, help="a folder, npz, csv or Parquet")
    parser.add_argument("--out", type=Path, required=True, help="a .parquet file")
    parser.add_argument("--seed", type=int, help="by default that of the percentiles")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="pipeline.score", description=(__doc__ or "").partition("\n")[0]
    )
    add_arguments(parser)
    parser.add_argument("--num-samples", type=int, help="K; by default that of the percentiles")
    asked = parser.parse_args(arguments)
    task = Task(num_samples=asked.num_samples, seed=asked.seed)
    tell(asked.out, score(asked.model or champion_uri(), asked.data, asked.out, task))


if __name__ == "__main__":
    run_stage(main)
