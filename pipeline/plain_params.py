"""params.yaml for stages that compute nothing: without torch, whose import takes seconds.

The whole file is checked all the same. What was found right, together with the code that found it
so, is remembered by its hash, and not checked again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from pipeline.sections import PARAMS_FILE, PlainParams, check_types, hints
from pipeline.stage import project_root, whole_file
from pipeline.yaml_file import read_yaml


def load_plain_params() -> PlainParams:
    """The sections of params.yaml but `objective` and `training`.

    Raises UserError that lists every fault of the file, those two sections' too.
    """
    if not _is_known_as_right():
        from pipeline.params import load_params

        found = load_params()
        remember_as_right()
        return found
    content = read_yaml(PARAMS_FILE).content
    return PlainParams(
        **{
            name: section(**check_types(section, content[name])[0])
            for name, section in hints(PlainParams).items()
        }
    )


def remember_as_right() -> None:
    """Note that `pipeline.params.load_params` found no fault in params.yaml as it is now."""
    with whole_file(_note()) as fresh:
        fresh.write_text(_fingerprint())


def _is_known_as_right() -> bool:
    try:
        return _note().read_text() == _fingerprint()
    except FileNotFoundError:
        return False


def _note() -> Path:
    return project_root() / ".tightbound" / "params-checked"


def _fingerprint() -> str:
    """Of params.yaml and all code of ours."""
    digest = hashlib.sha256(PARAMS_FILE.read_bytes())
    root = Path(__file__).parents[1]
    for file in sorted([*root.glob("pipeline/*.py"), *root.glob("vae/*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()
