"""Where Ray's runs and their checkpoints lie: a folder, one that all nodes share, or `s3://`.

Credentials and endpoint of S3 come from the environment (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_DEFAULT_REGION …), as everywhere.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from pipeline.stage import UserError, project_root

STORAGE_VARIABLE = "TIGHTBOUND_STORAGE"
SUBMITTED_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
S3 = "s3://"
LOCK = ".lock"
RENEWAL_SECONDS = 5.0
# A claim on S3 that was not renewed for as long is one whose process died.
PATIENCE_SECONDS = 3.5 * RENEWAL_SECONDS


class Held(Exception):  # noqa: N818
    """Another process holds the name; the message says which."""


@dataclass(frozen=True)
class Storage:
    """An open place for runs.

    address: as Ray takes it, an absolute path or s3://bucket/prefix. home: the folder for what
    only the driver writes: the place itself or, for S3, one on this machine.
    """

    address: str
    home: Path
    filesystem: fs.FileSystem
    root: str

    @property
    def remote(self) -> bool:
        return self.address.startswith(S3)

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Hold `name` for this process alone while the block runs; raises Held."""
        with self._lease(name) if self.remote else self._file_lock(name):
            yield

    def prune(self, prefix: str, keep: int) -> None:
        """Delete all but the last used `keep` names that begin with `prefix` and nobody holds."""
        locks = [
            entry
            for entry in self.filesystem.get_file_info(fs.FileSelector(self.root))
            if entry.base_name.startswith(prefix) and entry.base_name.endswith(LOCK)
        ]
        locks.sort(key=lambda entry: entry.mtime_ns, reverse=True)
        for lock in locks[keep:]:
            if self._is_held(lock, now=locks[0].mtime_ns):
                continue
            folder = lock.path.removesuffix(LOCK)
            if self.filesystem.get_file_info(folder).type == fs.FileType.Directory:
                self.filesystem.delete_dir(folder)
            shutil.rmtree(self.home / Path(folder).name, ignore_errors=True)
            self.filesystem.delete_file(lock.path)

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON object, whole or not at all."""
        text = json.dumps(content).encode()
        path = f"{self.root}/{name}"
        if self.remote:  # where an object appears when its stream is closed
            with self.filesystem.open_output_stream(path) as stream:
                stream.write(text)
            return
        folder, _, own = path.rpartition("/")
        fresh = Path(folder) / f".tmp-{own}-{uuid.uuid4().hex[:8]}"
        try:
            fresh.write_bytes(text)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)

    def read(self, name: str) -> dict[str, Any]:
        """A JSON object; empty where there is none, or one half-written."""
        try:
            with self.filesystem.open_input_stream(f"{self.root}/{name}") as stream:
                return json.loads(stream.read())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    @contextmanager
    def _file_lock(self, name: str) -> Iterator[None]:
        with (self.home / f"{name}{LOCK}").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise Held(lock.read().strip() or "another process") from None
            lock.truncate(0)
            lock.write(myself())
            lock.flush()
            yield

    @contextmanager
    def _lease(self, name: str) -> Iterator[None]:
        """A lock that its holder renews: on S3 nothing else tells that a process has died."""
        key, token = f"{name}{LOCK}", uuid.uuid4().hex
        self._wait_for_death(key)
        mine = {"holder": myself(), "token": token}
        self.write(key, mine)
        time.sleep(0.2)
        if (found := self.read(key)).get("token") != token:  # another came at the same moment
            raise Held(found.get("holder", "another process"))
        done = threading.Event()

        def renew() -> None:
            while not done.wait(RENEWAL_SECONDS):
                with suppress(OSError):  # the next one may get through
                    self.write(key, mine)

        renewal = threading.Thread(target=renew, name="claim", daemon=True)
        renewal.start()
        try:
            yield
        finally:
            done.set()
            renewal.join(PATIENCE_SECONDS)
            with suppress(OSError):
                self.write(key, {})

    def _wait_for_death(self, key: str) -> None:
        """Return when the last holder is gone; raises Held as soon as it gives a sign of life."""
        holder = self.read(key).get("holder")
        if holder is None or _is_dead_here(holder):
            return
        path = f"{self.root}/{key}"
        last = self.filesystem.get_file_info(path).mtime_ns
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.5)
            if self.filesystem.get_file_info(path).mtime_ns != last:
                if self.read(key).get("holder") is None:
                    return
                raise Held(holder)

    def _is_held(self, lock: fs.FileInfo, now: int) -> bool:
        if self.remote:
            silent = (now - lock.mtime_ns) / 1e9
            return "holder" in self.read(lock.base_name) and silent < PATIENCE_SECONDS
        with Path(lock.path).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


def open_storage(given: str | None) -> Storage:
    """The place that `TIGHTBOUND_STORAGE`, else `given` names; else .tightbound/ray, here.

    given: `scaling.storage` of params.yaml. A relative path is taken from the repository.
    Raises UserError when the place can't be reached.
    """
    chosen = os.environ.get(STORAGE_VARIABLE) or given or str(_local_home())
    try:
        storage = storage_at(chosen)
        storage.home.mkdir(parents=True, exist_ok=True)
        storage.filesystem.create_dir(storage.root, recursive=True)
    except OSError as error:
        origin = STORAGE_VARIABLE if os.environ.get(STORAGE_VARIABLE) else "scaling.storage"
        raise UserError(f"{chosen} ({origin}) can't be used: {short(error)}") from error
    return storage


def storage_at(address: str) -> Storage:
    """The place at s3://… or in a folder, as it is."""
    if address.startswith(S3):
        address = address.rstrip("/")
        filesystem, root = fs.FileSystem.from_uri(address)
        return Storage(address, _local_home(), filesystem, root)
    home = (project_root() / address).resolve()
    return Storage(str(home), home, fs.LocalFileSystem(), str(home))


def _local_home() -> Path:
    return project_root() / ".tightbound" / "ray"


def worker_environment() -> dict[str, str]:
    """Credentials and endpoint of S3, for workers on nodes whose own environment lacks them.

    Empty in a submitted job, whose environment its workers inherit anyway.
    """
    if SUBMITTED_VARIABLE in os.environ:
        return {}
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def download(address: str, folder: Path) -> Path:
    """Copy the object, or all that lies below, of s3://… into `folder`; returns the copy.

    Raises UserError when there is nothing or it can't be read.
    """
    try:
        filesystem, path = fs.FileSystem.from_uri(address.rstrip("/"))
        copy = folder / Path(path).name
        found = filesystem.get_file_info(path)
        if found.type == fs.FileType.NotFound:
            raise FileNotFoundError("there is nothing")
        if found.type == fs.FileType.Directory:
            copy.mkdir()
        fs.copy_files(path, str(copy), source_filesystem=filesystem)
    except OSError as error:
        raise UserError(f"data.root {address} can't be read: {short(error)}") from error
    return copy


def myself() -> str:
    """This process, in words that tell it from all others."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def _is_dead_here(holder: str) -> bool:
    """Whether a holder is a process of this machine that no longer runs."""
    _, process, _, host = holder.split()
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def short(error: BaseException) -> str:
    """An error's first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
