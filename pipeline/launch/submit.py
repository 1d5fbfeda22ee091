"""`make submit`: the pipeline as a job on a Ray cluster, followed from here, its results at home.

`submit` in params.yaml chooses the way: a folder that this machine and all nodes share, or an
uploaded copy of the working tree whose results come home through a DVC remote. A job goes on when
this command ends; `--job` follows it again and brings its results, `--cancel` ends it.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import logging
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.launch.job import RESULT, decode_lock
from pipeline.launch.upload import Tree, check_nothing_is_lost, push, remote_name, run_dvc
from pipeline.params import Params, load_params
from pipeline.stage import UserError, interrupt, run_stage, say, whole_file
from pipeline.tracking import COMMIT_VARIABLE, git_commit, store_address
from vae.system import file_hash

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
# Forwarded when they are set here; `submit.forward` adds names.
FORWARDED = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "MLFLOW_S3_ENDPOINT_URL",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "TIGHTBOUND_STORAGE",
    "TIGHTBOUND_DEBUG",
    "TIGHTBOUND_VERBOSITY",
)
# A cancelled job is interrupted as by Ctrl-C, and has time to send home what it finished.
STOPPING_SECONDS = 600
STOPPING = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOPPING_SECONDS)}
# What the log holds besides the job's own lines, and the line that carries dvc.lock.
NOISE = re.compile(rf"^{RESULT}|INFO job_manager\.py|^Running entrypoint for job ")
POLL_SECONDS = 1.0
SILENCE_SECONDS = 60.0  # of a cluster that answered before
LOCK = Path("dvc.lock")
WAY, TREE, LOCK_AT_START = "tightbound.way", "tightbound.tree", "tightbound.lock"


def submit(params: Params, client: JobSubmissionClient) -> str:
    """Start the job; returns its id. Raises UserError when results would be lost or it runs."""
    options = params.submit
    tree = None if options.folder else Tree.of_here()
    identity = tree.digest if tree else f"folder:{options.folder}"
    refuse_twice(client, identity)
    environment = forwarded(options.forward)
    job = (
        f"tightbound-{hashlib.sha256(identity.encode()).hexdigest()[:6]}-{time.time_ns() // 10**6}"
    )
    python = shlex.quote(options.python or "python")
    metadata = {TREE: identity, LOCK_AT_START: _hash_of(LOCK)}
    with tempfile.TemporaryDirectory(prefix="tightbound-upload-") as folder:
        runtime_env: dict[str, Any] = {"env_vars": environment | STOPPING}
        if tree is None:
            marker = Path(".tightbound") / "submitted" / job
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
            metadata[WAY] = "folder"
            entrypoint = (
                f"cd {shlex.quote(str(options.folder))} && "
                f"exec {python} -m pipeline.launch.job --marker {marker}"
            )
        else:
            remote = remote_name(options.remote)
            check_nothing_is_lost(params, tree)
            warn_of_local_tracking(params)
            say(f"submit     uploading {len(tree.files)} files; DVC remote {remote}")
            push(remote)
            tree.copy_to(Path(folder))
            metadata[WAY] = f"copy:{remote}"
            runtime_env["working_dir"] = folder
            runtime_env["env_vars"][COMMIT_VARIABLE] = git_commit() or ""
            entrypoint = f"exec {python} -m pipeline.launch.job --remote {shlex.quote(remote)}"
        if environment:
            say(f"submit     forwarding {', '.join(environment)}")
        with answers(client.get_address()):
            client.submit_job(
                entrypoint=entrypoint,
                submission_id=job,
                runtime_env=runtime_env,
                metadata=metadata,
            )
    say(f"submit     job {job}: `make submit JOB={job}` follows it from anywhere")
    return job


def refuse_twice(client: JobSubmissionClient, identity: str) -> None:
    """Raises UserError when the cluster is at work on this very tree, or in this folder."""
    for job in client.list_jobs():
        if (job.metadata or {}).get(TREE) == identity and not job.status.is_terminal():
            raise UserError(
                f"job {job.submission_id} is at work on this already; follow it with "
                f"`make submit JOB={job.submission_id}`, or end it with "
                f"`make submit CANCEL={job.submission_id}`"
            )


def forwarded(more: tuple[str, ...]) -> dict[str, str]:
    """The environment that the job gets: by name, from FORWARDED and `submit.forward`."""
    missing = [name for name in more if name not in os.environ]
    if missing:
        raise UserError(f"submit.forward names {', '.join(missing)}, which is not set here")
    return {name: os.environ[name] for name in (*FORWARDED, *more) if name in os.environ}


def warn_of_local_tracking(params: Params) -> None:
    address = store_address(params.tracking.uri)
    if address.startswith("sqlite:"):
        print(
            "warning: MLflow's database is a file on this machine, so the gate on the cluster "
            "knows no champion; the model is registered here when it comes home. "
            "MLFLOW_TRACKING_URI=http://… names a server for both",
            file=sys.stderr,
        )


def follow(client: JobSubmissionClient, job: str) -> JobDetails:
    """Print the job's log from its beginning until it ends; its details then."""
    interrupt.tell_instead(
        f"submit     job {job} goes on without this terminal; `make submit JOB={job}` "
        f"follows it again and brings its results, `make submit CANCEL={job}` ends it"
    )
    asyncio.run(_print_log(client, job))
    while not (details := _details(client, job)).status.is_terminal():
        time.sleep(POLL_SECONDS)
    return details


