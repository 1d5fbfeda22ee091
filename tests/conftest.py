"""Settings for all tests: one torch thread, since tests share the cores with real workers."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
