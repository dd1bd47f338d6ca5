"""Captured graphs do not outlive a test: what one test compiles counts toward PyTorch's limits in the next one."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _captures_end_with_the_test():
    yield
    torch.compiler.reset()
