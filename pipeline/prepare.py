"""Prepare stage: a data source → splits in Parquet, meta.json and a preview.

Reads params `data` and its source. Writes data/prepared, whole or not at all.

An example's split follows from a hash of its content (or of its group), salted by the seed: added
data moves no old example, and equal examples are never on both sides.

Shapes: N examples.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.plain_params import load_plain_params
from pipeline.prepared import SPLITS, Meta, Split, shard_rows, write_shards
from pipeline.preview import EXAMPLES, draw_preview
from pipeline.sections import DataParams
from pipeline.sources import Examples, load_source
from pipeline.sources.examples import some
from pipeline.stage import (
    UserError,
    run_stage,
    say,
    scratch_directory,
    spared,
    whole_directory,
)
from pipeline.storage import S3, download

SMALLEST_SPLIT = 2
REPEATED_SHARE = 0.05
# Values this many standard deviations from zero lose their spread in double precision.
FARTHEST = 1e12
SMALLEST_SPREAD = 1e-100  # below, a square is no number
BATCH_ROWS = 4096


def prepare(data: DataParams, out: Path) -> Meta:
    """Load `data.source`, split, fill and binarise it, and write it to `out`."""
    with scratch_directory(out.parent, "decoded") as scratch:
        examples = load(data, scratch)
    check_space(examples.x, data)
    hashes = content_hashes(examples.x, data.seed)
    order = chosen(hashes, data.limit)
    hashes = hashes[order]
    places = hashes if examples.group is None else _group_hashes(examples.group[order], data.seed)
    own = None if examples.split is None else examples.split[order]
    assigned = assign_splits(places, own, data)
    for name in SPLITS:
        _check_size(name, int((assigned == name).sum()), len(order), data)
    x, filled = fill_missing(examples, order, assigned == "train", data)
    repeated = () if examples.columns is None else check_columns(x, order, assigned, examples)
    blocks = _Blocks(examples, x, order, hashes, assigned, data)
    with whole_directory(out) as fresh:
        meta = write_shards(
            fresh,
            {name: blocks.shards(name) for name in SPLITS},
            dataset=examples.dataset,
            source=data.source,
            space=data.space,
            binarization=data.binarization if data.space == "binary" else None,
            duplicates=count_duplicates(hashes, assigned),
            own_test_split=examples.split is not None,
            num_classes=int(examples.label.max()) + 1 if examples.label.max() >= 0 else None,
            columns=examples.columns,
            classes=examples.classes,
            filled=filled,
            repeated_columns=repeated,
        )
        many = EXAMPLES if examples.columns is None else BATCH_ROWS
        first = {name: blocks.part(name, slice(0, many)).x for name in SPLITS}
        preview = spared("prepare", "preview.png", lambda: draw_preview(first, examples.columns))
        if preview is not None:
            (fresh / "preview.png").write_bytes(preview)
    for line in (*examples.notes, *_warnings(meta)):
        say(f"prepare    {line}")
    return meta


def load(data: DataParams, scratch: Path) -> Examples:
    """What the source gives; of data on S3, through a copy in `scratch`."""
    if not data.root.startswith(S3):
        return load_source(data, scratch)
    folder = scratch.resolve() / "s3"
    folder.mkdir()
    copy = download(data.root, folder)
    try:
        return load_source(replace(data, root=str(copy)), scratch)
    except UserError as error:
        raise UserError(str(error).replace(str(copy), data.root.rstrip("/"))) from error


class _Blocks:
    """The splits, a block of examples at a time, as the data space wants them."""

    def __init__(
        self,
        examples: Examples,
        x: np.ndarray,
        order: np.ndarray,
        hashes: np.ndarray,
        assigned: np.ndarray,
        data: DataParams,
    ) -> None:
        self.examples, self.x, self.order, self.hashes, self.data = examples, x, order, hashes, data
        self.content = content_hashes(examples.x, None)
        self.rows = {name: np.flatnonzero(assigned == name) for name in SPLITS}
        self.black_and_white = data.space == "binary" and _largest(x) <= 1

    def part(self, split: str, rows: slice) -> Split:
        chosen = self.rows[split][rows]
        places = self.order[chosen]
        x = np.asarray(self.x[places])
        if self.data.space == "binary":
            if self.black_and_white:
                x = x * np.uint8(255)
            if split != "train" or self.data.binarization != "dynamic":
                x = binarize(x, self.hashes[chosen], self.data)
        return Split(
            x=x,
            label=self.examples.label[places],
            id=self.examples.id[places],
            content=self.content[places],
        )

    def shards(self, split: str) -> Iterator[Split]:
        for rows in shard_rows(len(self.rows[split]), self.x[:1].nbytes):
            yield self.part(split, rows)


def check_space(x: np.ndarray, data: DataParams) -> None:
    """Raise UserError where the examples are no points of `data.space`."""
    if x.dtype == np.uint8 and data.space == "continuous":
        raise UserError(
            f"data.space: continuous models real numbers, and {data.source} holds 8-bit images; "
            "use grey8, or binary"
        )
    if x.dtype != np.uint8 and data.space != "continuous":
        raise UserError(
            f"data.space: {data.space} models 8-bit images, and {data.source} holds real numbers; "
            "use continuous"
        )
    if all((x[start : start + BATCH_ROWS] == x[0]).all() for start in range(0, len(x), BATCH_ROWS)):
        raise UserError(f"data.source: all {len(x)} examples of {data.source} are equal")


def content_hashes(x: np.ndarray, seed: int | None) -> np.ndarray:
    """(N,) uint64: a hash of each example's values and shape, salted by the seed unless None."""
    salt = f"{'' if seed is None else seed}{x.dtype.str}{x.shape[1:]}".encode()
    return _hashes((row.data for row in np.ascontiguousarray(x).reshape(len(x), -1)), salt)


