"""What of params.yaml was found right, remembered by its hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.params.sections import PARAMS_FILE
from pipeline.stage import project_root, whole_file
from vae.system import listed


@contextmanager
def remembered_as_right() -> Iterator[None]:
    """Note that `pipeline.params.load_params`, in the block, found no fault in params.yaml.

    Not where the file changed meanwhile: which text was found right is unknown then.
    """
    before = _fingerprint()
    yield
    if before is not None and _fingerprint() == before:
        with whole_file(_note()) as fresh:
            fresh.write_text(before)


def is_known_as_right() -> bool:
    """Whether this very params.yaml was found right, by this very code."""
    try:
        return _note().read_text() == _fingerprint()
    except FileNotFoundError:
        return False


def _note() -> Path:
    return project_root() / ".tightbound" / "params-checked"


def _fingerprint() -> str | None:
    """Of params.yaml and all code of ours; None where the file can't be read."""
    try:
        digest = hashlib.sha256(PARAMS_FILE.read_bytes())
    except OSError:
        return None
    root = Path(__file__).parents[1]
    for file in [*listed(root / "pipeline", "**/*.py"), *listed(root / "vae", "**/*.py")]:
        digest.update(file.read_bytes())
    return digest.hexdigest()
