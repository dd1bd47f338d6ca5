"""Attach and detach on other people's networks: where the gates go, and that nothing else changes."""

from dataclasses import dataclass

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils._pytree import tree_leaves

import senet
from helpers.messages import one_line
from senet import SEConfig
from senet.attachment.sites import GATED


@dataclass
class Family:
    """A network, an input for it, the sites that are right and how many places have SE already."""

    build: object
    sites: list[str]
    shape: tuple[int, ...] = (2, 3, 64, 64)
    gated: int = 0
    kind: str = "residual"
    part: str = ""  # the submodule that takes the input where the whole wants more than a batch of images
    quick: bool = False


def blocks(counts, suffix, prefix="layer", first=1):
    return [f"{prefix}{stage}.{block}.{suffix}" for stage, n in enumerate(counts, first) for block in range(n)]


class Conv1dNet(nn.Module):
    """A residual network for signals, written as people do: functions for activations, one residual block."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(2, 16, 7, 2, padding=3), nn.BatchNorm1d(16), nn.ReLU())
        self.a, self.b = nn.Conv1d(16, 16, 3, padding=1), nn.Conv1d(16, 16, 3, padding=1)
        self.norm_a, self.norm_b = nn.GroupNorm(4, 16), nn.GroupNorm(4, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.norm_b(self.b(torch.relu(self.norm_a(self.a(x))))))
        return self.head(x.mean(2))


def of_torchvision(name, **kwargs):
    return lambda: torchvision.models.get_model(name, weights=None, **kwargs)


def of_timm(name):
    return lambda: timm.create_model(name)


SHUFFLE = [f"stage{stage}.{block}" for stage, n in ((2, 4), (3, 8), (4, 4)) for block in range(n)]
INCEPTION = [f"Mixed_{name}" for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")]
GOOGLENET = [f"inception{name}" for name in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")]
MOBILE_V2 = ["features.1.conv.0.2", *(f"features.{i}.conv.1.2" for i in range(2, 18))]
REGNET = [
    f"trunk_output.block{stage}.block{stage}-{block}.f.c.1"
    for stage, n in enumerate((1, 2, 7, 12), 1)
    for block in range(n)
]
CONVNEXT = [f"stages.{stage}.blocks.{block}.mlp.fc2" for stage, n in enumerate((2, 2, 6, 2)) for block in range(n)]
RESNETV2 = [f"stages.{stage}.blocks.{block}.conv3" for stage, n in enumerate((3, 4, 6, 3)) for block in range(n)]
LRASPP = [f"backbone.{i}.block.{0 if i == 1 else 1}.2" for i in (1, 2, 3, 7, 8, 9, 10)]
DENSE = [*(f"features.transition{i}.norm:input" for i in (1, 2, 3)), "features.norm5:input"]

FAMILIES = {
    "resnet18": Family(of_torchvision("resnet18"), blocks((2, 2, 2, 2), "bn2"), quick=True),
    "resnet50": Family(of_torchvision("resnet50"), blocks((3, 4, 6, 3), "bn3")),
    "timm resnet50d": Family(of_timm("resnet50d"), blocks((3, 4, 6, 3), "bn3")),
    "resnext50": Family(of_torchvision("resnext50_32x4d"), blocks((3, 4, 6, 3), "bn3")),
    "resnetv2_50": Family(of_timm("resnetv2_50"), RESNETV2),
    "res2net50": Family(of_timm("res2net50_26w_4s"), blocks((3, 4, 6, 3), "bn3")),
    "vgg11_bn": Family(
        of_torchvision("vgg11_bn", init_weights=False),
        [f"features.{i}" for i in (2, 6, 10, 13, 17, 20, 24, 27)],
        kind="activation",
    ),
    "densenet121": Family(of_torchvision("densenet121"), DENSE, kind="concat", quick=True),
    "inception_v3": Family(
        of_torchvision("inception_v3", init_weights=False), INCEPTION, (2, 3, 107, 107), kind="concat"
    ),
    "googlenet": Family(of_torchvision("googlenet", init_weights=False), GOOGLENET, kind="concat"),
    "mobilenet_v2": Family(of_torchvision("mobilenet_v2"), MOBILE_V2, kind="depthwise", quick=True),
    "mobilenet_v3_small": Family(
        of_torchvision("mobilenet_v3_small"),
        ["features.2.block.1.2", "features.3.block.1.2"],
        gated=9,
        kind="depthwise",
        quick=True,
    ),
    "mnasnet": Family(
        of_torchvision("mnasnet0_5"),
        [
            "layers.5",
            *(
                f"layers.{s}.{b}.layers.5"
                for s, n in zip(range(8, 14), (3, 3, 3, 2, 4, 1), strict=True)
                for b in range(n)
            ),
        ],
        kind="depthwise",
    ),
    "regnet_x_400mf": Family(of_torchvision("regnet_x_400mf"), REGNET),
    "convnext_atto": Family(of_timm("convnext_atto"), CONVNEXT, quick=True),
    "shufflenet_v2": Family(of_torchvision("shufflenet_v2_x0_5"), SHUFFLE, kind="concat", quick=True),
    "squeezenet": Family(
        of_torchvision("squeezenet1_1"),
        [f"features.{i}" for i in (3, 4, 6, 7, 9, 10, 11, 12)],
        kind="concat",
        quick=True,
    ),
    "lraspp": Family(
        of_torchvision("lraspp_mobilenet_v3_large", weights_backbone=None), LRASPP, gated=8, kind="depthwise"
    ),
    "deeplabv3": Family(
        of_torchvision("deeplabv3_resnet50", weights_backbone=None),
        [*(f"backbone.{name}" for name in blocks((3, 4, 6, 3), "bn3")), "classifier.0.project.2"],
        kind="",
    ),
    "fasterrcnn": Family(
        of_torchvision("fasterrcnn_mobilenet_v3_large_320_fpn", weights_backbone=None),
        [name.replace("backbone", "backbone.body") for name in LRASPP],
        gated=8,
        kind="depthwise",
        part="backbone",
    ),
    "r3d_18": Family(
        of_torchvision("r3d_18"),
        blocks((2, 2, 2, 2), "conv2.1"),
        (2, 3, 4, 32, 32),
    ),
    "1-D": Family(Conv1dNet, ["norm_b"], (2, 2, 50), quick=True),
}
# Families whose sites are too many to list: how many of each kind there are.
COUNTED = {
    # 1 bottleneck, 2·8 + 8·... basic blocks and 4 increments; every map that is brought to another resolution
    "hrnet_w18_small": {"residual": 23, "fusion": 19},
    "dla34": {"residual": 12, "concat": 6},
    "cspresnet50": {"residual": 13, "concat": 4},
    "inception_resnet_v2": {"residual": 40, "concat": 3},
    "repvgg_a0": {"residual": 17},
    "nf_resnet26": {"residual": 8},
}
PARAMETERS = [pytest.param(name, marks=[] if f.quick else [pytest.mark.slow]) for name, f in FAMILIES.items()]


def awake(model):
    """In evaluation mode, with none of the zeros that some put at the end of a branch: nothing would get a gradient."""
    for name, parameter in model.named_parameters():
        if name.endswith(("weight", "gain")) and not parameter.any():
            nn.init.ones_(parameter)
    return model.eval()


def snapshot(model):
    """Of each module its class, its attributes, its hooks; of each parameter and buffer which it is."""
    modules = {
        path: (type(m), set(vars(m)), list(m._modules), list(m._forward_hooks), list(m._forward_pre_hooks), m.training)
        for path, m in model.named_modules()
    }
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return modules, {name: (id(t), t.requires_grad, t._version) for name, t in tensors}, list(model.state_dict())


def outputs(model, x):
    return [t for t in tree_leaves(model(x)) if isinstance(t, torch.Tensor)]


def assert_same(got, expected):
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", PARAMETERS)
def test_attach_and_detach(name):
    family = FAMILIES[name]
    model = awake(family.build())
    x = torch.randn(family.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = outputs(model, x)
    before = snapshot(model)
    keys = before[2]

    report = senet.attach(model, example_input=x)

    assert [site.name for site in report.sites] == family.sites
    assert len([place for place, reason in report.skipped if reason == GATED]) == family.gated
    assert not family.kind or {site.kind for site in report.sites} == {family.kind}
    with torch.no_grad():
        assert_same(outputs(model, x), expected)
    state = model.state_dict()
    assert [key for key in state if ".se." not in key or key in keys] == keys
    assert [key for key in state if key not in keys] == [k for k in state if k not in keys and ".se." in k]
    assert len(state) - len(keys) == 4 * len(family.sites)
    assert report.added_parameters == sum(state[key].numel() for key in state if key not in keys)
    assert_learns(model.get_submodule(family.part), report, x)

    assert senet.detach(model) == [site.name for site in sorted_as(model, report.sites)]
    assert snapshot(model) == before
    with torch.no_grad():
        assert_same(outputs(model, x), expected)


def sorted_as(model, sites):
    order = [path for path, _ in model.named_modules()]
    return sorted(sites, key=lambda site: order.index(site.path))


def assert_learns(model, report, x):
    """Every gate is in the path: away from 1 it changes the output, and a gradient reaches all its parameters."""
    with torch.no_grad():
        before = outputs(model, x)
    for gate in report.gates:
        nn.init.normal_(gate.fc1.bias, 1, 0.1)  # keeps the hidden units alive
        nn.init.normal_(gate.fc2.weight)
    after = outputs(model, x)
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    sum(t.square().sum() for t in after).backward()
    for site, gate in zip(report.sites, report.gates, strict=True):
        for name, parameter in gate.named_parameters():
            assert parameter.grad is not None, f"{site.name} {name}"
            assert parameter.grad.abs().max() > 0, f"{site.name} {name}"


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTED)
def test_sites_by_kind(name):
    model = awake(timm.create_model(name))
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        expected = model(x)
    report = senet.attach(model, SEConfig(identity_init=True, hidden=8), example_input=x)  # 1 unit of 16 may be dead
    kinds = [site.kind for site in report.sites]
    assert {kind: kinds.count(kind) for kind in kinds} == COUNTED[name]
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert_learns(model, report, x)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        pytest.param("efficientnet_b0", 16, marks=pytest.mark.slow),
        ("mobilenetv3_small_050", 0),
        pytest.param("seresnet50", 16, marks=pytest.mark.slow),
        pytest.param("regnety_002", 13, marks=pytest.mark.slow),
        pytest.param("legacy_seresnet18", 8, marks=pytest.mark.slow),
        pytest.param("senet154", 50, marks=pytest.mark.slow),
        pytest.param("ese_vovnet19b_dw", 4, marks=pytest.mark.slow),
        pytest.param("resnest14d", 4, marks=pytest.mark.slow),
    ],
)
def test_networks_with_se_are_left_alone(name, count):
    model = timm.create_model(name)
    if not count:  # two of its blocks have no SE
        report = senet.attach(model, dry_run=True, example_input=torch.zeros(1, 3, 64, 64))
        assert [site.path for site in report.sites] == ["blocks.1.0.bn2.act", "blocks.1.1.bn2.act"]
        return
    with pytest.raises(senet.InputError, match=one_line(f"no site … {count} places … has SE")):
        senet.attach(model, example_input=torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet"])
def test_training_is_the_same_bit_by_bit(name):
    family = FAMILIES[name]
    model = family.build().train()
    x = torch.randn(2, 3, 64, 64)
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def step():
        model.load_state_dict(state, strict=False)
        model.zero_grad()
        torch.manual_seed(5)  # dropout
        y = model(x)
        y.square().sum().backward()
        statistics = {k: v.clone() for k, v in model.named_buffers()}
        return y.detach(), statistics, {k: p.grad for k, p in model.named_parameters()}

    y, statistics, gradients = step()
    senet.attach(model, SEConfig(identity_init=True, reduction=8), example_input=x)
    attached_y, attached_statistics, attached_gradients = step()
    assert torch.equal(attached_y, y)
    assert all(torch.equal(attached_statistics[key], value) for key, value in statistics.items())
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            attached_gradients[key], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item()
        )
