"""Data sets that can't be used: how each is made, the keys that name it, and what is told.

They are prepared in this process by the quick tests, and by the real command by the slow ones.
"""

from __future__ import annotations

import os
import pickle
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

NAME = "set"  # of the file or folder that data.root names, but for its suffix


@dataclass(frozen=True)
class BadData:
    """One bad set. make: writes it at a path. message: a regular expression that is told."""

    name: str
    source: str
    make: Callable[[Path], object]
    message: str
    suffix: str = ""
    keys: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> dict[str, Any]:
        """Make it in a folder; returns the keys of `data` that name it."""
        root = folder / f"{NAME}{self.suffix}"
        self.make(root)
        space = "continuous" if self.source == "table" else "grey8"
        return {"source": self.source, "root": str(root), "space": space} | self.keys


def grey(count: int = 20, height: int = 6, width: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width), dtype=np.uint8)


def table(rows: int = 200) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame({"a": rng.normal(size=rows), "b": rng.normal(5, 2, rows)})


def png_that_claims(width: int, height: int) -> bytes:
    """A small PNG whose header says that it is large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(2**20))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def folder_with(name: str | bytes, content: Callable[[Path], object]) -> Callable[[Path], object]:
    """Twenty good pictures and, under `name`, a bad one."""

    def make(root: Path) -> None:
        root.mkdir()
        for index, pixels in enumerate(grey()):
            Image.fromarray(pixels).save(root / f"{index:02d}.png")
        path = os.path.join(os.fsencode(root), name if isinstance(name, bytes) else name.encode())
        content(Path(os.fsdecode(path)))

    return make


def content(raw: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(raw)


def truncated(path: Path) -> None:
    Image.fromarray(grey(1, 64, 64)[0]).save(path)
    path.write_bytes(path.read_bytes()[:1500])


def picture(pixels: np.ndarray, format: str = "PNG") -> Callable[[Path], object]:
    return lambda path: Image.fromarray(pixels).save(path, format)


def equal_pictures(root: Path) -> None:
    root.mkdir()
    for index in range(30):
        Image.fromarray(np.full((4, 4), 7, np.uint8)).save(root / f"{index}.png")


def npz(**arrays: Any) -> Callable[[Path], object]:
    return lambda path: np.savez(path, **arrays)


def csv(text: str | bytes) -> Callable[[Path], object]:
    return content(text if isinstance(text, bytes) else text.encode())


def csv_of(change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], object]:
    return lambda path: change(table()).to_csv(path, index=False)


def with_value(value: Any) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        frame = frame.astype(object)
        frame.loc[7, "a"] = value
        return frame

    return change


def cut_parquet(path: Path) -> None:
    table().to_parquet(path)
    path.write_bytes(path.read_bytes()[:-100])


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("/tmp/tightbound-was-here",)


def loader(body: str) -> Callable[[Path], object]:
    def make(root: Path) -> None:
        root.mkdir()
        (root / "my_loader.py").write_text(f"def load(root):\n    {body}\n")

    return make


def circle(path: Path) -> None:
    path.symlink_to(path.parent)


HALF = grey() / 255
BAD_DATA = [
    BadData("nothing there", "folder", lambda root: None, r"set' does not exist"),
    BadData("empty folder", "folder", Path.mkdir, r"set holds no picture \(\.png, "),
    BadData("folder of text", "folder",
            lambda root: (root.mkdir(), (root / "a.txt").write_text("a")), r"it holds 1 \.txt"),
    BadData("file for folder", "folder", content(b"x"), r"set is a file; .* folder reads a folder"),
    BadData("device", "npz", lambda root: os.mkfifo(root), r"neither a file nor a folder"),
    BadData("no picture", "folder", folder_with("a.png", content(b"not a picture")),
            r"1 of 21 pictures cannot be used: a\.png: no PNG"),
    BadData("empty file", "folder", folder_with("a.png", content(b"")), r"a\.png: no PNG, JPEG"),
    BadData("truncated", "folder", folder_with("a.png", truncated), r"sizes|a\.png: .*truncated"),
    BadData("truncated, sized", "folder", folder_with("a.png", truncated),
            r"a\.png: .*truncated", keys={"size": 8, "channels": 1}),
    BadData("wrong extension", "folder", folder_with("a.jpg", content(b"GIF89a not a jpeg")),
            r"a\.jpg: no PNG, JPEG"),
    BadData("mixed sizes", "folder", folder_with("a.png", picture(grey(1, 9, 9)[0])),
            r"2 sizes, height by width: 6 by 5 \(.*\), 9 by 9 \(a\.png\); data\.size"),
    BadData("16 bits", "folder", folder_with("a.png", picture(grey(1)[0].astype(np.uint16) * 200)),
            r"a\.png: 16 bits a channel"),
    BadData("floats", "folder", folder_with("a.tiff", picture(HALF[0].astype(np.float32), "TIFF")),
            r"a\.tiff: pixels of kind F"),
    BadData("decompression bomb", "folder",
            folder_with("a.png", content(png_that_claims(2**15, 2**15))),
            r"a\.png: more than 67,108,864 pixels"),
    BadData("too many pixels", "folder",
            folder_with("a.png", content(png_that_claims(10_000, 10_000))),
            r"a\.png: 10000 by 10000 pixels; at most 67,108,864"),
    BadData("lying header", "folder", folder_with("a.png", content(png_that_claims(8000, 8000))),
            r"sizes|a\.png: "),
    BadData("all equal", "folder", equal_pictures, r"all 30 examples of folder are equal"),
    BadData("links in a circle", "folder", folder_with("more", circle),
            r"is a link that leads back to a folder above it"),
    BadData("link to nowhere", "folder",
            folder_with("a.png", lambda path: path.symlink_to("/nowhere/at/all.png")),
            r"a\.png is no file \(a link to nowhere"),
    BadData("pipe", "folder", folder_with("a.png", lambda path: os.mkfifo(path)),
            r"a\.png is no file"),
    BadData("name that is not UTF-8", "folder", folder_with(b"\xff\xfe.png", content(b"")),
            r"is not UTF-8; rename it"),
    BadData("too few", "folder", folder_with("a.png", picture(grey(1)[0])),
            r"of 21 examples \d+ fall into the (valid|test) split", keys={"test_fraction": 0.01}),
    BadData("folder for npz", "npz", Path.mkdir, r"set holds no numpy file"),
    BadData("no npz", "npz", content(b"not an archive"), r"set\.npz is no numpy file", ".npz"),
    BadData("empty npz", "npz", content(b""), r"set\.npz is no numpy file", ".npz"),
    BadData("cut npy", "npy",
            lambda path: (np.save(path, grey()), path.write_bytes(path.read_bytes()[:-50])),
            r"set\.npy is no numpy file, or a damaged one", ".npy"),
    BadData("objects in npz", "npz", npz(x=np.array([{}, {}], object)),
            r"pickled objects, which could run code", ".npz"),
    BadData("planted pickle", "npy", lambda path: path.write_bytes(pickle.dumps(Bomb())),
            r"pickled objects, which could run code", ".npy"),
    BadData("NaN", "npz", npz(x=np.where(grey() == grey()[3, 2, 2], np.nan, HALF)),
            r"NaN or infinity in row \d+ and \d+ more", ".npz"),
    BadData("inf", "npz", npz(x=np.where(grey() == grey()[3, 2, 2], np.inf, HALF)),
            r"NaN or infinity in row", ".npz"),
    BadData("floats up to 255", "npz", npz(x=grey().astype(float)),
            r"expected floats in \[0, 1\]", ".npz"),
    BadData("five axes", "npz", npz(x=grey()[:, None, None]), r"found \(20, 1, 1, 6, 5\)", ".npz"),
    BadData("four channels", "npz", npz(x=np.zeros((20, 6, 5, 4), np.uint8)),
            r"with 1 or 3 channels; found", ".npz"),
    BadData("labels too few", "npz", npz(x=grey(), y=np.arange(3)),
            r"20 examples and 3 values of label", ".npz"),
    BadData("equal arrays", "npz", npz(x=np.zeros((30, 2, 2), np.uint8)),
            r"all 30 examples of npz are equal", ".npz"),
    BadData("a table as images", "npy", lambda path: np.save(path, table().to_numpy()),
            r"data\.space: grey8 models 8-bit images, and npy holds real numbers", ".npy"),
    BadData("empty table", "table", csv(""), r"set\.csv is empty", ".csv"),
    BadData("header alone", "table", csv("a,b\n"), r"no row", ".csv"),
    BadData("a row too long", "table", csv("a,b\n1,2\n3,4,5\n"), r"#3: Expected 2 columns", ".csv"),
    BadData("all rows too long", "table", csv("a,b\n1,2,3\n4,5,6\n"), r"#2: Expected 2", ".csv"),
    BadData("a row too short", "table",
            lambda path: path.write_text(table().to_csv(index=False) + "7\n"),
            r"Row #202: Expected 2 columns, got 1", ".csv"),
    BadData("semicolons", "table", csv("a;b\n1;2\n"), r"expected commas", ".csv"),
    BadData("the same name twice", "table", csv("a,a\n1,2\n"), r"columns of the same name: 'a'",
            ".csv"),
    BadData("text in numbers", "table", csv_of(with_value("n/k")), r"'n/k' in row 7", ".csv"),
    BadData("infinite number", "table", csv_of(with_value(np.inf)), r"'a' is inf in row 7", ".csv"),
    BadData("missing value", "table", csv_of(with_value(np.nan)),
            r"1 of 200 rows have missing values \(the first: 0000007\)", ".csv"),
    BadData("categories", "table", csv_of(lambda frame: frame.assign(sex="f")),
            r"columns 'sex' are not numbers", ".csv"),
    BadData("constant column", "table", csv_of(lambda frame: frame.assign(c=3)),
            r"'c' has one value in the training split", ".csv"),
    BadData("far from zero", "table", csv_of(lambda frame: frame.assign(c=frame["a"] + 1e14)),
            r"'c' lies at 1e\+14 .* double precision cannot resolve", ".csv"),
    BadData("not UTF-8", "table", csv("größe,b\n1,2\n".encode("latin-1")), r"not text in UTF-8",
            ".csv"),
    BadData("binary for CSV", "table", csv(bytes(range(256)) * 9), r"not text in UTF-8|is no CSV",
            ".csv"),
    BadData("cut Parquet", "table", cut_parquet, r"is no Parquet table, or a damaged one",
            ".parquet"),
    BadData("text for Parquet", "table", csv("a,b\n1,2\n"), r"is no Parquet table", ".parquet"),
    BadData("unknown column", "table", csv_of(lambda frame: frame),
            r"data\.columns: there is no column 'c'; there are 'a', 'b'", ".csv",
            {"columns": ["a", "c"]}),
    BadData("loader that fails", "my_loader:load", loader("return 1 / 0"),
            r"failed in .*my_loader\.py, line 2: ZeroDivisionError"),
    BadData("loader that is not there", "my_loader:other", loader("return {}"),
            r"has no function 'other'"),
    BadData("torchvision without files", "torchvision:MNIST", Path.mkdir,
            r"torchvision:MNIST is not under .* and could not be downloaded"),
]  # fmt: skip
