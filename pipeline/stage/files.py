"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.stage.faults import UserError
from vae.system import scratch_directory


def project_root() -> Path:
    """The user's repository, also from DVC's temporary copy of it (`dvc exp run --temp`).

    Stores that outlive a run (registry, artifacts, Ray's runs) resolve against it.
    """
    here = Path.cwd().resolve()
    for folder in (here, *here.parents):
        if folder.match(".dvc/tmp/exps"):
            return folder.parents[2]
    return Path(os.environ.get("DVC_ROOT", here)).resolve()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that takes `path`'s place only if the block succeeds."""
    path = Path(path)
    with scratch_directory(path.parent, path.name) as folder:
        yield folder / path.name
        (folder / path.name).replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON with sorted structure kept, NaN refused, whole or not at all."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with whole_file(path) as fresh:
        fresh.write_text(text)


def read_json(path: Path) -> Any:
    """Read JSON; raises UserError naming the file when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; `dvc repro` makes it") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); `dvc repro --force` remakes it"
        ) from None
