"""Pictures: each format and kind of pixel, sizes, labels and splits from folders, and by Ray."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.prepare.sources import folder
from pipeline.prepare.sources.folder import RAY_FILES, places, run_in_parallel, unnamed_array
from pipeline.prepare.sources.images import (
    LARGEST_PIXELS,
    Header,
    PictureError,
    decode_picture,
    read_header,
)
from pipeline.stage import UserError
from tests.pipeline.prepare.test_sources import load

GREY = Image.fromarray(np.array([[10, 200]], np.uint8))
COLOUR = Image.fromarray(np.array([[[10, 20, 30], [200, 0, 255]]], np.uint8))
PALETTE = Image.fromarray(np.array([[0, 1]], np.uint8))
PALETTE.putpalette([10, 20, 30, 200, 0, 255])
HALF = Image.fromarray(np.array([[[10, 20, 30, 255], [0, 100, 200, 0]]], np.uint8))
GREY_HALF = Image.fromarray(np.array([[[10, 255], [200, 0]]], np.uint8))


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def noise(count: int, height: int = 6, width: int = 5, channels: int = 1) -> np.ndarray:
    shape = (count, height, width) if channels == 1 else (count, height, width, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def pictures(root: Path, arrays: np.ndarray, pattern: str = "{index:03d}.png") -> None:
    for index, pixels in enumerate(arrays):
        save(Image.fromarray(pixels), root / pattern.format(index=index))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (GREY, [[[10, 200]]]),
        (Image.fromarray(np.array([[False, True]])), [[[0, 255]]]),
        (COLOUR, [[[10, 200]], [[20, 0]], [[30, 255]]]),
        (PALETTE, [[[10, 200]], [[20, 0]], [[30, 255]]]),
        (HALF, [[[10, 255]], [[20, 255]], [[30, 255]]]),
        (GREY_HALF, [[[10, 255]]]),
    ],
    ids=["grey", "black and white", "rgb", "palette", "rgba over white", "grey over white"],
)
def test_pictures_become_grey_or_rgb(image: Image.Image, expected: Any, tmp_path: Path):
    path = save(image, tmp_path / "a.png")
    np.testing.assert_array_equal(decode_picture(path), expected)
    assert read_header(path) == np.shape(expected)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "jpg"])
def test_each_format_gives_its_pixels(suffix: str, tmp_path: Path):
    pixels = np.kron(noise(1, 4, 4, 3)[0], np.ones((8, 8, 1), np.uint8))
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}
    path = save(Image.fromarray(pixels), tmp_path / f"a.{suffix}", **options.get(suffix, {}))
    loss = 4 if suffix == "jpg" else 0
    np.testing.assert_allclose(decode_picture(path), pixels.transpose(2, 0, 1), atol=loss)


def test_cmyk_becomes_rgb(tmp_path: Path):
    path = save(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), tmp_path / "a.jpg", quality=100)
    np.testing.assert_allclose(decode_picture(path)[:, 4, 4], [0, 255, 255], atol=4)


def test_a_photo_is_turned_upright_by_its_exif_tag(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    path = save(GREY, tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(decode_picture(path), [[[10], [200]]])
    assert read_header(path) == Header(1, 2, 1)


def test_grey_and_colour_into_each_other(tmp_path: Path):
    path = save(COLOUR, tmp_path / "a.png")
    # ITU-R 601-2: 0.299 R + 0.587 G + 0.114 B
    assert decode_picture(path, channels=1).tolist() == [[[18, 89]]]
    path = save(GREY, tmp_path / "b.png")
    assert decode_picture(path, channels=3).tolist() == [[[10, 200]]] * 3


def test_size_scales_and_crops_the_longer_side_evenly(tmp_path: Path):
    pixels = np.repeat(np.array([[7, 50, 60, 9]], np.uint8), 20, 0).repeat(10, 1)  # 20 by 40
    path = save(Image.fromarray(pixels), tmp_path / "a.png")
    found = decode_picture(path, size=(10, 10))[0]
    assert found.shape == (10, 10)
    np.testing.assert_allclose(found[:, 1:4], 50, atol=1)
    np.testing.assert_allclose(found[:, 6:9], 60, atol=1)
    assert decode_picture(path, size=(40, 30)).shape == (1, 40, 30)
    np.testing.assert_array_equal(decode_picture(path, size=(20, 40))[0], pixels)


def many_frames(path: Path) -> None:
    GREY.save(path, save_all=True, append_images=[GREY.point(lambda level: level + 1)])


def too_large(path: Path) -> None:
    """A PNG of a few bytes that says it has more pixels than may be decoded."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    head = struct.pack(">IIBBBBB", 2**14, 2**13, 1, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(2**14))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def truncated(path: Path) -> None:
    Image.fromarray(noise(1, 64, 64)[0]).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def sixteen_bits(path: Path) -> None:
    Image.fromarray(np.array([[1, 60_000]], np.uint16)).save(path)


