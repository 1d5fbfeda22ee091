"""Values of a source, checked and brought to the data space."""

from __future__ import annotations

import numpy as np

from pipeline.params import DataParams
from pipeline.prepare.sources.examples import Examples, some
from pipeline.stage import UserError

REPEATED_SHARE = 0.05


# Values this many standard deviations from zero lose their spread in double precision.
FARTHEST = 1e12


SMALLEST_SPREAD = 1e-100  # below, a square is no number


BATCH_ROWS = 4096


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


def _largest(x: np.ndarray) -> int:
    return max(int(x[start : start + BATCH_ROWS].max()) for start in range(0, len(x), BATCH_ROWS))
