"""The working tree as a submitted job gets it, when the cluster shares no folder with this machine.

Uploaded is what git knows or would add: no ignored file, so no outputs, no credentials. Data that
DVC holds travels through the remote.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster import S3
from pipeline.params import Params
from pipeline.stage import UserError

DVC = [sys.executable, "-m", "dvc"]
LARGEST_BYTES = 500 * 2**20  # Ray refuses packages of 512 MiB


@dataclass(frozen=True)
class Tree:
    """Files to upload, by their path in the repository, and a hash of them all."""

    files: tuple[Path, ...]
    digest: str

    @classmethod
    def of_here(cls) -> Tree:
        """The tree in the current folder. Raises UserError outside git, or when it is too big."""
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, capture_output=True, text=True, check=False)
        if listed.returncode:
            raise UserError(
                f"{Path.cwd()} is no git repository, so nothing tells what to upload; "
                "`git init` here, or name a shared folder in submit.folder of params.yaml"
            )
        files = sorted({Path(name) for name in listed.stdout.split("\0") if name})
        files = [path for path in files if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        if size > LARGEST_BYTES:
            largest = max(files, key=lambda path: path.stat().st_size)
            raise UserError(
                f"the working tree has {size / 2**20:.0f} MiB to upload and Ray takes "
                f"{LARGEST_BYTES // 2**20} (the largest file is {largest}); `dvc add` the data, "
                "keep it on s3://, or name a shared folder in submit.folder of params.yaml"
            )
        digest = hashlib.sha256()
        for path in files:
            digest.update(f"{path}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
        return cls(tuple(files), digest.hexdigest())

    def copy_to(self, folder: Path) -> None:
        for path in self.files:
            (folder / path.parent).mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, folder / path)


def remote_name(chosen: str | None) -> str:
    """The DVC remote for the results: `submit.remote`, else DVC's default.

    Raises UserError when there is none that the uploaded copy would know and could reach.
    """
    config = ConfigParser()
    config.read(Path(".dvc") / "config")
    name = chosen or config.get("core", "remote", fallback=None)
    add = "`dvc remote add --default NAME s3://bucket/prefix` adds one"
    if name is None:
        raise UserError(
            "an uploaded copy sends its results home through a DVC remote, and .dvc/config names "
            f"no default one; {add}, submit.remote in params.yaml chooses another, and "
            "submit.folder a shared folder instead"
        )
    section = f"'remote \"{name}\"'"
    if section not in config:
        raise UserError(
            f"the DVC remote {name} is not in .dvc/config, which is what the uploaded copy "
            f"reads; {add}"
        )
    url = config[section].get("url", "")
    if "://" not in url and not Path(url).is_absolute():
        raise UserError(
            f"the DVC remote {name} is the relative path {url}, which the uploaded copy would "
            "take from its own folder; expected s3://…, another address or an absolute path that "
            "the cluster's head node mounts"
        )
    return name


def check_nothing_is_lost(params: Params, tree: Tree) -> None:
    """Raises UserError for input that the copy would lack, or output that would be replaced."""
    root = params.data.root
    path = Path(root)
    if not root.startswith(S3) and not path.is_absolute() and path.exists():
        sent = any(file == path or path in file.parents for file in tree.files)
        if not sent and not _is_tracked(path):
            raise UserError(
                f"data.root {root} is ignored by git and unknown to DVC, so the uploaded copy "
                f"would lack it; `dvc add {root}`, or put it on s3://"
            )
    changed = _dvc_json("data", "status").get("uncommitted", {}).get("modified", [])
    if changed:
        raise UserError(
            f"{', '.join(changed[:5])} {'differs' if len(changed) == 1 else 'differ'} from what "
            "dvc.lock holds, and the job's results would replace it; `dvc commit` keeps it, "
            "`dvc checkout --force` drops it"
        )


def push(remote: str) -> None:
    """Send the remote what it lacks of the data and results that this tree names."""
    run_dvc("push", "--remote", remote)


def run_dvc(*arguments: str) -> str:
    """What a DVC command prints. Raises UserError with DVC's own words when it fails."""
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(
        [*DVC, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise UserError(f"`dvc {' '.join(arguments)}` failed:\n{done.stderr.strip()[-2000:]}")
    return done.stdout


def _is_tracked(path: Path) -> bool:
    """Whether a .dvc file here holds this path or a folder around it."""
    return any(Path(f"{place}.dvc").is_file() for place in (path, *path.parents[:-1]))


def _dvc_json(*arguments: str) -> dict:
    return json.loads(run_dvc(*arguments, "--json") or "{}")
