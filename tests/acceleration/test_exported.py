"""The passes on programs of ``torch.export``: the same gates as in captured graphs, the same outputs as the program."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import senet
from helpers.acceleration import instances, report_of
from helpers.images import images
from helpers.messages import one_line
from helpers.networks import relative, settled
from senet.acceleration.exported import folded_program
from senet.acceleration.fold import EARLY
from senet.acceleration.modules import FoldedConv2d

NETWORKS = {
    "se_resnet18": lambda: senet.create_model("se_resnet18", num_classes=10),
    "mobilenetv3_small_050": lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
    "seresnet18": lambda: timm.create_model("seresnet18", num_classes=10),
    "efficientnet_b0": lambda: timm.create_model("efficientnet_b0", num_classes=10),
    "regnety_002": lambda: timm.create_model("regnety_002", num_classes=10),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
}
QUICK = ("se_resnet18", "mobilenet_v3_small")
NAMES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in NETWORKS]


@pytest.mark.parametrize("name", NAMES)
def test_exported_programs_have_the_same_gates_and_the_same_outputs(name, monkeypatch):
    model, x = settled(NETWORKS[name]()), images(64)
    convolutions = instances(monkeypatch, FoldedConv2d)
    program = torch.export.export(model, (x,))
    folded, report = folded_program(program)
    with torch.no_grad():
        assert relative(folded(x), program.module()(x)) < 1e-10
    assert len(convolutions) >= len([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    assert not any("batch_norm" in str(node.target) for node in folded.graph.nodes)
    captured = report_of(senet.accelerate(model, "reference"), x)
    assert report.inference == captured.inference
    assert report.inference
    assert report.left == captured.left
    single = copy.deepcopy(model).float()
    program = torch.export.export(single, (x.float(),))
    with torch.no_grad():
        expected = single(x.float())
        own_error = relative(expected.double(), model(x))
        assert relative(folded_program(program)[0](x.float()), expected) < max(1e-5, 4 * own_error)


def test_the_program_is_not_changed_and_its_current_weights_are_read():
    model, x = settled(NETWORKS["se_resnet18"]()), images(32)
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        before = program.module()(x)
        first, _ = folded_program(program)
        assert torch.equal(program.module()(x), before)
        program.state_dict["layer1.0.bn1.weight"].mul_(2)
        second, _ = folded_program(program)
        assert relative(second(x), program.module()(x)) < 1e-10
        assert relative(first(x), before) < 1e-10
        assert relative(second(x), before) > 1e-4


def test_dynamic_batches_and_a_second_export():
    model, x = settled(NETWORKS["se_resnet18"]()), images(32, 4)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=16)},))
    folded, report = folded_program(program)
    assert len(report.inference) == 8
    with torch.no_grad():
        for count in (2, 3, 4):
            assert relative(folded(x[:count]), model(x[:count])) < 1e-10
    again = torch.export.export(folded, (x,))
    assert relative(again.module()(x), model(x)) < 1e-10


def test_an_unknown_backend_is_named():
    program = torch.export.export(senet.create_model("se_resnet8").eval(), (torch.zeros(1, 3, 32, 32),))
    with pytest.raises(senet.InputError, match=one_line("fast…reference")):
        folded_program(program, "fast")


class Spelled(nn.Module):
    """A gate as people write it, behind a convolution."""

    def __init__(self, how):
        super().__init__()
        self.how, self.conv, self.bn = how, nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.fc1, self.fc2 = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x):
        u = self.bn(self.conv(x))
        return getattr(self, self.how)(u)

    def expanded(self, u):
        z = F.adaptive_avg_pool2d(u, 1).view(u.shape[0], -1)
        return u * torch.sigmoid(self.fc2(F.relu(self.fc1(z), inplace=True)))[:, :, None, None].expand_as(u)

    def written(self, u):
        e = self.fc2(F.hardswish(self.fc1(torch.flatten(F.adaptive_avg_pool2d(u, (1, 1)), 1)), inplace=True))
        return u * (F.relu6(e + 3.0, inplace=True).div_(6.0).reshape(-1, 8, 1, 1))

    def moved(self, u):
        z = u.mean((2, 3)).contiguous()
        return F.dropout(u * torch.tanh(self.fc2(F.silu(self.fc1(z)))).add(1).unsqueeze(-1).unsqueeze(-1), 0.5, False)


@pytest.mark.parametrize("how", ["expanded", "written", "moved"])
def test_gates_in_other_words(how):
    model, x = Spelled(how).double().eval(), images(8, 2)
    folded, report = folded_program(torch.export.export(model, (x,)))
    captured = report_of(senet.accelerate(model, "reference"), x)
    assert list(report.inference.values()) == list(captured.inference.values()) == [EARLY]
    with torch.no_grad():
        assert relative(folded(x), model(x)) < 1e-10
