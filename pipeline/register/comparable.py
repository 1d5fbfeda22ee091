"""Whether two models' log p(x) may be compared, and how the one's data become the other's.

Columns are matched by their names. What a model was trained on is on record in its registered
version (`data.json`), and in meta.json for the data at hand. Shapes: N examples, D data values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.stage import Meta


class NotComparable(Exception):  # noqa: N818
    """Why two models' log p(x) can't be compared."""


@dataclass(frozen=True, kw_only=True)
class DataRecord:
    """What log p(x) is a density of, as far as it is known.

    columns: names of a table's values in their order, None for pictures; `names_known` is False
    where a record says nothing of them.
    """

    space: str
    binarization: str | None
    data_shape: tuple[int, ...]
    columns: tuple[str, ...] | None
    names_known: bool = True

    @classmethod
    def of_meta(cls, meta: Meta) -> DataRecord:
        """Of prepared data."""
        return cls(
            space=meta.space,
            binarization=meta.binarization,
            data_shape=tuple(meta.data_shape),
            columns=None if meta.columns is None else tuple(meta.columns),
        )

    @classmethod
    def of_version(cls, measure: str | None, data: Mapping[str, Any]) -> DataRecord:
        """Of a registered version, from its tag `measure` and its data.json.

        Raises NotComparable where the version says nothing of its data.
        """
        if not measure:
            raise NotComparable("it models unknown data: it has no record of them")
        space, *binarization, shape = measure.split()
        columns = data.get("columns")
        return cls(
            space=space,
            binarization=binarization[0] if binarization else None,
            data_shape=tuple(map(int, shape.split("x"))),
            columns=None if columns is None else tuple(columns),
            names_known="columns" in data,
        )

    @property
    def measure(self) -> str:
        """In a few words; figures of different measures are never compared."""
        shape = "x".join(map(str, self.data_shape))
        return " ".join(filter(None, (self.space, self.binarization, shape)))


@dataclass(frozen=True)
class Conversion:
    """How x of one record, (N, *data_shape), is reordered for a model of another."""

    places: tuple[int, ...] | None  # of the model's columns in x; None: x as it is

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return x if self.places is None else x[:, list(self.places)]


def conversion(model: DataRecord, data: DataRecord) -> Conversion:
    """How `data` is given to a model of `model`; raises NotComparable with the reason."""
    if model.measure != data.measure:
        raise NotComparable(f"it models {model.measure}, this one {data.measure}")
    if not model.names_known:
        raise NotComparable("the names of its columns are not on record")
    if model.columns is None and data.columns is None:
        return Conversion(None)
    theirs, ours = model.columns or (), data.columns or ()
    if set(theirs) != set(ours):
        raise NotComparable(
            f"it models the columns {_named(theirs, ours)}, this one {_named(ours, theirs)}"
        )
    place = {name: index for index, name in enumerate(ours)}
    return Conversion(tuple(place[name] for name in theirs))


def _named(columns: tuple[str, ...], others: tuple[str, ...]) -> str:
    """The names, those that the others lack first; a few of many."""
    if not columns:
        return "of a picture"
    order = sorted(columns, key=lambda name: name in others)
    more = f" and {len(order) - 5} more" if len(order) > 5 else ""
    return ", ".join(order[:5]) + more
