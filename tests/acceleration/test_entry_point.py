"""``torch.compile(model, backend="senet")``, in a process that never imports this package."""

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import senet
from helpers.accelerated import Body, assert_close, image, in_sweeps, outputs, step
from senet.acceleration.backend import compile_graph

GROUP = "torch_dynamo_backends"

PROGRAM = """
import sys
import torch, torchvision

torch.manual_seed(0)
model = torchvision.models.mobilenet_v3_small().eval()
x = torch.randn(2, 3, 64, 64)
assert not any(name.partition(".")[0] == "senet" for name in sys.modules)
fast = torch.compile(model, backend="senet", options={"backend": "reference", "then": "eager"})
with torch.no_grad():
    expected, mine = model(x), fast(x)
assert (mine - expected).abs().max() <= 1e-5 * expected.abs().max()
assert "senet.acceleration.backend" in sys.modules
"""


@pytest.fixture
def on_the_path(tmp_path):
    """A folder for PYTHONPATH with metadata as an installation writes it: a source tree by itself has none."""
    source = Path(senet.__file__).parents[1]
    for file in ("METADATA", "entry_points.txt"):
        target = tmp_path / "senet-0.dist-info" / file
        target.parent.mkdir(exist_ok=True)
        text = "Metadata-Version: 2.1\nName: senet\nVersion: 0\n"
        target.write_text(text if file == "METADATA" else f"[{GROUP}]\nsenet = {declared()}\n")
    return os.pathsep.join([str(tmp_path), str(source), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])


def declared():
    """The entry point as pyproject.toml declares it, or as it is installed."""
    file = Path(__file__).parents[2] / "pyproject.toml"
    if not file.is_file():
        (point,) = importlib.metadata.entry_points(group=GROUP, name="senet")
        return point.value
    return tomllib.loads(file.read_text(encoding="utf-8"))["project"]["entry-points"][GROUP]["senet"]


def test_the_entry_point_names_the_backend():
    point = importlib.metadata.EntryPoint("senet", declared(), GROUP)
    assert point.load() is compile_graph


def test_a_process_that_never_imports_the_package(on_the_path):
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"PYTHONPATH": on_the_path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("options", [{}, {"backend": "reference"}, {"then": "eager"}])
def test_the_backend_with_its_options(options):
    torch.manual_seed(0)
    model = Body().eval()
    fast = torch.compile(model, backend=compile_graph, options=options)
    assert_close(outputs(fast, image()), outputs(model, image()))
    with torch.no_grad():
        model.block.conv.weight.mul_(2)
    assert_close(outputs(fast, image()), outputs(model, image()))


def test_the_backend_in_training():
    torch.manual_seed(0)
    model, twin = Body().double().train(), Body().double().train()
    twin.load_state_dict(model.state_dict())
    fast = torch.compile(model, backend=compile_graph)
    with in_sweeps():
        fast(image().double()).square().sum().backward()
    _, expected, buffers = step(twin, image().double())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).abs().max() <= 1e-9 * max(g.abs().max() for g in expected.values())
    assert_close(dict(model.named_buffers()), buffers)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"speed": 9}, ("speed", "backend")), ({"backend": "fast"}, ("'fast'", "native")), ({"then": 1}, ("1", "eager"))],
)
def test_unknown_options_are_named(options, named):
    fast = torch.compile(Body().eval(), backend=compile_graph, options=options)
    with pytest.raises(Exception, match="InputError") as refused, torch.no_grad():
        fast(image())
    assert all(word in str(refused.value) for word in named)
