"""Prepare: the split follows from content and seed, binarisation from its rule, outputs whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.params import DataParams
from pipeline.prepare import (
    assign_splits,
    binarize,
    check_space,
    chosen,
    content_hashes,
    count_duplicates,
    prepare,
)
from pipeline.stage import SPLITS, UserError, load_meta, load_split
from tests.pipeline.builders import DATA, TABLE
from tests.pipeline.prepare.test_sources import load, write_mnist


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 1, 4, 4), dtype=np.uint8)


def split_of(x: np.ndarray, data: DataParams = DATA) -> np.ndarray:
    return assign_splits(content_hashes(x, data.seed), None, data)


def test_added_data_moves_no_old_example():
    x = images(2000)
    np.testing.assert_array_equal(split_of(x)[:500], split_of(x[:500]))
    shuffled = np.random.default_rng(1).permutation(2000)
    np.testing.assert_array_equal(split_of(x[shuffled]), split_of(x)[shuffled])


def test_fractions_are_kept_to_sampling_error():
    assigned = split_of(images(40_000))
    expected = {"test": 0.2, "valid": 0.8 * 0.1, "train": 0.8 * 0.9}
    for name, fraction in expected.items():
        error = np.sqrt(fraction * (1 - fraction) / 40_000)
        assert (assigned == name).mean() == pytest.approx(fraction, abs=4 * error)


def test_another_seed_is_an_independent_split():
    x = images(40_000)
    both = (split_of(x) == "test") & (split_of(x, replace(DATA, seed=1)) == "test")
    assert both.mean() == pytest.approx(0.04, abs=4 * np.sqrt(0.04 * 0.96 / 40_000))


def test_equal_values_of_another_shape_or_type_hash_differently():
    x = images(3)
    hashes = [content_hashes(v, 0) for v in (x, x.reshape(3, 1, 2, 8), x.view(np.int8))]
    assert len(np.unique(hashes)) == 9


def test_the_sources_own_test_split_is_kept():
    x = images(20_000)
    is_test = np.arange(20_000) < 100
    assigned = assign_splits(content_hashes(x, 0), np.where(is_test, "test", "train"), DATA)
    np.testing.assert_array_equal(assigned == "test", is_test)
    assert (assigned == "valid").sum() == pytest.approx(0.1 * 19_900, abs=4 * 42.3)


def test_a_limit_favours_no_split_and_keeps_its_choice_when_data_is_added():
    hashes = content_hashes(images(40_000), 0)
    kept = chosen(hashes, 10_000)
    assert len(kept) == 10_000
    assert (np.diff(hashes[kept].astype(float)) >= 0).all()
    share = (assign_splits(hashes[kept], None, DATA) == "test").mean()
    assert share == pytest.approx(0.2, abs=4 * np.sqrt(0.2 * 0.8 / 10_000))
    before = chosen(hashes[:20_000], 10_000)
    assert {index for index in kept.tolist() if index < 20_000} <= set(before.tolist())
    np.testing.assert_array_equal(np.sort(chosen(hashes, None)), np.arange(40_000))


def test_duplicates_stay_together_and_are_counted():
    x = images(50)
    twice = np.concatenate([x, x[:10], x[:3]])
    hashes = content_hashes(twice, 0)
    assigned = assign_splits(hashes, None, DATA)
    np.testing.assert_array_equal(assigned[50:60], assigned[:10])
    assert count_duplicates(hashes, assigned) == {"all": 13, "across_splits": 0}
    own = np.where(np.arange(63) >= 60, "test", "train")
    own_test = assign_splits(hashes, own, replace(DATA, valid_fraction=1e-9))
    assert count_duplicates(hashes, own_test) == {"all": 13, "across_splits": 3}


class TestBinarize:
    data = replace(DATA, space="binary")

    def test_static_draws_ones_with_probability_grey_over_255(self):
        x = np.tile(np.array([0, 51, 204, 255], np.uint8), (4000, 1, 1, 1))
        hashes = np.arange(4000, dtype=np.uint64)
        drawn = binarize(x, hashes, self.data)
        assert set(np.unique(drawn)) == {0, 1}
        np.testing.assert_allclose(drawn.mean((0, 1, 2)), [0, 0.2, 0.8, 1], atol=4 * 0.0064)
        np.testing.assert_array_equal(drawn, binarize(x, hashes, self.data))

    def test_each_example_has_its_own_noise_whatever_else_there_is(self):
        x = np.full((2, 1, 28, 28), 128, np.uint8)
        hashes = np.array([7, 8], np.uint64)
        drawn = binarize(x, hashes, self.data)
        alone = binarize(x[1:], hashes[1:], self.data)
        np.testing.assert_array_equal(drawn[1:], alone)
        assert (drawn[0] != drawn[1]).mean() == pytest.approx(0.5, abs=4 * 0.5 / 28)

    def test_threshold_is_128(self):
        x = np.array([0, 127, 128, 255], np.uint8).reshape(1, 1, 1, 4)
        data = replace(self.data, binarization="threshold")
        drawn = binarize(x, np.zeros(1, np.uint64), data)
        assert drawn.ravel().tolist() == [0, 0, 1, 1]


def test_prepared_digits_are_the_sources_own(tmp_path: Path):
    meta = prepare(DATA, tmp_path / "prepared")
    source = load("mnist5k")
    row = {name: index for index, name in enumerate(source.id.tolist())}
    seen: list[int] = []
    for name in SPLITS:
        split = load_split(tmp_path / "prepared", name)
        rows = [row[id] for id in split.id.tolist()]
        np.testing.assert_array_equal(split.x, source.x[rows])
        np.testing.assert_array_equal(split.label, source.label[rows])
        assert meta.counts[name] == len(split)
        seen += rows
    assert sorted(seen) == list(range(5000))
    assert meta == load_meta(tmp_path / "prepared")
    assert meta.num_classes == 10
    assert meta.data_shape == (1, 28, 28)


@pytest.fixture
def toy(tmp_path: Path) -> DataParams:
    """40 random pictures in the files of MNIST, 10 of them its test split."""
    write_mnist(tmp_path / "files")
    files = str(tmp_path / "files")
    return replace(DATA, source="torchvision:MNIST", root=files, valid_fraction=0.3)


def test_the_same_command_gives_the_same_hash_and_another_seed_another(
    toy: DataParams, tmp_path: Path
):
    first = prepare(toy, tmp_path / "first")
    assert first == prepare(toy, tmp_path / "again")
    assert first.hash != prepare(replace(toy, seed=1), tmp_path / "other").hash


def test_each_binarisation_of_a_torchvision_set(tmp_path: Path):
    arrays = write_mnist(tmp_path)
    common = replace(DATA, source="torchvision:MNIST", root=str(tmp_path), space="binary")
    grey = np.concatenate([arrays["train"], arrays["t10k"]])
    for rule in ("dynamic", "static", "threshold"):
        out = tmp_path / rule
        meta = prepare(replace(common, binarization=rule, valid_fraction=0.3), out)
        assert meta.counts["test"] == 10
        assert meta.own_test_split
        assert meta.binarization == rule
        splits = {name: load_split(out, name) for name in SPLITS}
        for name in SPLITS:
            is_grey = rule == "dynamic" and name == "train"
            assert splits[name].x.max() == (255 if is_grey else 1)
        for id, x in zip(splits["valid"].id.tolist(), splits["valid"].x, strict=True):
            pixels = grey[int(id.split("-")[1])]
            assert not x[0][pixels == 0].any()
            assert x[0][pixels == 255].all()
            if rule == "threshold":
                np.testing.assert_array_equal(x[0], pixels >= 128)


def test_an_example_is_known_again_by_its_content_under_any_seed_or_binarisation(
    toy: DataParams, tmp_path: Path
):
    def found(name: str, **changes: object) -> dict[str, int]:
        prepare(replace(toy, valid_fraction=0.3, **changes), tmp_path / name)
        splits = [load_split(tmp_path / name, split) for split in SPLITS]
        return {id: h for s in splits for id, h in zip(s.id.tolist(), s.content, strict=True)}

    grey = found("grey")
    assert len(set(grey.values())) == len(grey) == 40
    assert found("seed", seed=1) == grey
    assert found("binary", space="binary") == grey
    assert found("static", space="binary", binarization="static", seed=2) == grey


def test_the_preview_shows_the_first_examples(toy: DataParams, tmp_path: Path):
    prepare(toy, tmp_path / "prepared")
    page = np.asarray(Image.open(tmp_path / "prepared" / "preview.png"))
    train = load_split(tmp_path / "prepared", "train")
    assert page.shape == (3 * 4 * 29, 16 * 29)
    np.testing.assert_array_equal(page[:28, 29:57], train.x[1, 0])


def test_a_failure_leaves_the_earlier_output_and_nothing_half_written(
    toy: DataParams, tmp_path: Path
):
    out = tmp_path / "out" / "prepared"
    before = prepare(toy, out)
    with pytest.raises(UserError, match="does not exist"):
        prepare(replace(toy, source="folder", root="nowhere"), out)
    with pytest.raises(
        UserError, match=r"of 40 examples 0 fall into the valid split; expected at "
    ):
        prepare(replace(toy, valid_fraction=0.001), out)
    assert load_meta(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["prepared"]


def test_examples_that_are_no_points_of_the_space():
    with pytest.raises(UserError, match=r"data\.space: continuous models real numbers, and npy ho"):
        check_space(images(3), replace(TABLE, source="npy"))
    with pytest.raises(UserError, match=r"data\.space: grey8 models 8-bit images, and mnist5k ho"):
        check_space(np.ones((3, 4)), DATA)
    with pytest.raises(UserError, match=r"all 4 examples of mnist5k are equal"):
        check_space(np.repeat(images(1), 4, axis=0), DATA)