FAULTY: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: path.write_bytes(b"not a picture"), "no PNG, JPEG, WebP, BMP or TIFF picture"),
    (lambda path: path.write_bytes(b""), "no PNG, JPEG, WebP, BMP or TIFF picture"),
    (truncated, "truncated"),
    (sixteen_bits, "16 bits a channel; save it with 8 bits"),
    (lambda path: Image.fromarray(np.ones((2, 2), np.float32)).save(path, "TIFF"), "of kind F"),
    (many_frames, "2 pages or frames"),
    (too_large, f"16384 by 8192 pixels; at most {LARGEST_PIXELS:,}"),
    (lambda path: GREY.save(path, "GIF"), "no PNG, JPEG, WebP, BMP or TIFF picture"),
    (lambda path: path.mkdir(), "Is a directory"),
]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("make", "reason"), FAULTY)
def test_what_is_no_picture_of_ours_is_told(
    make: Callable[[Path], object], reason: str, tmp_path: Path
):
    path = tmp_path / "a.png"
    make(path)
    with pytest.raises(PictureError, match=reason):
        decode_picture(path)
    content = path.read_bytes() if path.is_file() else b""
    if content:
        with pytest.raises(PictureError, match=reason):
            decode_picture(content)


def test_a_folder_of_pictures(tmp_path: Path):
    arrays = noise(30)
    pictures(tmp_path / "My Pictures", arrays)
    (tmp_path / "My Pictures" / "notes.txt").write_text("about them")
    (tmp_path / "My Pictures" / ".hidden.png").write_text("no picture")
    found = load("folder", tmp_path / "My Pictures")
    np.testing.assert_array_equal(found.x[:, 0], arrays)
    assert found.id.tolist() == [f"{index:03d}.png" for index in range(30)]
    assert found.label.tolist() == [-1] * 30
    assert (found.dataset, found.split, found.classes) == ("my-pictures", None, None)
    assert found.notes == ("left out, being no pictures: 1 .txt",)


def test_subfolders_are_labels_and_named_splits_are_kept(tmp_path: Path):
    split, label, classes = places(["b/1.png", "a/2.png", "a/deep/3.png", "4.png"], "here")
    assert (split, label.tolist(), classes) == (None, [1, 0, 0, -1], ("a", "b"))
    split, label, classes = places(["train/cat/1.png", "val/cat/2.png", "test/dog/3.png"], "here")
    assert split is not None
    assert split.tolist() == ["train", "valid", "test"]
    assert (label.tolist(), classes) == ([0, 0, 1], ("cat", "dog"))
    split, label, classes = places(["train/1.png", "plane/2.png"], "here")
    assert (split, label.tolist(), classes) == (None, [1, 0], ("plane", "train"))


def test_grey_and_colour_in_one_folder_become_colour(tmp_path: Path):
    save(GREY, tmp_path / "a.png")
    save(COLOUR, tmp_path / "b.png")
    assert load("folder", tmp_path).x.shape == (2, 3, 1, 2)
    assert load("folder", tmp_path, channels=1).x.shape == (2, 1, 1, 2)
    assert load("folder", tmp_path, channels=3, size=(4, 3)).x.shape == (2, 3, 4, 3)


def test_mixed_sizes_are_refused_and_size_makes_them_one(tmp_path: Path):
    save(GREY, tmp_path / "a.png")
    save(GREY.resize((5, 4)), tmp_path / "b.png")
    with pytest.raises(UserError, match=r"2 sizes, height by width: 1 by 2 \(a.png\), 4 by 5 \(b"):
        load("folder", tmp_path)
    assert load("folder", tmp_path, size=3).x.shape == (2, 1, 3, 3)


@pytest.mark.parametrize("size", [None, 6])
def test_faulty_files_are_counted_and_named(size: int | None, tmp_path: Path):
    pictures(tmp_path, noise(10))
    for index in range(3):
        (tmp_path / f"b{index}.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"3 of 13 pictures cannot be used: b0\.png: no PNG, .* b1"):
        load("folder", tmp_path, size=size, channels=size and 1)


def test_links_are_followed_but_never_in_circles(tmp_path: Path):
    pictures(tmp_path / "here", noise(3))
    pictures(tmp_path / "elsewhere", noise(2))
    (tmp_path / "here" / "more").symlink_to(tmp_path / "elsewhere")
    assert len(load("folder", tmp_path / "here").x) == 5
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "here")
    with pytest.raises(UserError, match=r"back is a link that leads back to a folder above it"):
        load("folder", tmp_path / "here")


@pytest.mark.slow
def test_ray_data_gives_what_threads_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    arrays = noise(40)
    pictures(tmp_path, arrays)
    (tmp_path / "040.png").write_bytes(b"nothing")
    with pytest.raises(UserError) as by_threads:
        load("folder", tmp_path)
    monkeypatch.setattr(folder, "RAY_FILES", 10)
    monkeypatch.setattr(folder, "BATCH_FILES", 8)
    with pytest.raises(UserError) as by_ray:
        load("folder", tmp_path)
    assert str(by_ray.value) == str(by_threads.value)
    (tmp_path / "040.png").unlink()
    for given in ({}, {"size": (6, 5), "channels": 1}):
        np.testing.assert_array_equal(load("folder", tmp_path, **given).x[:, 0], arrays)
    assert "Dataset" not in capfd.readouterr().err


def test_batches_come_in_order_and_none_is_lost():
    files = [Path(f"{index}") for index in range(1000)]
    assert len(files) < RAY_FILES
    found = [name for batch in run_in_parallel(lambda part: [f.name for f in part], files)
             for name in batch]  # fmt: skip
    assert found == [str(index) for index in range(1000)]


def test_decoded_pictures_lie_in_a_file_without_a_name(tmp_path: Path):
    x = unnamed_array((3, 2), tmp_path)
    x[:] = 7
    assert list(tmp_path.iterdir()) == []
    assert x.tolist() == [[7, 7]] * 3
    with pytest.raises(OSError, match=r"No space left|too large"):
        unnamed_array((2**50,), tmp_path)
