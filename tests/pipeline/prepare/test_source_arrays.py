"""npz and npy: every layout and number of images, parts, labels, tables; nothing is unpickled."""

from __future__ import annotations

import os
import pickle
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.prepare.sources.arrays import image_layout, iterate_arrays, to_images
from pipeline.stage import UserError
from tests.pipeline.prepare.test_sources import load

GREY = np.random.default_rng(0).integers(0, 256, (12, 5, 7), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (12, 5, 7, 3), dtype=np.uint8)
CHANNELS_FIRST = COLOUR.transpose(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("given_x", "expected"),
    [
        (GREY, GREY[:, None]),
        (GREY[..., None], GREY[:, None]),
        (GREY[:, None], GREY[:, None]),
        (COLOUR, CHANNELS_FIRST),
        (CHANNELS_FIRST, CHANNELS_FIRST),
        (GREY.astype(np.int64), GREY[:, None]),
        (GREY / 255, GREY[:, None]),
        ((COLOUR / 255).astype(np.float32), CHANNELS_FIRST),
        (GREY > 127, np.where(GREY > 127, 255, 0)[:, None]),
    ],
)
@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_each_layout_and_number_gives_the_same_images(
    given_x: np.ndarray, expected: np.ndarray, suffix: str, tmp_path: Path
):
    path = tmp_path / f"My Images.{suffix}"
    np.save(path, given_x) if suffix == "npy" else np.savez_compressed(path, x=given_x)
    found = load(suffix, path)
    assert found.x.dtype == np.uint8
    np.testing.assert_array_equal(found.x, expected)
    assert found.id.tolist()[-1] == "0000011"
    assert found.dataset == "my-images"
    np.testing.assert_array_equal(np.concatenate(list(iterate_arrays(path, rows=5))), expected)


def test_floats_are_rounded_to_the_nearest_of_256_levels():
    x = np.array([0, 0.001, 0.002, 0.4999, 0.998, 1]).reshape(6, 1, 1)
    assert to_images(x, "NHW", "x").ravel().tolist() == [0, 0, 1, 127, 254, 255]


