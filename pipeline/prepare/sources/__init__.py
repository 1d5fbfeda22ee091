"""Data sources: `data.source` → examples as arrays. A new source is one function and one row.

A source reads `data.root` or brings its own data, and knows nothing of splits and spaces, but for
splits of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.params import DataParams
from pipeline.prepare.sources import arrays, digits, folder, module, table, torchvision_sets
from pipeline.prepare.sources.examples import Examples

__all__ = ["Examples", "load_source"]

SOURCES: dict[str, Callable[[DataParams, Path], Examples]] = {
    "mnist5k": digits.load,
    "torchvision": torchvision_sets.load,
    "folder": folder.load,
    "npz": arrays.load,
    "npy": arrays.load,
    "table": table.load,
}


def load_source(data: DataParams, scratch: Path) -> Examples:
    """The examples of `data.source`; whatever is no name of ours is the user's `module:function`.

    scratch: an existing folder with room for the decoded examples; nothing is left in it.
    Raises UserError where the examples can't be had.
    """
    return SOURCES.get(data.source_name, module.load)(data, scratch)
