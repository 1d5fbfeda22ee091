"""Prepare stage: a data source → splits in Parquet, meta.json and a preview.

Reads params `data` and its source. Writes data/prepared, whole or not at all.

An example's split follows from a hash of its content (or of its group), salted by the seed: added
data moves no old example, and equal examples are never on both sides.

Shapes: N examples.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.cluster import S3, download
from pipeline.params import DataParams, load_plain_params
from pipeline.prepare.preview import EXAMPLES, draw_preview
from pipeline.prepare.sources import load_source
from pipeline.prepare.sources.examples import Examples, some
from pipeline.prepare.splits import (
    _check_size,
    _group_hashes,
    assign_splits,
    content_hashes,
    count_duplicates,
)
from pipeline.prepare.values import (
    BATCH_ROWS,
    _largest,
    binarize,
    check_columns,
    check_space,
    fill_missing,
)
from pipeline.stage import (
    SPLITS,
    Meta,
    Split,
    UserError,
    run_stage,
    say,
    shard_rows,
    spared,
    write_shards,
)
from vae.system import scratch_directory, whole_directory


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


def chosen(hashes: np.ndarray, limit: int | None) -> np.ndarray:
    """Which examples are used, in the order of their hash: all, or `limit` of them.

    The limit takes the hash's bytes from the other end, so it favours no split.
    """
    kept = np.argsort(hashes.byteswap(), kind="stable")[:limit]
    return kept[np.argsort(hashes[kept], kind="stable")]


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
