"""Settings for all tests: one torch thread, since tests share the cores with real workers."""

import atexit
import signal
import sys

import pytest
import torch

from pipeline.stage import end_process

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started by `nohup make test &`, say:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests press Ctrl-C in children


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def pytest_sessionstart(session: pytest.Session) -> None:
    atexit.register(end_as_a_stage_does, session)


def end_as_a_stage_does(session: pytest.Session) -> None:
    """Where a test ran Ray in this process, freeing it may crash."""
    if "ray" in sys.modules:
        end_process(int(session.exitstatus))
