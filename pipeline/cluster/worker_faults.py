"""What ended a worker of Ray, out of pages of text, in words that name the key that mends it."""

from __future__ import annotations

from pipeline.stage import full_disk, is_full_disk

DEATH = "its process died: killed, out of memory, or its node was lost"
SILENCE = "its process did not answer for minutes: stopped, or starved of its machine"
_SILENCES = ("ActorUnavailableError",)
_DEATHS = ("actor is dead", "actor died", "ActorDiedError", "worker died", "WorkerCrashedError")
_DEATHS += (
    "another worker of this training ended",
)  # vae.system.shared_memory, in those that are left
# Of Python, of torch on CPU and on a GPU, and of Ray, which ends what would starve its node.
_MEMORY = (
    "MemoryError",
    "can't allocate memory",
    "Cannot allocate memory",
    "CUDA out of memory",
    "OutOfMemory",
    "running low on memory",
)


def fault_of_a_worker(text: str, *, key: str, storage: object) -> str | None:
    """A sentence on what the error's text tells; None where it is about something else.

    key: what in params.yaml takes less memory when it is lowered. storage: where checkpoints go.
    """
    if is_full_disk(text):
        return full_disk(storage)
    if any(sign in text for sign in _MEMORY):
        return f"it ran out of memory; lower {key} in params.yaml, or give Ray more of it"
    if any(sign in text for sign in _DEATHS):
        return DEATH
    if any(sign in text for sign in _SILENCES):
        return SILENCE
    return None
