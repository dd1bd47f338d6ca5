"""The one-node tail of GPUs against autograd in float64, in Triton's interpreter (and on a device with `-m gpu`)."""

import copy
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import senet
from helpers.tails import tail
from senet.nn.squeeze_excite import SEConfig, SqueezeExcite
from senet.ops import reference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NO_DEVICE = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=[pytest.mark.gpu, NO_DEVICE])]
GATES = ["sigmoid", "relu", "hard_sigmoid", "identity_sigmoid", "identity_relu", "identity_hard_sigmoid"]


@pytest.mark.skipif(INTERPRETED, reason="this is the run that the test would start")
def test_all_of_this_file_passes_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "--maxfail=9"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[3]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    if "only 0-dimensional arrays can be converted to Python scalars" in run.stdout:
        pytest.skip("the interpreter of this Triton has no loops with this NumPy (3.6 with 2.4: int() of an array)")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 30


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


class Block(nn.Module):
    """A tail with its modules, as a network holds them."""

    def __init__(self, channels, gate, projects, affine=True):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=affine)
        self.shortcut_norm = nn.BatchNorm2d(channels) if projects else None
        self.se = None
        if gate is not None:
            identity = gate.startswith("identity_")
            config = SEConfig(reduction=4, gate=gate.removeprefix("identity_"), identity_init=identity)
            self.se = SqueezeExcite(channels, config)
            nn.init.normal_(self.se.fc2.weight)
            nn.init.normal_(self.se.fc1.bias)
        for norm in (self.norm, self.shortcut_norm):
            if norm is not None and norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)

    def forward(self, u, shortcut):
        return tail(u, self.norm, self.se, shortcut, self.shortcut_norm)


def step(block, u, shortcut, backend):
    """The output, the gradients of the maps and of every parameter, and the buffers."""
    leaves = [x.detach().clone().requires_grad_() if x is not None else None for x in (u, shortcut)]
    with senet.use_backend(backend):
        out = block.train()(*leaves)
        generator = torch.Generator().manual_seed(1)
        dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
        grads = torch.autograd.grad(out, [x for x in (*leaves, *block.parameters()) if x is not None], dout)
    return [out, *grads, *block.buffers()]


def check(block, u, shortcut, tolerance=2e-5):
    exact = copy.deepcopy(block).double()
    truth = step(exact, u.double(), None if shortcut is None else shortcut.double(), "reference")
    found = step(block, u, shortcut, "triton")
    for got, want in zip(found, truth, strict=True):
        assert got.shape == want.shape
        scale = want.double().norm().clamp_min(1e-12)
        assert (got.double() - want.double()).norm() / scale < tolerance


def a_map(shape, device, last, mean=1.0, dtype=torch.float32):
    x = (torch.randn(shape) * 2 + mean).to(device, dtype)
    return x.to(memory_format=torch.channels_last) if last else x


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("adds", ["nothing", "shortcut", "projection"])
@pytest.mark.parametrize("gate", [None, "sigmoid"])
@pytest.mark.parametrize("shape", [(3, 12, 5, 7), (2, 20, 17, 17), (5, 20, 1, 1)])
def test_a_step_is_that_of_autograd(device, shape, gate, adds, last):
    torch.manual_seed(0)
    block = Block(shape[1], gate, adds == "projection").to(device)
    u, other = a_map(shape, device, last), a_map(shape, device, last)
    check(block, u, None if adds == "nothing" else other)


@pytest.mark.parametrize("gate", GATES)
def test_every_gate(device, gate):
    torch.manual_seed(1)
    check(Block(24, gate, False).to(device), a_map((3, 24, 6, 6), device, True), a_map((3, 24, 6, 6), device, True))


def test_data_far_from_zero_and_a_norm_without_weights(device):
    torch.manual_seed(2)
    u, other = a_map((4, 16, 9, 9), device, True, mean=300.0), a_map((4, 16, 9, 9), device, True)
    check(Block(16, "sigmoid", False, affine=False).to(device), u, other, tolerance=2e-3)
    check(Block(16, None, False, affine=False).to(device), u, None, tolerance=2e-3)


def test_many_images_and_split_positions(device):
    torch.manual_seed(3)
    check(
        Block(8, "sigmoid", False).to(device), a_map((130, 8, 3, 3), device, True), a_map((130, 8, 3, 3), device, True)
    )
    check(Block(4, None, False).to(device), a_map((1, 4, 40, 40), device, True), None)


def test_nan_passes_as_in_pytorch(device):
    torch.manual_seed(4)
    u, other = a_map((2, 8, 4, 4), device, True), a_map((2, 8, 4, 4), device, True)
    u[0, 3, 1, 1] = torch.nan
    for shortcut in (None, other):
        block = Block(8, None, False).to(device)
        truth = step(copy.deepcopy(block), u, shortcut, "reference")
        for got, want in zip(step(block, u, shortcut, "triton"), truth, strict=True):
            assert torch.equal(got.isnan(), want.isnan())


def test_a_second_derivative_is_refused(device):
    block = Block(8, "sigmoid", False).to(device)
    u = a_map((2, 8, 4, 4), device, True).requires_grad_()
    with senet.use_backend("triton"):
        out = block.train()(u, None)
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(out.sum(), u, create_graph=True)


def test_gates_are_numbered_as_in_the_reference(device):
    from senet.ops.tail import triton_batch_norm

    assert set(triton_batch_norm.GATE_NUMBERS) == set(reference.GATES) - {"tanh", "identity_tanh"}


@pytest.mark.parametrize("relu", [False, True])
def test_bias_shortcut_and_relu_in_one_pass(device, relu):
    from senet.ops.conv.early_gate import biased_sum

    torch.manual_seed(5)
    u, other = a_map((2, 12, 5, 5), device, True), a_map((2, 12, 5, 5), device, True)
    bias = torch.randn(12, device=device)
    for shortcut in (None, other):
        want = u + bias[:, None, None] + (0 if shortcut is None else shortcut)
        torch.testing.assert_close(biased_sum(u, bias, shortcut, relu), want.relu() if relu else want)
