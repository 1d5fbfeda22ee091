"""params.yaml for stages that compute nothing: without torch, whose import takes seconds.

The whole file is checked all the same. What was found right, together with the code that found it
so, is remembered by its hash, and not checked again.
"""

from __future__ import annotations

from pipeline.params.remembered import is_known_as_right, remembered_as_right
from pipeline.params.sections import PARAMS_FILE, PlainParams, check_types, hints
from pipeline.params.yaml_file import read_yaml


def load_plain_params() -> PlainParams:
    """The sections of params.yaml but `objective` and `training`.

    Raises UserError that lists every fault of the file, those two sections' too.
    """
    if not is_known_as_right():
        from pipeline.params.load import load_params

        with remembered_as_right():
            return load_params()
    content = read_yaml(PARAMS_FILE).content
    return PlainParams(
        **{
            name: section(**check_types(section, content[name])[0])
            for name, section in hints(PlainParams).items()
        }
    )