async def _print_log(client: JobSubmissionClient, job: str) -> None:
    """Lines as they come, but for the one that carries dvc.lock. A lost connection is no end."""
    import aiohttp

    shown, answered = 0, time.monotonic()
    while True:
        seen, rest = 0, ""
        with suppress(RuntimeError, OSError, aiohttp.ClientError):
            async for chunk in client.tail_job_logs(job):
                *lines, rest = (rest + chunk).split("\n")
                for line in lines:
                    seen += 1
                    if seen > shown and not NOISE.search(line):
                        print(line, flush=True)
        shown = max(shown, seen)
        try:
            if _details(client, job).status.is_terminal():
                return
            answered = time.monotonic()
        except UserError as error:
            if time.monotonic() - answered > SILENCE_SECONDS:
                raise UserError(
                    f"{error}; `make submit JOB={job}` follows the job again"
                ) from error
        await asyncio.sleep(POLL_SECONDS)


def finish(client: JobSubmissionClient, details: JobDetails) -> None:
    """Bring home what the job made. Raises UserError when it failed or was cancelled."""
    job, metadata = str(details.submission_id), details.metadata or {}
    kind, _, remote = metadata[WAY].partition(":")
    brought = kind == "copy" and bring_home(client, job, remote, metadata[LOCK_AT_START])
    status = details.status.value
    if status == "SUCCEEDED":
        if kind == "copy":
            register_here()
        say("report     reports/report.html")
        return
    kept = "; what it finished is here, and the same command again goes on from there"
    if status == "STOPPED":
        raise UserError(f"job {job} was cancelled{kept if brought else ''}")
    code = details.driver_exit_code
    why = f"with exit code {code}, see its last lines above" if code else details.message
    raise UserError(f"job {job} failed {why}{kept if brought else ''}")


def bring_home(client: JobSubmissionClient, job: str, remote: str, before: str) -> bool:
    """dvc.lock out of the job's log, and all that it names from the remote; False: there is none.

    before: hash of dvc.lock here when the job was submitted. Raises UserError if it has changed.
    """
    content = decode_lock(client.get_job_logs(job))
    if content is None:
        return False
    if _hash_of(LOCK) not in (before, hashlib.sha256(content).hexdigest()):
        aside = Path(".tightbound") / "submitted" / f"{job}.dvc.lock"
        _write(aside, content)
        raise UserError(
            f"dvc.lock has changed here since the job was submitted, and was left alone; the "
            f"job's is {aside}: copy it over dvc.lock and `dvc pull --remote {remote}` to have "
            "the job's results"
        )
    _write(LOCK, content)
    run_dvc("pull", "--remote", remote, *yaml.safe_load(content)["stages"])
    say(f"submit     results of job {job} are here")
    return True


def register_here() -> None:
    """The registry that this machine knows gets the model, where it is another than the job's."""
    done = subprocess.run([sys.executable, "-m", "pipeline.register", "--ensure"], check=False)
    if done.returncode:
        raise UserError("the job's results are here; the registry was not reached (see above)")


def cancel(client: JobSubmissionClient, job: str) -> JobDetails:
    """End the job, as by Ctrl-C; returns its details when it has ended."""
    if not (details := _details(client, job)).status.is_terminal():
        client.stop_job(job)
        say(f"submit     job {job} is told to end; it keeps what it finished")
        deadline = time.monotonic() + 1.1 * STOPPING_SECONDS
        while not (details := _details(client, job)).status.is_terminal():
            if time.monotonic() > deadline:
                raise UserError(f"job {job} was told to end, and has not in {STOPPING_SECONDS} s")
            time.sleep(POLL_SECONDS)
    return details


def connect(address: str) -> JobSubmissionClient:
    """The jobs API of a cluster. Raises UserError when it doesn't answer or refuses."""
    # What to upload is decided here, by git; Ray's own filter would also drop tracked files.
    os.environ.setdefault("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    with answers(address):
        from ray.job_submission import JobSubmissionClient

        for name in ("job.sdk", "dashboard_sdk"):
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
        logging.getLogger("ray").setLevel(logging.WARNING)
        return JobSubmissionClient(address)


@contextmanager
def answers(address: str) -> Iterator[None]:
    """Failures of the jobs API in words for people."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise UserError(
            f"the cluster at {address} refused the token; expected its own in RAY_AUTH_TOKEN, in "
            "the file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"
        ) from error
    except (ConnectionError, requests.RequestException) as error:
        raise UserError(
            f"no Ray cluster answers at {address}; expected the address of its dashboard, such as "
            "http://host:8265"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the cluster at {address} refused: {error}") from error


def _details(client: JobSubmissionClient, job: str) -> JobDetails:
    try:
        with answers(client.get_address()):
            return client.get_job_info(job)
    except UserError as error:
        if "does not exist" in str(error):
            raise UserError(f"the cluster at {client.get_address()} has no job {job}") from error
        raise


def _hash_of(path: Path) -> str:
    return file_hash(path) if path.is_file() else ""


def _write(path: Path, content: bytes) -> None:
    with whole_file(path) as fresh:
        fresh.write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--address", default=os.environ.get(ADDRESS_VARIABLE))
    known = parser.add_mutually_exclusive_group()
    known.add_argument("--job", help="follow this job and bring its results home")
    known.add_argument("--cancel", metavar="JOB", help="end this job")
    asked = parser.parse_args()
    if not asked.address:
        raise UserError(
            f"which cluster? make submit ADDRESS=http://host:8265, or {ADDRESS_VARIABLE}"
        )
    client = connect(asked.address)
    if asked.cancel:
        finish(client, cancel(client, asked.cancel))
        return
    job = asked.job or submit(load_params(), client)
    finish(client, follow(client, job))


if __name__ == "__main__":
    run_stage(main)
