"""What a submitted job does on the cluster: `dvc repro` and the registration, in one of two ways.

In the folder that all nodes share, or in a copy of the working tree that came with the job: there
earlier results are pulled from the DVC remote, and whatever the job finished is pushed to it,
however the job ends; the last line of its log then carries dvc.lock home.
"""

from __future__ import annotations

import argparse
import base64
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULT = "tightbound-dvc.lock:"
INTERRUPTED = 130
DVC = [sys.executable, "-m", "dvc"]


def encode_lock(content: bytes) -> str:
    """dvc.lock as the line of the log that carries it."""
    return f"{RESULT}{base64.b64encode(zlib.compress(content, 9)).decode()}"


def decode_lock(log: str) -> bytes | None:
    """dvc.lock out of a job's log; None if it has none, or one that was cut off."""
    lines = [line for line in log.splitlines() if line.startswith(RESULT)]
    try:
        return zlib.decompress(base64.b64decode(lines[-1].removeprefix(RESULT)))
    except (IndexError, ValueError, zlib.error):
        return None


def environment_fault(lock: Path) -> str | None:
    """What this Python lacks of requirements.lock, in one sentence; None: nothing."""
    if not lock.is_file():
        return None
    wanted = dict(re.findall(r"^([a-z0-9-]+)==([^\s;\\]+)", lock.read_text(), re.MULTILINE))
    for name in ("ray", "dvc", "dvc-s3", "mlflow", "torch"):
        try:
            found = version(name).partition("+")[0]
        except PackageNotFoundError:
            found = "none"
        if found != wanted[name]:
            return (
                f"{sys.executable} on the cluster has {name} {found}, requirements.lock "
                f"{wanted[name]}; install requirements.lock there, or name another Python in "
                "submit.python of params.yaml"
            )
    return None


def in_shared_folder(marker: Path) -> int:
    """`dvc repro` in the current folder, which must be the one that the job was submitted from."""
    if not marker.is_file():
        print(
            f"error: {Path.cwd()} on the cluster is not the folder that the job was submitted "
            f"from ({marker} is missing); mend submit.folder in params.yaml, or set it to null "
            "to upload a copy",
            file=sys.stderr,
        )
        return 1
    marker.unlink()
    return reproduce(Path.cwd())


def in_copy(remote: str) -> int:
    """`dvc repro` in a copy of the current folder; results go to the DVC remote of that name."""
    from pipeline.cluster import STORAGE_VARIABLE
    from pipeline.params import load_params

    # The uploaded folder is a cache of Ray's, which other jobs may share: it stays as it is.
    with tempfile.TemporaryDirectory(prefix="tightbound-job-") as folder:
        work = Path(folder) / "work"
        shutil.copytree(Path.cwd(), work, symlinks=True)
        (work / ".dvc" / "config.local").write_text("[core]\n    no_scm = true\n")
        if load_params(work / "params.yaml").scaling.storage is None:
            os.environ.setdefault(STORAGE_VARIABLE, str(Path.home() / ".tightbound" / "ray"))
        try:
            pull = [*DVC, "pull", "--quiet", "--allow-missing", "--remote", remote]
            subprocess.run(pull, cwd=work, check=False)
            code = reproduce(work)
        except KeyboardInterrupt:
            code = INTERRUPTED
        return send_home(work, remote) or code


def reproduce(folder: Path) -> int:
    """The pipeline and its registration; the exit code of the first that failed."""
    for command in (
        [*DVC, "repro", "--quiet"],
        [sys.executable, "-m", "pipeline.register", "--ensure"],
    ):
        process = subprocess.Popen(command, cwd=folder)
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the command got the signal as well, and ends in order
            process.wait()
            raise
        if code:
            return code
    return 0


def send_home(work: Path, remote: str) -> int:
    """Push all that dvc.lock names, then let the log carry it home; cancelling does not stop it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of what is started here, too
    lock = work / "dvc.lock"
    if not lock.is_file():
        return 0
    code = subprocess.run([*DVC, "push", "--quiet", "--remote", remote], cwd=work).returncode
    print(encode_lock(lock.read_bytes()), flush=True)
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--marker", type=Path, help="file that tells the shared folder")
    way.add_argument("--remote", help="DVC remote for the results of an uploaded copy")
    asked = parser.parse_args()
    if fault := environment_fault(Path("requirements.lock")):
        print(f"error: {fault}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # how a job is cancelled
    # Stages are started as `python`: it must be this one.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    try:
        return in_copy(asked.remote) if asked.remote else in_shared_folder(asked.marker)
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
