"""Ray, from one laptop to a cluster: the only caller of `ray.init`.

`RAY_ADDRESS` names a cluster; without it a local Ray starts, quiet and small, and ends with the
stage. Nothing else differs.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipeline.cluster.storage import worker_environment
from pipeline.stage import UserError
from pipeline.tracking import set_environment

ADDRESS_VARIABLE = "RAY_ADDRESS"
MEGABYTE = 2**20

# Ray reads these at import or start; a user's own setting wins. Besides being quiet: a lost worker
# is noticed soon, and a finished trial is written down within a second, not ten.
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "16",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
# Besides, where no node can be taken away without Ray itself: no process that watches for that.
_LOCAL_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


@contextmanager
def connect(
    *, object_store_bytes: int = 256 * MEGABYTE, needs: str | None = None
) -> Iterator[None]:
    """Join the cluster that `RAY_ADDRESS` names, or start a local Ray, for the block's length.

    object_store_bytes: size of a local Ray's object store; a cluster has its own. needs: a module
    to import while Ray starts.
    Raises UserError when the cluster does not answer.
    """
    joined = address()
    for name, value in (_ENVIRONMENT | ({} if joined else _LOCAL_ENVIRONMENT)).items():
        os.environ.setdefault(name, value)
    set_environment()
    import ray

    if needs:
        threading.Thread(target=importlib.import_module, args=(needs,), daemon=True).start()
    try:
        if joined:
            ray.init(
                address=joined,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": worker_environment()},
            )
        else:
            ray.init(
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=object_store_bytes,
                _temp_dir=os.environ.get("TIGHTBOUND_RAY_TMP") or None,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {joined} ({ADDRESS_VARIABLE})" if joined else "a local Ray"
        raise UserError(f"{where} could not be reached or started: {error}") from error
    for name in ("ray", "ray.tune", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ray.shutdown()


def data_context() -> Any:
    """Ray Data's settings in this process, with its own messages off; its import turns them on."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return context


def address() -> str | None:
    """Of the cluster that the stages join; None: each starts a Ray of its own."""
    return os.environ.get(ADDRESS_VARIABLE) or None


def store_size(array_bytes: int) -> int:
    """An object store that holds the training arrays twice over."""
    return max(256 * MEGABYTE, 3 * array_bytes)


def require(cpus: float, gpus: float, *, key: str, workers: int = 1) -> None:
    """Refuse at once what the cluster can't hold; Ray itself would wait for ever.

    cpus, gpus: of each of so many workers, every one of which lies on one node. What a cluster's
    autoscaler may add counts as there. key: the params key to lower. Raises UserError.
    """
    import ray

    most = _with_autoscaler(ray.cluster_resources())
    for name, each in (("CPU", cpus), ("GPU", gpus)):
        if each * workers > most.get(name, 0):
            raise UserError(
                f"{each * workers:g} {name}s are asked for and {most.get(name, 0):g} are there; "
                f"lower {key} in params.yaml or give Ray more"
            )
    if autoscales():
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(
        int(min(node.get(name, 0) // each for name, each in (("CPU", cpus), ("GPU", gpus)) if each))
        for node in nodes
    )
    if room < workers:
        each = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        raise UserError(
            f"{workers} workers of {each} each are asked for, and the cluster's {len(nodes)} nodes "
            f"have room for {room}, since no worker spans two nodes; lower {key} in params.yaml"
        )


def autoscales() -> bool:
    """Whether the connected cluster may add nodes by itself."""
    return bool(_autoscaler_most())


def _with_autoscaler(there: Mapping[str, float]) -> dict[str, float]:
    """Resources that are there, or that the cluster may grow to."""
    most = _autoscaler_most()
    return {name: max(there.get(name, 0), most.get(name, 0)) for name in there.keys() | most.keys()}


def _autoscaler_most() -> dict[str, int]:
    """What the cluster's configuration allows it to grow to; empty where it doesn't grow."""
    try:
        from ray._private.state import state  # ray.data asks the same; there is no public way

        return state.get_max_resources_from_cluster_config() or {}
    except (ImportError, AttributeError):
        return {}


def num_cpus() -> int:
    """CPUs of the connected cluster."""
    import ray

    return int(ray.cluster_resources().get("CPU", 1))


def num_gpus() -> int:
    """GPUs of the connected cluster."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))
