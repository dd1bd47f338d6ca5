"""What make_fixtures.py and the tests share: a network whose states take 60 kB, its input, and digests."""

import hashlib

import pytest
import torch
from torch import nn

import senet


class Tiny(nn.Module):
    """Two stages of one residual block each; gates are those of the package's networks."""

    def __init__(self, num_classes, in_chans, se, drop_rate=0.0):
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(in_chans, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = Block(4, se)
        self.conv2 = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.layer2 = Block(8, se)
        self.dropout = nn.Dropout(drop_rate)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.layer1(self.bn1(self.conv1(x)).relu())
        x = self.layer2(self.bn2(self.conv2(x)).relu())
        return self.fc(self.dropout(x.mean((2, 3))))


class Block(nn.Module):
    def __init__(self, channels, se):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.se = None if se is None else senet.SqueezeExcite(channels, se)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return torch.relu((y if self.se is None else self.se(y)) + x)


def register(build=Tiny):
    config = senet.SEConfig(reduction=2)
    senet.register_model("tiny", build, se=config, family="tests", input_size=8, recipe="digits")


@pytest.fixture(scope="module")
def tiny():
    """Register ``tiny`` and ``se_tiny`` for this file only: other tests go through all registered names."""
    register()
    yield
    for name in ("tiny", "se_tiny"):
        del senet.register_model.__globals__["_SPECS"][name]  # nothing public takes a name back


def ramp(channels, side, count=2, dtype=torch.float32):
    """The same input, to the last bit, on every processor and with every release of PyTorch."""
    numbers = 37 * torch.arange(count * channels * side**2) % 101
    return (numbers.double() / 25 - 2).reshape(count, channels, side, side).to(dtype)


def logits(network, dtype=torch.float64):
    channels = network.conv1.in_channels
    with torch.no_grad():
        return network.to(dtype)(ramp(channels, 8 if channels == 1 else 16, dtype=dtype))


def digest(state):
    """SHA-256 of all keys and shapes, and of all values that there are."""
    sha = hashlib.sha256()
    for key in sorted(state):
        sha.update(f"{key} {tuple(state[key].shape)}\n".encode())
        if state[key].device.type != "meta":
            sha.update(state[key].numpy().tobytes())
    return sha.hexdigest()


@pytest.fixture
def command(capsys, monkeypatch):
    """Run the command line in this process: (exit code, output, error output)."""
    from senet.cli.main import main

    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it

    def call(*words):
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


# Fixtures, because a test file cannot import what lies beside it.
@pytest.fixture(scope="session")
def digest_of():
    return digest


@pytest.fixture(scope="session")
def logits_of():
    return logits