@pytest.mark.parametrize("name", ["labels", "y", "kind"])
def test_labels_groups_and_ids(name: str, tmp_path: Path):
    kinds = np.array([["cat"], ["dog"], ["cat"]] * 4)
    arrays = {"images": GREY, "group": np.arange(12) // 3, "id": np.arange(12) * 7, name: kinds}
    np.savez(tmp_path / "a.npz", **arrays)  # pyright: ignore[reportArgumentType]
    found = load("npz", tmp_path, label="kind" if name == "kind" else None, group="group")
    assert found.label.tolist() == [0, 1, 0] * 4
    assert found.classes == ("cat", "dog")
    assert found.group is not None
    assert found.group.tolist() == [str(index // 3) for index in range(12)]
    assert found.id.tolist() == [str(7 * index) for index in range(12)]


@pytest.mark.parametrize(
    "names",
    [("x_train", "y_train", "x_test", "y_test", "x_val", "y_val"),
     ("train_images", "train_labels", "test_images", "test_labels", "val_images", "val_labels")],
)  # fmt: skip
def test_parts_are_the_sources_own_splits(names: tuple[str, ...], tmp_path: Path):
    counts = {"train": 6, "test": 4, "val": 2}
    rows = np.split(np.arange(12), [6, 10])
    arrays = {}
    for part, index in zip(counts, rows, strict=True):
        images, labels = (name for name in names if part in name)
        arrays |= {images: GREY[index], labels: index}
    np.savez(tmp_path / "a.npz", **arrays)  # pyright: ignore[reportArgumentType]
    found = load("npz", tmp_path)
    assert found.split is not None
    assert found.split.tolist() == ["train"] * 6 + ["valid"] * 2 + ["test"] * 4
    np.testing.assert_array_equal(found.x[:, 0], GREY[found.label])
    assert found.id[6] == "valid-0000000"
    assert len(set(found.id.tolist())) == 12


def test_several_files_are_one_set(tmp_path: Path):
    np.save(tmp_path / "b.npy", GREY[5:])
    np.savez(tmp_path / "a.npz", x=GREY[:5])
    (tmp_path / "README.md").write_text("theirs")
    found = load("npy", tmp_path)
    np.testing.assert_array_equal(found.x[:, 0], GREY)
    assert (found.id[0], found.id[5]) == ("a-0000000", "b-0000000")


def test_rows_are_a_table(tmp_path: Path):
    x = np.random.default_rng(2).normal(size=(20, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    found = load("npy", tmp_path, space="continuous")
    assert found.columns == ("x0", "x1", "x2")
    assert found.x.dtype == np.float64
    np.testing.assert_array_equal(found.x, x)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((9, 3, 3), "NHW"), ((9, 3, 5, 5), "NCHW"), ((9, 3, 5, 1), None), ((9, 5, 5, 4), None),
     ((9, 1, 1, 1, 1), None), ((9, 2, 28, 3), "NHWC")],
)  # fmt: skip
def test_layouts_are_never_guessed(shape: tuple[int, ...], layout: str | None):
    if layout is None:
        with pytest.raises(UserError, match=re.escape(f"found {shape}")):
            image_layout(shape, "x")
    else:
        assert image_layout(shape, "x") == layout


WRONG = [
    ({"x": GREY.astype(float)}, r"expected floats in \[0, 1\] \(or whole numbers .* from 0 to 255"),
    ({"x": GREY.astype(int) * 2}, r"expected 0…255; found values from 0 to 5"),
    ({"x": GREY.astype(int) - 1}, r"expected 0…255; found values from -1"),
    ({"x": np.where(GREY[3, 2, 1] == GREY, np.nan, GREY / 255)}, r"NaN or infinity in row"),
    ({"x": np.full((4, 2, 2), np.inf)}, r"NaN or infinity in row 0 and 3 more"),
    ({"x": GREY.astype(str)}, r"expected whole numbers 0…255 or floats; found <U3"),
    ({"x": GREY.astype(complex)}, r"found complex128"),
    ({"x": np.float64(3)}, r"N at least 1; found \(\)"),
    ({"x": GREY[:0]}, r"N at least 1; found \(0, 5, 7\)"),
    ({"x": GREY, "y": np.arange(11)}, r"12 examples and 11 values of label"),
    ({"x": GREY, "id": np.arange(3)}, r"12 examples and 3 values of id"),
    ({"one": GREY, "two": GREY}, r"expected an array named x; found one, two"),
    ({}, r"expected an array named x; found no array at all"),
    ({"x_train": GREY, "x_test": COLOUR}, r"its parts differ: uint8 of shape \(1, 5, 7\) \(train-"),
]


@pytest.mark.parametrize(("arrays", "message"), WRONG)
def test_wrong_arrays_are_told(arrays: dict[str, np.ndarray], message: str, tmp_path: Path):
    np.savez(tmp_path / "a.npz", **arrays)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=message):
        load("npz", tmp_path / "a.npz")


def test_names_that_are_not_there_are_told(tmp_path: Path):
    np.savez(tmp_path / "a.npz", x=GREY, kind=GREY[:, 0, 0])
    with pytest.raises(UserError, match=r"holds no array 'knd'; it holds x, kind"):
        load("npz", tmp_path, label="knd")
    with pytest.raises(UserError, match=r"elsewhere' does not exist"):
        load("npz", tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no numpy file \(\.npz, \.npy\)"):
        load("npz", tmp_path / "empty")


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("/tmp/tightbound-was-here",)


@pytest.mark.parametrize("kind", ["npz", "npy", "bare pickle"])
def test_a_planted_pickle_is_refused_and_does_not_run(kind: str, tmp_path: Path):
    path = tmp_path / ("a.npz" if kind == "npz" else "a.npy")
    objects = np.array([Bomb()], dtype=object)
    if kind == "npz":
        np.savez(path, x=objects)
    elif kind == "npy":
        np.save(path, objects, allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="which could run code and are not read"):
        load("npz", path)
    assert not Path("/tmp/tightbound-was-here").exists()


def test_an_archive_that_unpacks_beyond_memory_is_refused_before_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.zeros((400, 100, 100), np.uint8))
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(os, "sysconf", lambda name: 2500)  # 2,500 pages of 2,500 bytes
    with pytest.raises(UserError, match=r"a\.npz unpacks to 0\.0 GB, and half of this machine's"):
        load("npz", path)


SHAPES = hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)
DTYPES = st.one_of(
    hnp.boolean_dtypes(), hnp.integer_dtypes(), hnp.floating_dtypes(), hnp.unicode_string_dtypes(),
    hnp.datetime64_dtypes(), hnp.complex_number_dtypes(),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(arrays=st.dictionaries(
    st.sampled_from(["x", "y", "id", "data", "x_train", "x_test", "y_test", "other"]),
    hnp.arrays(DTYPES, SHAPES), max_size=3))  # fmt: skip
def test_any_arrays_load_or_are_told(
    arrays: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory
):
    path = tmp_path_factory.mktemp("fuzz") / "a.npz"
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    try:
        found = load("npz", path)
    except UserError:
        return
    assert len(found.x) == len(found.id) == len(found.label) > 0
    assert found.x.dtype == (np.uint8 if found.columns is None else np.float64)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_to_a_file_is_told(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
):
    path = tmp_path_factory.mktemp("fuzz") / data.draw(st.sampled_from(["a.npz", "a.npy"]))
    np.savez(path, x=GREY, y=np.arange(12)) if path.suffix == ".npz" else np.save(path, GREY)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    with suppress(UserError):
        assert len(load("npz", path).x) > 0
