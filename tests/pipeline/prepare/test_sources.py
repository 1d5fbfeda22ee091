"""Data sources: the embedded digits, and torchvision's sets read from files made here."""

from __future__ import annotations

import pickle
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from pipeline.prepare.sources import load_source
from pipeline.prepare.sources.examples import Examples
from pipeline.stage import UserError
from tests.pipeline.builders import DATA


def load(source: str, root: Path | str = "data/own", **changes: Any) -> Examples:
    data = replace(DATA, source=source, root=str(root), **changes)
    with TemporaryDirectory() as scratch:
        return load_source(data, Path(scratch))


def write_idx(path: Path, values: np.ndarray) -> None:
    """The format of the MNIST files: magic number, sizes (big-endian), bytes."""
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + values.astype(np.uint8).tobytes())


def write_mnist(root: Path, name: str = "MNIST") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 30), ("t10k", 10)):
        arrays[split] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{split}-label"] = rng.integers(0, 10, count)
        write_idx(root / name / "raw" / f"{split}-images-idx3-ubyte", arrays[split])
        write_idx(root / name / "raw" / f"{split}-labels-idx1-ubyte", arrays[f"{split}-label"])
    return arrays


def test_mnist5k_is_500_real_digits_of_each_class():
    digits = load("mnist5k")
    assert digits.dataset == "mnist5k"
    assert digits.x.shape == (5000, 1, 28, 28)
    assert digits.x.dtype == np.uint8
    assert (digits.x.min(), digits.x.max()) == (0, 255)
    np.testing.assert_array_equal(np.bincount(digits.label), np.full(10, 500))
    assert len(set(digits.id.tolist())) == 5000
    assert digits.split is None
    # Known content: MNIST's ink covers 19% of a digit, and corners are empty.
    assert (digits.x > 0).mean() == pytest.approx(0.191, abs=0.003)
    assert not digits.x[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]].any()
    assert sha256(digits.x.tobytes()).hexdigest().startswith("2913c6b6527114b7307e1086335a7665")


@pytest.mark.parametrize(("source", "name"), [("MNIST", "mnist"), ("FashionMNIST", "fashionmnist")])
def test_torchvision_reads_the_files_under_root_and_keeps_the_test_split(
    source: str, name: str, tmp_path: Path
):
    arrays = write_mnist(tmp_path, source)
    found = load(f"torchvision:{source}", tmp_path)
    assert found.dataset == name
    np.testing.assert_array_equal(found.x[:30, 0], arrays["train"])
    np.testing.assert_array_equal(found.x[30:, 0], arrays["t10k"])
    np.testing.assert_array_equal(
        found.label, np.concatenate([arrays["train-label"], arrays["t10k-label"]])
    )
    assert found.split is not None
    assert found.split.tolist() == ["train"] * 30 + ["test"] * 10
    assert found.id[0] == "train-000000"
    assert found.id[30] == "test-000000"
    assert len(set(found.id.tolist())) == 40


def test_torchvision_colour_images_keep_channels_first(tmp_path: Path, monkeypatch):
    from torchvision.datasets import CIFAR10

    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for name in names:
        entry = {"data": pixels.reshape(5, -1), "labels": [0, 1, 2, 3, 4]}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    found = load("torchvision:CIFAR10", tmp_path)
    assert found.x.shape == (30, 3, 32, 32)
    np.testing.assert_array_equal(found.x[:5], pixels)
    assert found.split is not None
    assert found.split.tolist() == ["train"] * 25 + ["test"] * 5


def test_a_relative_root_is_the_projects_also_in_dvcs_temporary_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_mnist(tmp_path / "files")
    copy = tmp_path / ".dvc" / "tmp" / "exps" / "standalone" / "tmp123"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    found = load("torchvision:MNIST", "files")
    assert len(found.x) == 40


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torchvision:MNITS", r"no data set 'MNITS'; did you mean torchvision:MNIST\?"),
        ("torchvision:MNIST:letters", r"MNIST has no variants; got 'letters'"),
        ("torchvision:EMNIST", r"EMNIST has several variants; name one, .*EMNIST:letters"),
        ("torchvision:ImageFolder", r"torchvision has no data set 'ImageFolder'"),
    ],
)
def test_an_unknown_source_is_told_with_the_nearest(source: str, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        load(source, tmp_path)


def test_files_that_are_neither_there_nor_to_be_had(tmp_path: Path, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(UserError, match=rf"torchvision:MNIST is not under {tmp_path} and could no"):
        load("torchvision:MNIST", tmp_path)


def test_kmnist_and_a_variant_of_emnist_are_read_as_their_files_are(tmp_path: Path):
    arrays = write_mnist(tmp_path, "KMNIST")
    found = load("torchvision:KMNIST", tmp_path)
    np.testing.assert_array_equal(found.x[:30, 0], arrays["train"])
    for part, name in (("train", "train"), ("t10k", "test")):
        for kind in ("images-idx3", "labels-idx1"):
            old = tmp_path / "KMNIST" / "raw" / f"{part}-{kind}-ubyte"
            new = tmp_path / "EMNIST" / "raw" / f"emnist-letters-{name}-{kind}-ubyte"
            new.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(old.read_bytes())
    found = load("torchvision:EMNIST:letters", tmp_path)
    assert found.dataset == "emnist-letters"
    np.testing.assert_array_equal(found.x[30:, 0], arrays["t10k"])
    assert found.split is not None
    assert found.split.tolist() == ["train"] * 30 + ["test"] * 10


def test_svhn_is_read_as_its_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)
    pixels = np.random.default_rng(2).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    for part in ("train", "test"):
        content = {"X": pixels.transpose(1, 2, 3, 0), "y": np.array([[1, 2, 10, 4, 5, 6]]).T}
        savemat(tmp_path / f"{part}_32x32.mat", content)
    found = load("torchvision:SVHN", tmp_path)
    np.testing.assert_array_equal(found.x[:6], pixels.transpose(0, 3, 1, 2))
    assert found.label[:6].tolist() == [1, 2, 0, 4, 5, 6]
    assert found.split is not None
    assert found.split.tolist() == ["train"] * 6 + ["test"] * 6
