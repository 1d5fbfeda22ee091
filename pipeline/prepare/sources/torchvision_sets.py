"""`torchvision:<Name>`: torchvision's image classification sets, of 8 bits.

Reads what lies under `data.root`, else downloads it there. `torchvision:EMNIST:letters` names one
of several variants. A set's own test split, and validation split, is kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.params import DataParams
from pipeline.prepare.sources.examples import Examples, resolve_root, slug
from pipeline.prepare.sources.images import PictureError, pixels_of
from pipeline.stage import UserError
from vae.checks import did_you_mean

NO_CLASSIFICATION = ("DatasetFolder", "ImageFolder", "FakeData", "VisionDataset")
# Names of the splits of sets whose argument `split` is not only train and test.
_OWN_SPLITS: dict[str, dict[str, str]] = {
    "CelebA": {"train": "train", "valid": "valid", "test": "test"},
    "Country211": {"train": "train", "valid": "valid", "test": "test"},
    "DTD": {"train": "train", "valid": "val", "test": "test"},
    "FER2013": {"train": "train"},
    "FGVCAircraft": {"train": "train", "valid": "val", "test": "test"},
    "Flowers102": {"train": "train", "valid": "val", "test": "test"},
    "Imagenette": {"train": "train", "test": "val"},
    "OxfordIIITPet": {"train": "trainval", "test": "test"},
    "PCAM": {"train": "train", "valid": "val", "test": "test"},
    "RenderedSST2": {"train": "train", "valid": "val", "test": "test"},
}
_FIRST_VARIANT = {"EMNIST": "letters"}


def load(data: DataParams, scratch: Path) -> Examples:
    """All splits of the set that `data.source` names."""
    argument = data.source.partition(":")[2]
    name, _, variant = argument.partition(":")
    constructor = _torchvision_class(name)
    root = resolve_root(data.root)
    parts = []
    for split, arguments in _splits(constructor, variant).items():
        dataset = _open_torchvision(constructor, root, arguments, data)
        parts.append((split, *_stack_images(dataset, data, f"{data.source}, {split}")))
    return Examples(
        dataset=slug(argument),
        x=np.concatenate([x for _, x, _ in parts]),
        label=np.concatenate([label for _, _, label in parts]),
        id=np.array([f"{split}-{index:06d}" for split, x, _ in parts for index in range(len(x))]),
        split=np.repeat([split for split, _, _ in parts], [len(x) for _, x, _ in parts])
        if len(parts) > 1
        else None,
    )


def _torchvision_class(name: str) -> Callable[..., Any]:
    from torchvision import datasets

    names = [n for n in datasets.__all__ if n[0].isupper() and n not in NO_CLASSIFICATION]
    if name in names:
        return getattr(datasets, name)
    hint = did_you_mean(name, names, "torchvision:") or ", such as torchvision:MNIST"
    raise UserError(f"data.source: torchvision has no data set {name!r}{hint}")


def _splits(constructor: Callable[..., Any], variant: str) -> dict[str, dict[str, Any]]:
    """Constructor arguments for each split that the data set knows: by train, split or neither."""
    from torchvision.datasets import MNIST

    name = constructor.__name__
    known = inspect.signature(constructor).parameters
    given: dict[str, Any] = {}
    key = next((key for key in ("what", "split", "version") if key in known), None)
    if variant:
        if key is None or name in _OWN_SPLITS:
            raise UserError(f"data.source: {name} has no variants; got {variant!r}")
        given = {key: variant}
        if key == "what":  # it says which split, too
            return {"all": given}
    elif key and known[key].default is inspect.Parameter.empty:
        raise UserError(
            f"data.source: torchvision:{name} has several variants; name one, such as "
            f"torchvision:{name}:{_FIRST_VARIANT.get(name, '…')}"
        )
    if "train" in known or issubclass(constructor, MNIST):  # type: ignore[arg-type]
        return {"train": given | {"train": True}, "test": given | {"train": False}}
    if "background" in known:
        return {"train": {"background": True}, "test": {"background": False}}
    if name in _OWN_SPLITS:
        return {split: {"split": value} for split, value in _OWN_SPLITS[name].items()}
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
        reason = " ".join(str(error).split())
        raise UserError(
            f"data.source: {data.source} is not under {root} and could not be downloaded "
            f"({reason}); put torchvision's files there, or name their folder in data.root"
        ) from None


def _stack_images(
    dataset: Iterable[tuple[Any, Any]], data: DataParams, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """(image, label) pairs → x (N, C, H, W) uint8 and label (N,) int64."""
    size = len(dataset)  # type: ignore[arg-type]
    if not size:
        raise UserError(f"data.source: {what} holds no example")
    x = np.empty((0,), np.uint8)
    label = np.full(size, -1, np.int64)
    for index, (image, target) in zip(range(size), dataset, strict=False):
        pixels = _pixels(image, data, f"data.source: {what}, example {index}")
        if index == 0:
            x = np.empty((size, *pixels.shape), np.uint8)
        elif pixels.shape != x.shape[1:]:
            raise UserError(
                f"data.source: {what}: example {index} has shape {pixels.shape}, those before it "
                f"{x.shape[1:]}; data.size and data.channels make them one"
            )
        x[index] = pixels
        label[index] = target if isinstance(target, (int, np.integer)) else -1
    return x, label


def _pixels(image: Any, data: DataParams, where: str) -> np.ndarray:
    if not isinstance(image, Image.Image):
        raise UserError(f"{where} is {type(image).__name__}, and no picture")
    try:
        return pixels_of(image, channels=data.channels, size=data.image_size)
    except PictureError as error:
        raise UserError(f"{where}: {error}") from None
