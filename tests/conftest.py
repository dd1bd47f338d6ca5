"""What all tests share: one seed, and no signal handlers left behind."""

import signal

import pytest
import torch
from torch.utils.data._utils import signal_handling


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_child_handler_of_a_loader():
    """Take PyTorch's SIGCHLD handler back, which its loader leaves behind for good.

    Once OpenVINO or ONNX Runtime is loaded, the process is killed when that handler is entered: at the end of any
    child, a compiler's say. No user of one command meets both.
    """
    yield
    if signal_handling._SIGCHLD_handler_set:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal_handling._SIGCHLD_handler_set = False
