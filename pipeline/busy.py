"""Before `make run`: DVC lets one command at a time work on an output; told in a sentence."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import psutil

from pipeline.stage import UserError, project_root, run_stage

LOCKS = Path(".dvc/tmp/rwlock")  # {"read": {path: [holder]}, "write": {path: holder}}


def holders() -> dict[int, str]:
    """Process ids and commands of the living DVC processes that hold a lock in this project."""
    try:
        locks = json.loads((project_root() / LOCKS).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    held = list(locks.get("write", {}).values())
    held += [holder for readers in locks.get("read", {}).values() for holder in readers]
    return {holder["pid"]: holder["cmd"] for holder in held if _is_dvc(holder["pid"])}


def _is_dvc(process: int) -> bool:
    with suppress(psutil.Error):
        return any("dvc" in word for word in psutil.Process(process).cmdline())
    return False


def main() -> None:
    """Raises UserError naming who is at work."""
    for process, command in holders().items():
        raise UserError(
            f"another run is at work in this project (process {process}: {command}); "
            "wait for its end, or end it, and run the same command again"
        )


if __name__ == "__main__":
    run_stage(main)
