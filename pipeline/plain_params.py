"""params.yaml for stages that compute nothing: without torch, whose import takes seconds.

The whole file is checked all the same. What was found right, together with the code that found it
so, is remembered by its hash, and not checked again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.sections import PARAMS_FILE, PlainParams, check_types, hints
from pipeline.stage import project_root, whole_file
from pipeline.yaml_file import read_yaml
from vae.files import listed


def load_plain_params() -> PlainParams:
    """The sections of params.yaml but `objective` and `training`.

    Raises UserError that lists every fault of the file, those two sections' too.
    """
    if not _is_known_as_right():
        from pipeline.params import load_params

        with remembered_as_right():
            return load_params()
    content = read_yaml(PARAMS_FILE).content
    return PlainParams(
        **{
            name: section(**check_types(section, content[name])[0])
            for name, section in hints(PlainParams).items()
        }
    )


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


def _is_known_as_right() -> bool:
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
