"""``senet.attach`` where no block can hold a gate, and on networks that do unusual things with their modules."""

import json
from collections import namedtuple

import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

import senet
from senet.attachment.sites import AFTER_ACTIVATIONS, AFTER_CONVOLUTIONS


class DenseLayer(nn.Module):
    """As timm's: it takes the maps of all layers before, and concatenates them itself."""

    def __init__(self, before):
        super().__init__()
        self.narrow, self.norm, self.relu = nn.Conv2d(before, 8, 1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, maps):
        x = self.relu(self.norm(self.narrow(torch.cat(maps, 1))))
        return torch.relu(self.norm2(self.conv(x)))


class DenseBlock(nn.ModuleDict):
    """A container that concatenates: its output is no single module's."""

    def forward(self, x):
        maps = [x]
        for layer in self.values():
            maps.append(layer(maps))
        return torch.cat(maps, 1)


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = DenseBlock({"a": DenseLayer(8), "b": DenseLayer(16)})
        self.head = nn.Linear(24, 4)

    def forward(self, x):
        return self.head(torch.relu(self.block(self.stem(x))).mean((2, 3)))


class Sines(nn.Module):
    """Convolutions with an activation that nobody knows."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.sin(self.b(torch.sin(self.norm(self.a(x))))).mean((2, 3)))


IMAGE = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("network", "names", "where"),
    [
        (DenseNet, ["block.a.relu", "block.b.relu", "block.a", "block.b"], AFTER_ACTIVATIONS),
        (Sines, ["norm", "b"], AFTER_CONVOLUTIONS),
    ],
)
def test_the_next_best_sites_are_taken_and_said(network, names, where):
    torch.manual_seed(0)
    model = network().eval()
    before = model(IMAGE)
    report = senet.attach(model, example_input=IMAGE)
    assert {site.name for site in report.sites} >= set(names)
    assert report.search.fallback == where
    assert where in report.summary()
    assert where in str(report)
    torch.testing.assert_close(model(IMAGE), before, rtol=0, atol=0)
    model(IMAGE).sum().backward()
    assert all(gate.fc2.weight.grad is not None for gate in report.gates)
    assert sorted(senet.detach(model)) == sorted(site.name for site in report.sites)


def test_the_best_sites_are_no_fallback():
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    for model in (plain, senet.create_model("resnet8", num_classes=4)):
        report = senet.attach(model, example_input=IMAGE, dry_run=True)
        assert report.search.fallback is None


def test_policies_choose_among_the_next_best():
    sites = senet.find_sites(DenseNet(), sites=senet.SitePolicy(max_parameters=60), example_input=IMAGE)
    assert 1 <= len(sites) < len(senet.find_sites(DenseNet(), example_input=IMAGE))


@pytest.mark.parametrize("config", [senet.SEConfig(placement="pre"), senet.SEConfig(placement="identity")])
def test_placements_in_a_block_have_no_next_best(config):
    with pytest.raises(senet.InputError, match="needs a residual block"):
        senet.attach(DenseNet(), config, example_input=IMAGE)


@pytest.mark.parametrize("name", ["densenet121", pytest.param("densenetblur121d", marks=pytest.mark.slow)])
def test_timms_densenets(name):
    model = timm.create_model(name, num_classes=4).eval()
    image = torch.zeros(1, 3, 64, 64)
    every = senet.find_sites(model, sites="all", example_input=image)
    assert len(every) > 50
    assert senet.find_sites(model, example_input=image) == every


def test_the_command_says_so():
    from senet.cli.main import app

    arguments = ["attach", "timm:densenet121", "--size", "64", "--num-classes", "4"]
    shown = CliRunner().invoke(app, [*arguments, "--format", "json"])
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["fallback"] == AFTER_ACTIVATIONS


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x, factor):
        return torch.relu(self.norm(self.conv(x)) + x) * factor


class Views(nn.Module):
    """Hands views of its parameters to a module: expanded, sliced, reshaped, in a tuple."""

    def __init__(self, view):
        super().__init__()
        self.stem, self.part, self.view = nn.Conv2d(3, 16, 3), Scaled(), view
        self.factor = nn.Parameter(torch.full((1, 16, 1, 1), 2.0))

    def forward(self, x):
        return self.part(self.stem(x), self.view(self.factor, len(x)))


@pytest.mark.parametrize(
    "view",
    [
        lambda factor, n: factor.expand(n, -1, -1, -1),
        lambda factor, n: factor[:1],
        lambda factor, n: factor.view(16, 1, 1),
        lambda factor, n: factor,
    ],
    ids=["expand", "slice", "view", "itself"],
)
def test_views_of_parameters_are_handed_on(view):
    model = Views(view)
    model.stem.weight.requires_grad_(False)
    learning = {name: p.requires_grad for name, p in model.named_parameters()}
    report = senet.attach(model, example_input=IMAGE)
    assert [site.name for site in report.sites] == ["part.norm"]
    assert {name: p.requires_grad for name, p in model.named_parameters() if ".se." not in name} == learning
    model(IMAGE).sum().backward()
    assert model.factor.grad is not None


Outputs = namedtuple("Outputs", ["map", "extra"])


class Auxiliary(nn.Module):
    """Returns more while it is trained, as GoogLeNet does."""

    def __init__(self, kind):
        super().__init__()
        self.conv, self.aux, self.kind = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4), kind

    def forward(self, x):
        y = torch.relu(self.conv(x))
        return self.kind(y, self.aux(y.mean((2, 3)))) if self.training else y


class WithAuxiliary(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 16, 3), Auxiliary(kind), nn.Linear(16, 4)

    def forward(self, x):
        y = self.body(self.stem(x))
        y, *extra = y if self.training else (y,)
        y = self.head(y.mean((2, 3)))
        return (y, *extra)


@pytest.mark.parametrize(
    "kind", [lambda *both: both, lambda *both: list(both), Outputs], ids=["tuple", "list", "named"]
)
def test_a_module_that_returns_more_in_training(kind):
    torch.manual_seed(0)
    model = WithAuxiliary(kind)
    before = model(IMAGE)
    report = senet.attach(model, sites=["body"], example_input=IMAGE)
    for now, then in zip(model(IMAGE), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)
    assert type(model.body(model.stem(IMAGE))) is type(Auxiliary(kind)(torch.zeros(1, 16, 4, 4)))
    model(IMAGE)[0].square().sum().backward()
    assert report.gates[0].fc2.bias.grad.abs().max() > 0


def test_vision_transformers_still_have_no_sites():
    with pytest.raises(senet.InputError, match="no site found"):
        senet.find_sites(
            timm.create_model("vit_tiny_patch16_224", img_size=32), example_input=torch.zeros(1, 3, 32, 32)
        )
