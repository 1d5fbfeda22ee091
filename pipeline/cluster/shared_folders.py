"""What every node of a cluster must reach: refused at once, with the reason, if one does not."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pyarrow import fs

from pipeline.cluster.storage import myself, short, storage_at
from pipeline.stage import UserError

PROBE_SECONDS = 60.0
SHOWN = 3


def require_shared(address: str, key: str) -> None:
    """Refuse a place that not every node of the connected cluster can write to.

    address: an absolute folder or s3://…; key: the params key that names it. Raises UserError.
    """
    if len(_nodes()) < 2:
        return
    storage = storage_at(address)
    marker = f".tmp-probe-{uuid.uuid4().hex}"
    storage.write(marker, {"from": myself()})
    try:
        faults = _faults(_write_beside, address, marker)
    finally:
        for entry in storage.filesystem.get_file_info(fs.FileSelector(storage.root)):
            if entry.base_name.startswith(marker):
                storage.filesystem.delete_file(entry.path)
    if faults:
        raise UserError(
            f"{address} is not shared by all {len(_nodes())} nodes of the cluster "
            f"({_some(faults)}); name a folder that all of them mount, or s3://…, in {key} of "
            "params.yaml"
        )


def require_seen(files: Sequence[Path], mend: str) -> None:
    """Refuse files here that not every node of the connected cluster sees as well.

    mend: what to do then. Raises UserError.
    """
    if faults := unseen(files):
        raise UserError(
            f"{files[0].parent} is not the same folder on all {len(_nodes())} nodes of the cluster "
            f"({_some(faults)}); {mend}"
        )


def unseen(files: Sequence[Path]) -> list[str]:
    """Nodes of the connected cluster that don't see these files, each with the reason."""
    if len(_nodes()) < 2:
        return []
    return _faults(_look_for, {str(path.resolve()): path.stat().st_size for path in files})


def _nodes() -> dict[str, str]:
    """Address of each living node, by its id."""
    import ray

    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def _faults(probe: Callable[..., str], *arguments: Any) -> list[str]:
    """What a probe found wrong on each node; a node where all is well is left out."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = _nodes()
    task = ray.remote(num_cpus=0, max_retries=1)(probe)
    tasks = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            *arguments
        ): address
        for node, address in nodes.items()
    }
    ready, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=PROBE_SECONDS)
    answers = [
        (address, _answer(task) if task in ready else f"no answer in {PROBE_SECONDS:g} s")
        for task, address in tasks.items()
    ]
    return [f"{address}: {why}" for address, why in answers if why]


def _answer(task: Any) -> str:
    import ray
    from ray.exceptions import RayError

    try:
        return ray.get(task)
    except RayError as error:
        return short(error)


def _some(faults: Sequence[str]) -> str:
    return "; ".join(faults[:SHOWN]) + (" …" if len(faults) > SHOWN else "")


def _write_beside(address: str, marker: str) -> str:
    """On a node: what is wrong with a place that the driver marked; empty: nothing."""
    try:
        storage = storage_at(address)
        if not storage.read(marker):
            return "what the driver wrote there is missing"
        storage.write(f"{marker}-{uuid.uuid4().hex}", {})
    except OSError as error:
        return short(error)
    return ""


def _look_for(sizes: dict[str, int]) -> str:
    """On a node: the first file that is missing, or of another size; empty: none."""
    for name, size in sizes.items():
        path = Path(name)
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != size:
            return f"{path.name} is another file"
    return ""
