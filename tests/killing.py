"""A process killed at every system call of what it does, one after another (Linux).

For a process of its own, without threads: each try is a fork, which ptrace stops at its nth system
call and kills there.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable

TRACEME, SYSCALL, SETOPTIONS = 0, 24, 0x4200
SYSGOOD, TRACECLONE, EXITKILL = 1, 8, 0x100000
ALL_THREADS = 0x40000000  # __WALL
AT_A_CALL = signal.SIGTRAP | 0x80

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Do `work` in a fork that is killed as its `number`th system call begins or ends.

    Returns False where it ended before.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            _ptrace(TRACEME, 0, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.waitpid(child, ALL_THREADS)
    _ptrace(SETOPTIONS, child, SYSGOOD | TRACECLONE | EXITKILL)
    _ptrace(SYSCALL, child, 0)
    count = 0
    while True:
        found, status = os.waitpid(-1, ALL_THREADS)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if found == child:
                assert status == 0, f"the work itself failed ({status})"
                return False
            continue
        given = os.WSTOPSIG(status)
        if given == AT_A_CALL:
            count += 1
            if count == number:
                os.kill(child, signal.SIGKILL)
                while found != child or not os.WIFSIGNALED(status):
                    found, status = os.waitpid(-1, ALL_THREADS)
                return True
        passed = 0 if given in (AT_A_CALL, signal.SIGTRAP, signal.SIGSTOP) else given
        _ptrace(SYSCALL, found, passed, required=False)


def at_every_system_call(
    prepare: Callable[[], object],
    work: Callable[[], object],
    check: Callable[[], object],
    every: int = 1,
) -> int:
    """`prepare`, then `work` killed at a call, then `check`, for every call; how often it died."""
    number = 1
    while True:
        prepare()
        if not killed_at(number, work):
            check()
            return number // every
        check()
        number += every


def _ptrace(request: int, process: int, data: int, required: bool = True) -> None:
    if _libc.ptrace(request, process, None, data) < 0 and required:
        raise OSError(ctypes.get_errno(), f"ptrace {request}")
