"""`make experiment NAME=…`: a DVC experiment with the params of an overlay from experiments/.

An overlay is a part of params.yaml; `base` names another one that it builds on. The experiment runs
in a copy (`dvc exp run --temp`), so that params.yaml and reports/ stay as they are; interrupted,
the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.params import read_yaml
from pipeline.stage import UserError, project_root, run_stage, say
from vae.system import listed

FOLDER = Path("experiments")
BASE = "base"
_PLAIN = re.compile(r"[\w./:-]+")


def read_overlay(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """The params of an overlay by dotted key, those of what it builds on included.

    Raises UserError where there is no overlay of that name, where they build on each other, or
    where one holds something else.
    """
    chain: list[dict[str, Any]] = []
    seen: list[str] = []
    following: str | None = name
    while following is not None:
        if following in seen:
            raise UserError(f"{folder}: {' builds on '.join([*seen, following])}")
        seen.append(following)
        file = folder / f"{following}.yaml"
        if not file.is_file():
            known = ", ".join(path.stem for path in listed(folder, "*.yaml"))
            raise UserError(f"there is no {file}; there are: {known}")
        content = dict(read_yaml(file).content)
        following = content.pop(BASE, None)
        chain.append(dict(_flat(content, file)))
    return {key: value for values in reversed(chain) for key, value in values.items()}


def _flat(content: dict[str, Any], file: Path) -> Iterator[tuple[str, Any]]:
    for section, values in content.items():
        if not isinstance(values, dict):
            raise UserError(
                f"{file}: {section} is {values!r}; expected keys and values, as in params.yaml"
            )
        for key, value in values.items():
            yield f"{section}.{key}", value


def as_override(key: str, value: Any) -> str:
    """`key=value` as `dvc exp run -S` reads it."""
    return f"{key}={_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_shown, value))}]"
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    return json.dumps(value)


def run(name: str, changes: dict[str, str]) -> int:
    """Run the overlay `name` with `changes` on top; returns DVC's exit code."""
    params = {"data.root": str(project_root() / "data" / "own")} | read_overlay(name)
    overrides = [as_override(key, value) for key, value in params.items() if key not in changes]
    overrides += [f"{key}={value}" for key, value in changes.items()]
    command = ["dvc", "exp", "run", "--quiet", "--temp", "--force", "--name", name]
    for override in overrides:
        command += ["--set-param", override]
    code = subprocess.run(command).returncode
    if code == 0:
        say(f"experiment {name}: dvc exp show; dvc metrics diff HEAD {name}; dvc exp apply {name}")
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="an overlay: experiments/<name>.yaml")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="more params, on top of it")
    given = parser.parse_args()
    changes = dict(change.partition("=")[::2] for change in given.changes)
    sys.exit(run(given.name, changes))


if __name__ == "__main__":
    run_stage(main)
