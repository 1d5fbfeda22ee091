"""Texts that Python, torch and Ray really give, as sentences."""

from __future__ import annotations

import pytest

from pipeline.cluster import DEATH, SILENCE, fault_of_a_worker
from vae.system import GONE


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
         "allocate memory: you tried to allocate 160000000000 bytes.", "it ran out of memory"),
        ("numpy._core._exceptions._ArrayMemoryError: Unable to allocate 1 TiB", "it ran out of"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "it ran out of"),
        ("ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.\n"
         "To adjust the kill threshold, set …", "it ran out of memory"),
        ("OSError: [Errno 28] No space left on device", "the disk is full (/runs/train-1, "),
        ("The actor died unexpectedly before finishing this task.", DEATH),
        (f"ConnectionError: {GONE}", DEATH),
        ("ActorUnavailableError: The actor 3a3dcbe43c1e is unavailable: The actor is temporarily "
         "unavailable: RpcError: RPC error: keepalive watchdog timeout rpc_code: 14.", SILENCE),
        ("ValueError: expected a number", None),
    ],
)  # fmt: skip
def test_a_sentence_for_each(text: str, sentence: str | None):
    told = fault_of_a_worker(text, key="training.batch_size", storage="/runs/train-1")
    assert told is None if sentence is None else told is not None and told.startswith(sentence)


def test_the_key_is_named():
    told = fault_of_a_worker("MemoryError", key="training.batch_size", storage="")
    assert told is not None
    assert "lower training.batch_size in params.yaml" in told
