"""Settings for all tests: one torch thread, since tests share the cores with real workers."""

import signal

import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started by `nohup make test &`, say:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests press Ctrl-C in children


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