def _group_hashes(group: np.ndarray, seed: int) -> np.ndarray:
    return _hashes((name.encode() for name in group.tolist()), f"{seed}group".encode())


def _hashes(contents: Iterator[bytes | memoryview], salt: bytes) -> np.ndarray:
    digests = [hashlib.blake2b(c, digest_size=8, key=salt[:64]).digest() for c in contents]
    return np.frombuffer(b"".join(digests), "<u8")


def chosen(hashes: np.ndarray, limit: int | None) -> np.ndarray:
    """Which examples are used, in the order of their hash: all, or `limit` of them.

    The limit takes the hash's bytes from the other end, so it favours no split.
    """
    kept = np.argsort(hashes.byteswap(), kind="stable")[:limit]
    return kept[np.argsort(hashes[kept], kind="stable")]


def assign_splits(hashes: np.ndarray, own: np.ndarray | None, data: DataParams) -> np.ndarray:
    """(N,) of "train", "valid", "test". valid_fraction is of what is not test data.

    own: the source's splits, which are kept; without a validation split it is taken from train.
    """
    place = hashes.astype(np.float64) / 2.0**64
    if own is None:
        is_test = place < data.test_fraction
        place = (place - data.test_fraction) / (1 - data.test_fraction)
    else:
        is_test = own == "test"
        if (own == "valid").any():
            place = np.where(own == "valid", 0.0, 1.0)
        if not is_test.any():
            raise UserError(
                f"data.source: {data.source} brings {', '.join(np.unique(own))} and no test split"
            )
    return np.where(is_test, "test", np.where(place < data.valid_fraction, "valid", "train"))


def binarize(x: np.ndarray, hashes: np.ndarray, data: DataParams) -> np.ndarray:
    """Grey levels → 0/1, by `data.binarization`.

    threshold: 1 from grey level 128 up. static, and what dynamic has for validation and test:
    x ~ Bernoulli(grey / 255), drawn once, from the example's content hash (so from the seed).
    """
    if data.binarization == "threshold":
        return (x >= 128).astype(np.uint8)
    out = np.empty_like(x)
    for row in range(len(x)):
        noise = np.random.Generator(np.random.Philox(int(hashes[row])))
        out[row] = noise.random(x.shape[1:]) * 255 < x[row]
    return out


