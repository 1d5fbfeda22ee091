"""Prepare stage: a data source → splits in Parquet, meta.json and a preview.

Reads params `data` and its source. Writes data/prepared, whole or not at all.

An example's split follows from a hash of its content, salted by the seed: added data moves no old
example, and equal examples are never on both sides.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.params import DataParams, load_params
from pipeline.prepared import SPLITS, Meta, Split, write_prepared
from pipeline.sources import Examples, load_source
from pipeline.stage import UserError, run_stage, say, whole_directory

SMALLEST_SPLIT = 2


def prepare(data: DataParams, out: Path) -> Meta:
    """Load `data.source`, split and binarise it, and write it to `out`."""
    examples = load_source(data)
    check_space(examples.x, data)
    hashes = content_hashes(examples.x, data.seed)
    keep = chosen(hashes, data.limit)
    examples, hashes = _select(examples, keep), hashes[keep]
    assigned = assign_splits(hashes, examples.is_test, data)
    x = examples.x
    if data.space == "binary":
        dynamic = (assigned == "train") & (data.binarization == "dynamic")
        x = binarize(x, hashes, data, keep_grey=dynamic)
    splits = {}
    for name in SPLITS:
        rows = assigned == name
        splits[name] = Split(x=x[rows], label=examples.label[rows], id=examples.id[rows])
        _check_size(name, int(rows.sum()), len(rows), data)
    with whole_directory(out) as fresh:
        meta = write_prepared(
            fresh,
            splits,
            dataset=examples.dataset,
            source=data.source,
            space=data.space,
            binarization=data.binarization if data.space == "binary" else None,
            duplicates=count_duplicates(hashes, assigned),
            own_test_split=examples.is_test is not None,
            num_classes=int(examples.label.max()) + 1 if examples.label.max() >= 0 else None,
        )
        preview(splits).save(fresh / "preview.png")
    return meta


def check_space(x: np.ndarray, data: DataParams) -> None:
    """Raise UserError where the examples are no points of `data.space`."""
    if x.dtype == np.uint8 and data.space == "continuous":
        raise UserError(
            f"data.space: continuous models real numbers, and {data.source} holds 8-bit images; "
            "use grey8, or binary"
        )
    if len(x) and (x == x[0]).all():
        raise UserError(f"data.source: all {len(x)} examples of {data.source} are equal")


def content_hashes(x: np.ndarray, seed: int) -> np.ndarray:
    """(N,) uint64: a hash of each example's values and shape, salted by the seed."""
    salt = f"{seed}{x.dtype.str}{x.shape[1:]}".encode()
    rows = np.ascontiguousarray(x).reshape(len(x), -1)
    digests = [hashlib.blake2b(row.data, digest_size=8, key=salt[:64]).digest() for row in rows]
    return np.frombuffer(b"".join(digests), "<u8")


def chosen(hashes: np.ndarray, limit: int | None) -> np.ndarray:
    """Which examples are used, in the order of their hash: all, or `limit` of them.

    The limit takes the hash's bytes from the other end, so it favours no split.
    """
    kept = np.argsort(hashes.byteswap(), kind="stable")[:limit]
    return kept[np.argsort(hashes[kept], kind="stable")]


def assign_splits(hashes: np.ndarray, is_test: np.ndarray | None, data: DataParams) -> np.ndarray:
    """(N,) of "train", "valid", "test". valid_fraction is of what is not test data."""
    place = hashes.astype(np.float64) / 2.0**64
    if is_test is None:
        is_test = place < data.test_fraction
        place = (place - data.test_fraction) / (1 - data.test_fraction)
    return np.where(is_test, "test", np.where(place < data.valid_fraction, "valid", "train"))


def binarize(
    x: np.ndarray, hashes: np.ndarray, data: DataParams, *, keep_grey: np.ndarray
) -> np.ndarray:
    """Grey levels → 0/1, but for the rows of `keep_grey` (N,), which are binarised at each visit.

    By `data.binarization`: x ~ Bernoulli(grey / 255), drawn once, from the example's content hash
    (so from the seed), or 1 from grey level 128 up. Data of 0 and 1 only is black and white.
    """
    if x.max() <= 1:
        x = x * np.uint8(255)
    out = x.copy()
    for row in np.flatnonzero(~keep_grey):
        if data.binarization == "threshold":
            out[row] = x[row] >= 128
        else:
            noise = np.random.Generator(np.random.Philox(int(hashes[row])))
            out[row] = noise.random(x.shape[1:]) * 255 < x[row]
    return out


def count_duplicates(hashes: np.ndarray, assigned: np.ndarray) -> dict[str, int]:
    """Examples equal to an earlier one: in all, and equal to one of another split."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    elsewhere = assigned != assigned[first[inverse]]
    return {"all": len(hashes) - len(first), "across_splits": int(elsewhere.sum())}


def preview(splits: dict[str, Split]) -> Image.Image:
    """A page of examples, the splits below each other, four rows each."""
    blocks = [_tile(splits[name].x, rows=4, columns=16) for name in SPLITS]
    return Image.fromarray(np.concatenate(blocks).squeeze())


def _tile(x: np.ndarray, *, rows: int, columns: int) -> np.ndarray:
    """(N, C, H, W) → (rows·(H+1), columns·(W+1), C): the first examples, white where none is."""
    channels, height, width = x.shape[1:]
    page = np.full((rows * (height + 1), columns * (width + 1), channels), 255, np.uint8)
    scale = 255 if x.max(initial=0) <= 1 else 1
    for index, image in enumerate(x[: rows * columns]):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        page[top : top + height, left : left + width] = image.transpose(1, 2, 0) * scale
    return page


def _select(examples: Examples, rows: np.ndarray) -> Examples:
    return Examples(
        dataset=examples.dataset,
        x=examples.x[rows],
        label=examples.label[rows],
        id=examples.id[rows],
        is_test=None if examples.is_test is None else examples.is_test[rows],
    )


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
    meta = prepare(load_params().data, arguments.prepared)
    shape, counts = "×".join(map(str, meta.data_shape)), meta.counts
    again = f"; {meta.duplicates['all']} duplicates" if meta.duplicates["all"] else ""
    say(
        f"prepare    {meta.dataset}, {meta.space}, {shape}: {counts['train']} train, "
        f"{counts['valid']} valid, {counts['test']} test{again}"
    )


if __name__ == "__main__":
    run_stage(main)
