"""Before `make run`: what DVC would say in its own words, said for people.

The data is there, and no other run is at work: DVC lets one at a time work on an output.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import psutil

from pipeline.cluster import S3
from pipeline.params import read_yaml
from pipeline.stage import UserError, project_root, run_stage

PARAMS_FILE = Path("params.yaml")
LOCKS = Path(".dvc/tmp/rwlock")  # {"read": {path: [holder]}, "write": {path: holder}}


def check_data() -> None:
    """Raises UserError where `data.root` is nothing."""
    root = read_yaml(PARAMS_FILE).content["data"]["root"]
    if not root.startswith(S3) and not Path(root).exists():
        raise UserError(
            f"data.root in {PARAMS_FILE} is {root!r}, and there is nothing of that name; expected "
            "the folder or file with your data (data/own for the data sets that come with "
            "Tightbound)"
        )


def check_nobody_is_at_work() -> None:
    """Raises UserError naming who is."""
    for process, command in holders().items():
        raise UserError(
            f"another run is at work in this project (process {process}: {command}); "
            "wait for its end, or end it, and run the same command again"
        )


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
    check_data()
    check_nobody_is_at_work()


if __name__ == "__main__":
    run_stage(main)
