"""data/prepared: what is written is read back, and damage is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.stage import (
    SPLITS,
    Split,
    UserError,
    content_hash,
    load_meta,
    load_split,
    prepared_data,
    write_prepared,
)
from tests.pipeline import builders

FACTS = {
    "dataset": "toy",
    "source": "toy",
    "space": "grey8",
    "binarization": None,
    "duplicates": {"all": 0, "across_splits": 0},
    "own_test_split": False,
    "num_classes": 3,
}


def toy(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: type = np.uint8
) -> dict[str, Split]:
    def split(count: int) -> Split:
        values = (
            rng.integers(0, 256, (count, *shape))
            if dtype is np.uint8
            else rng.normal(size=(count, *shape))
        )
        return builders.split(
            values.astype(dtype),
            [f"ä{index}" for index in range(count)],
            label=rng.integers(-1, 3, count),
        )

    return {"train": split(21), "valid": split(3), "test": split(5)}


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 4, 3), np.uint8), ((3, 5, 7), np.uint8), ((6,), np.float64)]
)
@pytest.mark.parametrize("rows_per_shard", [4, 7, 1000])
def test_round_trip_over_any_number_of_shards(
    shape: tuple[int, ...],
    dtype: type,
    rows_per_shard: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(prepared_data, "ROWS_PER_SHARD", rows_per_shard)
    splits = toy(np.random.default_rng(0), shape, dtype)
    written = write_prepared(tmp_path, splits, **FACTS)
    assert load_meta(tmp_path) == written
    assert written.counts == {"train": 21, "valid": 3, "test": 5}
    assert written.num_values == int(np.prod(shape))
    assert len(list((tmp_path / "train").iterdir())) == -(-21 // rows_per_shard)
    for name in SPLITS:
        found = load_split(tmp_path, name)
        assert found.x.dtype == dtype
        np.testing.assert_array_equal(found.x, splits[name].x)
        np.testing.assert_array_equal(found.label, splits[name].label)
        np.testing.assert_array_equal(found.id, splits[name].id)
        np.testing.assert_array_equal(found.content, splits[name].content)


def test_large_examples_lie_in_shards_of_few():
    def lengths(count: int, example_bytes: int) -> list[int]:
        rows = list(prepared_data.shard_rows(count, example_bytes))
        assert rows[0].start == 0
        assert rows[-1].stop == count
        return [part.stop - part.start for part in rows]

    assert lengths(20_000, 784) == [8192, 8192, 3616]
    assert lengths(3_000, 64 * 64 * 3) == [1365, 1365, 270]
    assert lengths(3, 2**25) == [1, 1, 1]
    assert lengths(0, 784) == [0]


def test_the_hash_sees_every_value_id_label_shape_and_the_space(tmp_path: Path):
    def fresh() -> dict[str, Split]:
        return toy(np.random.default_rng(1), (1, 2, 3))

    hashes = [content_hash(fresh(), "grey8"), content_hash(fresh(), "binary")]
    for field in ("x", "label", "id"):
        splits = fresh()
        values = getattr(splits["test"], field)
        values[-1] = values[-1] + 1 if field != "id" else "other"
        hashes.append(content_hash(splits, "grey8"))
    reshaped = {k: replace(v, x=v.x.reshape(-1, 1, 3, 2)) for k, v in fresh().items()}
    moved = fresh()
    moved["valid"], moved["test"] = moved["test"], moved["valid"]
    hashes += [content_hash(reshaped, "grey8"), content_hash(moved, "grey8")]
    assert len(set(hashes)) == len(hashes)
    assert content_hash(fresh(), "grey8") == hashes[0]


def test_damage_is_named(tmp_path: Path):
    write_prepared(tmp_path, toy(np.random.default_rng(2), (1, 2, 2)), **FACTS)
    shard = tmp_path / "train" / "00000.parquet"
    raw = shard.read_bytes()
    shard.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(
        UserError, match=r"train/00000\.parquet is damaged .*`dvc checkout` restores"
    ):
        load_split(tmp_path, "train")
    shard.unlink()
    with pytest.raises(UserError, match=r"train holds no Parquet file"):
        load_split(tmp_path, "train")


def test_meta_of_another_shape_or_version_is_refused(tmp_path: Path):
    write_prepared(tmp_path, toy(np.random.default_rng(3), (1, 2, 2)), **FACTS)
    path = tmp_path / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"data_shape": [1, 2, 3]}))
    with pytest.raises(UserError, match=r"shape \(1, 2, 2\); meta\.json says \(1, 2, 3\)"):
        load_split(tmp_path, "valid")
    path.write_text(json.dumps(meta | {"extra": 1}))
    with pytest.raises(UserError, match=r"not what prepare writes"):
        load_meta(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"meta\.json is missing; `dvc repro` makes it"):
        load_meta(tmp_path)
