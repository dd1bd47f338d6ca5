"""What all tests share: one seed, and threads that suit two cores."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
