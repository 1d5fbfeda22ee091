"""Which example belongs to which split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from pipeline.params import DataParams
from pipeline.stage import UserError

SMALLEST_SPLIT = 2


def content_hashes(x: np.ndarray, seed: int | None) -> np.ndarray:
    """(N,) uint64: a hash of each example's values and shape, salted by the seed unless None."""
    salt = f"{'' if seed is None else seed}{x.dtype.str}{x.shape[1:]}".encode()
    return _hashes((row.data for row in np.ascontiguousarray(x).reshape(len(x), -1)), salt)


def _group_hashes(group: np.ndarray, seed: int) -> np.ndarray:
    return _hashes((name.encode() for name in group.tolist()), f"{seed}group".encode())


def _hashes(contents: Iterator[bytes | memoryview], salt: bytes) -> np.ndarray:
    digests = [hashlib.blake2b(c, digest_size=8, key=salt[:64]).digest() for c in contents]
    return np.frombuffer(b"".join(digests), "<u8")


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


def count_duplicates(hashes: np.ndarray, assigned: np.ndarray) -> dict[str, int]:
    """Examples equal to an earlier one: in all, and equal to one of another split."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    elsewhere = assigned != assigned[first[inverse]]
    return {"all": len(hashes) - len(first), "across_splits": int(elsewhere.sum())}


def _check_size(name: str, found: int, total: int, data: DataParams) -> None:
    if found < SMALLEST_SPLIT:
        raise UserError(
            f"data.source: of {total} examples {found} fall into the {name} split; expected at "
            f"least {SMALLEST_SPLIT}: give more data (data.limit is {data.limit}), larger "
            "data.valid_fraction or data.test_fraction, or another data.seed"
        )
