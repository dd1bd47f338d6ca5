"""``torch.hub`` finds the zoo in a checkout, installed or not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import senet
from helpers.messages import assert_said

ROOT = str(Path(__file__).parent.parent)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """The checkout as torch.hub's cache holds a clone, so that nothing is downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "owner_senet_main").symlink_to(ROOT)
    return {"github": "owner/senet:main", "skip_validation": True, "trust_repo": True, "verbose": False}


def test_every_registered_network_is_listed_and_nothing_else(repository):
    assert torch.hub.list(**repository) == sorted(senet.list_models())


def test_help_says_what_the_network_is(repository):
    del repository["verbose"]
    text = torch.hub.help(model="se_resnet50", **repository)
    assert_said(text, "resnet … Squeeze-and-Excitation … 224 pixels")
    assert "plain" in torch.hub.help(model="resnet20", **repository)


def test_load_takes_the_arguments_of_create_model(tmp_path):
    torch.manual_seed(3)
    loaded = torch.hub.load(ROOT, "se_resnet8", source="local", num_classes=4, in_chans=1)
    torch.manual_seed(3)
    created = senet.create_model("se_resnet8", 4, 1)
    assert loaded.state_dict().keys() == created.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), created.parameters(), strict=True))
    path = senet.save(created, tmp_path / "w.safetensors")
    again = torch.hub.load(ROOT, "se_resnet8", source="local", pretrained=str(path), num_classes=4, in_chans=1)
    assert torch.equal(again.fc.weight, created.fc.weight)
    with pytest.raises(ValueError, match="depth"):
        torch.hub.load(ROOT, "se_resnet8", source="local", depth=3)


def test_without_an_installed_package(tmp_path):
    """A clone in torch.hub's cache: ``-S`` hides site-packages' editable install, the libraries come by PYTHONPATH."""
    script = (
        "import sys, torch; sys.path[:] = [p for p in sys.path if not p.endswith('/src')]\n"
        f"model = torch.hub.load({ROOT!r}, 'resnet8', source='local', num_classes=2)\n"
        "import senet; print(senet.__file__, model.num_classes, any(p.endswith('/src') for p in sys.path))"
    )
    libraries = [p for p in sys.path if p.endswith("site-packages")]
    run = subprocess.run(
        [sys.executable, "-S", "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(libraries)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == [str(Path(ROOT) / "src" / "senet" / "__init__.py"), "2", "False"]
