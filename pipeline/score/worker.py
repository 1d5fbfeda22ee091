"""What runs inside Ray while new data is scored: chunks are read, and answered by the model."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.score.inputs import Chunk, Layout, Stream
from pipeline.score.packed_model import load
from pipeline.stage import UserError

PLAN_KEY = b"tightbound.plan"  # in a part's and the result's metadata: what they were made from
REASON = "reason"


class Reader:
    """A stream's chunks, as rows that travel through Ray."""

    def __init__(self, streams: list[Stream], layout: Layout, done: frozenset[str]) -> None:
        self.streams, self.layout, self.done = streams, layout, done

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        stream = self.streams[row["stream"]]
        try:
            for chunk in stream.read(stream, self.layout, self.done):
                yield {"name": chunk.name, "chunk": pack(chunk), "fault": ""}
        except UserError as fault:
            yield {"name": "", "chunk": b"", "fault": str(fault)}
        except Exception as error:  # a damaged file: pandas', zipfile's, Arrow's
            text = f"{stream.path} cannot be read ({type(error).__name__}: {error})"
            yield {"name": "", "chunk": b"", "fault": text}


def answer(
    batch: Any, model: str, params: dict[str, Any], parts: str, plan: str
) -> dict[str, list[Any]]:
    """Answer a chunk, a batch of one row, and write the answer as a file of its own, whole."""
    name, fault = str(batch["name"][0]), str(batch["fault"][0])
    if fault:
        return {"rows": [0], "fault": [fault]}
    ids, x = unpack(batch["chunk"][0])
    try:
        table = answered(loaded(model), x, params)
    except Exception as error:
        words = getattr(error, "message", str(error))
        return {"rows": [0], "fault": [f"examples {ids[0]} … {ids[-1]}: {words}"]}
    table.insert(0, "id", ids)
    write_part(Path(parts) / f"{name}.parquet", table, plan)
    return {"rows": [len(table)], "fault": [""]}


def answered(model: Any, x: np.ndarray, params: dict[str, Any]) -> pd.DataFrame:
    """The model's answer for every example; one that it refuses has no figures, but the reason.

    Halves of a refused chunk are asked alone, so that an example costs its neighbours nothing.
    Raises what the model raises where it refuses them all.
    """
    try:
        return as_table(model.predict(x, params=params))
    except Exception as error:
        if len(x) == 1:
            raise
        parts: list[pd.DataFrame | str] = []
        for half in np.array_split(x, 2):
            try:
                parts.append(answered(model, half, params))
            except Exception as fault:
                parts.append(str(getattr(fault, "message", fault)))
        known = [part for part in parts if isinstance(part, pd.DataFrame)]
        if not known:
            raise error
        sizes = [len(half) for half in np.array_split(x, 2)]
        return pd.concat(
            [
                _without_figures(known[0], size, part) if isinstance(part, str) else part
                for part, size in zip(parts, sizes, strict=True)
            ],
            ignore_index=True,
        )


def _without_figures(like: pd.DataFrame, count: int, reason: str) -> pd.DataFrame:
    table = pd.DataFrame(
        np.nan, index=range(count), columns=[name for name in like.columns if name != REASON]
    )
    return table.assign(**{REASON: reason})


def write_part(target: Path, table: pd.DataFrame, plan: str) -> None:
    """A chunk's answer as a file, whole or not at all, with the plan that it is of."""
    reasons = table[REASON].tolist() if REASON in table else [None] * len(table)
    rows = pa.Table.from_pandas(table.drop(columns=REASON, errors="ignore"), preserve_index=False)
    rows = rows.append_column(REASON, pa.array(reasons, pa.string()))
    fresh = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    pq.write_table(rows.replace_schema_metadata({PLAN_KEY: plan.encode()}), fresh)
    fresh.replace(target)


def read_part(path: Path, plan: str) -> int | None:
    """The number of examples in a part; None where it is damaged, or of another plan."""
    try:
        with pq.ParquetFile(path) as file:
            of = (file.schema_arrow.metadata or {}).get(PLAN_KEY)
            return file.metadata.num_rows if of == plan.encode() else None
    except (pa.ArrowException, OSError):
        return None


@cache
def loaded(model: str) -> Any:
    """The model, once in each of Ray's worker processes."""
    import torch

    torch.set_num_threads(1)
    return load(Path(model))


def as_table(answer: Any) -> pd.DataFrame:
    """The model's answer as columns: of `encode` mean[0] … and std[0] …"""
    if isinstance(answer, pd.DataFrame):
        return answer
    columns = {
        f"{key}[{index}]": values[:, index]
        for key, values in answer.items()
        for index in range(values.shape[1])
    }
    return pd.DataFrame(columns)


def pack(chunk: Chunk) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=chunk.x, id=np.array(chunk.id, dtype=str))
    return buffer.getvalue()


def unpack(content: bytes) -> tuple[list[str], np.ndarray]:
    with np.load(io.BytesIO(content)) as arrays:
        return arrays["id"].tolist(), arrays["x"]