def fill_missing(
    examples: Examples, order: np.ndarray, is_train: np.ndarray, data: DataParams
) -> tuple[np.ndarray, dict[str, float] | None]:
    """x with its missing values (NaN) filled by `data.missing`, and what fills each column.

    Statistics are the training split's. Raises UserError where values are missing and
    `data.missing` is refuse, or a column has none to learn from.
    """
    x = examples.x
    if examples.columns is None or not np.isnan(x).any():
        return x, None
    gaps = np.isnan(x)
    names = [examples.columns[index] for index in np.flatnonzero(gaps.any(0))]
    if data.missing == "refuse":
        counts = some(
            (f"{name!r} {int(gaps[:, examples.columns.index(name)].sum())}" for name in names), 8
        )
        first = examples.id[int(gaps.any(1).argmax())]
        raise UserError(
            f"data.missing: {int(gaps.any(1).sum())} of {len(x)} rows have missing values (the "
            f"first: {first}); by column: {counts}; fill them, choose data.columns, or set "
            "data.missing to mean or median"
        )
    train = x[order[is_train]]
    empty = [examples.columns[i] for i in np.flatnonzero(np.isnan(train).all(0))]
    if empty:
        raise UserError(
            f"data.missing: column {some(map(repr, empty), 8)} has no value in the training "
            f"split, so no {data.missing}; leave it out of data.columns"
        )
    values = np.nanmean(train, 0) if data.missing == "mean" else np.nanmedian(train, 0)
    return np.where(gaps, values, x), {name: float(values[examples.columns.index(name)])
                                       for name in names}  # fmt: skip


def check_columns(
    x: np.ndarray, order: np.ndarray, assigned: np.ndarray, examples: Examples
) -> tuple[str, ...]:
    """The columns with many repeated values in the training split, where a density can spike.

    Raises UserError for columns that have no density: constant ones, and those whose spread is
    lost in double precision.
    """
    assert examples.columns is not None
    train = x[order[assigned == "train"]]
    names = np.array(examples.columns)
    spread = train.std(0)
    constant = names[(train == train[0]).all(0)]
    if len(constant):
        raise UserError(
            f"data.columns: {some(map(repr, constant.tolist()), 8)} has one value in the training "
            "split, so no density; leave it out of data.columns"
        )
    lost = np.flatnonzero(np.abs(train.mean(0)) > FARTHEST * spread)
    if len(lost):
        first, more = lost[0], f" ({len(lost) - 1} more like it)" if len(lost) > 1 else ""
        raise UserError(
            f"data.columns: {examples.columns[first]!r} lies at {train[:, first].mean():g} with a "
            f"standard deviation of {spread[first]:g}, which double precision cannot resolve{more}"
            "; subtract an offset"
        )
    small = names[spread < SMALLEST_SPREAD]
    if len(small):
        raise UserError(
            f"data.columns: {some(map(repr, small.tolist()), 8)} has a standard deviation below "
            f"{SMALLEST_SPREAD:g}; use another unit"
        )
    repeated = np.array([len(train) - len(np.unique(column)) for column in train.T])
    return tuple(names[repeated > REPEATED_SHARE * len(train)].tolist())


def count_duplicates(hashes: np.ndarray, assigned: np.ndarray) -> dict[str, int]:
    """Examples equal to an earlier one: in all, and equal to one of another split."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    elsewhere = assigned != assigned[first[inverse]]
    return {"all": len(hashes) - len(first), "across_splits": int(elsewhere.sum())}


def _warnings(meta: Meta) -> Iterator[str]:
    if meta.duplicates["across_splits"]:
        yield (
            f"warning: {meta.duplicates['across_splits']} examples are equal to one of another "
            "split, which flatters the test"
        )
    if meta.repeated_columns:
        yield (
            f"warning: more than 5% repeated values, where a density can spike: "
            f"{some(meta.repeated_columns, 8)}"
        )
    if meta.filled:
        yield f"filled missing values of {some(meta.filled, 8)}"


def _largest(x: np.ndarray) -> int:
    return max(int(x[start : start + BATCH_ROWS].max()) for start in range(0, len(x), BATCH_ROWS))


def _check_size(name: str, found: int, total: int, data: DataParams) -> None:
    if found < SMALLEST_SPLIT:
        raise UserError(
            f"data.source: of {total} examples {found} fall into the {name} split; expected at "
            f"least {SMALLEST_SPLIT}: give more data (data.limit is {data.limit}), larger "
            "data.valid_fraction or data.test_fraction, or another data.seed"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prepared", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    meta = prepare(load_plain_params().data, arguments.prepared)
    shape, counts = "×".join(map(str, meta.data_shape)), meta.counts
    again = f"; {meta.duplicates['all']} duplicates" if meta.duplicates["all"] else ""
    say(
        f"prepare    {meta.dataset}, {meta.space}, {shape}: {counts['train']} train, "
        f"{counts['valid']} valid, {counts['test']} test{again}"
    )


if __name__ == "__main__":
    run_stage(main)
