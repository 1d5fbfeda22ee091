"""Many computations on the cores of one machine, each on one of them.

torch shares each operation among its threads, which wait for one another after every one of them.
Where there are many pieces of the same work, threads that take a piece each need not.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from threading import Thread
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], *, with_caller: bool = True
) -> Iterator[Result]:
    """Yield `function(item)` of each item, in order; as many at a time as torch has threads here.

    Items are taken as results are, a few ahead. What torch keeps for each thread, such as grad mode
    and autocast, `function` sets itself.

    with_caller: meanwhile the caller's own torch operations run on one core too: threads that wait
    for their share of one take a core. A thread that is born in the tenth of a millisecond in which
    this is arranged may keep to one core.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield from map(function, items)
        return
    pool = _pool(os.getpid(), threads)
    waiting: deque[Future[Result]] = deque()
    if with_caller:
        _take_one_core(threads)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        if with_caller:
            torch.set_num_threads(threads)


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """This process's threads; a forked process has none of its parent's."""
    return ThreadPoolExecutor(
        threads,
        thread_name_prefix="tightbound",
        initializer=_take_one_core,
        initargs=(threads,),
    )


def _take_one_core(common: int) -> None:
    """From here on this thread's torch operations run on one core; other threads' on `common`."""
    torch.get_num_threads()  # a thread takes the common number once, when it is first asked for
    torch.set_num_threads(1)  # the thread's own, and what new threads begin with
    other = Thread(target=torch.set_num_threads, args=(common,))
    other.start()
    other.join()
