"""Gates are found in everybody's networks, and what is heard from them is what the network computed."""

import warnings
from contextlib import ExitStack

import pytest
import timm
import torch
import torchvision
from timm.layers import EffectiveSEModule, GluMlp
from timm.layers import SEModule as TimmSE
from timm.layers.cbam import CbamModule
from timm.layers.squeeze_excite import SqueezeExciteCl
from timm.models._efficientnet_blocks import SqueezeExcite as EfficientNetSE
from timm.models.senet import SEModule as LegacySE
from torch import nn

import senet
from senet.nn.squeeze_excite import GATE_NAMES
from senet.surgery.find_gates import find_gates, plain_network


def heard(model, *inputs):
    """Excitations by gate, and the output, of one forward pass."""
    values = {}
    with torch.no_grad():
        gates = find_gates(model)
        for gate in gates:
            values[gate.name] = []
        with ExitStack() as stack:
            for gate in gates:
                stack.enter_context(gate.listening(values[gate.name].append))
            output = model(*inputs)
    return values, output


class UsersOwn(nn.Module):
    """As in many repositories: linear layers in a Sequential."""

    def __init__(self, channels=8):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, channels), nn.Sigmoid())

    def forward(self, x):
        b, c = x.shape[:2]
        return x * self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1).expand_as(x)


class HuggingFaceLike(nn.Module):
    """RegNet's of transformers: pooler, attention; called by a keyword here."""

    def __init__(self, channels=8):
        super().__init__()
        self.pooler = nn.AdaptiveAvgPool2d((1, 1))
        self.attention = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.ReLU(), nn.Conv2d(4, channels, 1), nn.Sigmoid())

    def forward(self, hidden_state):
        return hidden_state * self.attention(self.pooler(hidden_state))


FOREIGN = {
    "timm": (lambda: TimmSE(8, rd_channels=4), "two-fc"),
    "timm, norm and max pool": (
        lambda: TimmSE(8, rd_channels=4, norm_layer=nn.BatchNorm2d, add_maxpool=True),
        "two-fc",
    ),
    "timm, hard": (lambda: TimmSE(8, gate_layer="hard_sigmoid"), "two-fc"),
    "timm, effective": (lambda: EffectiveSEModule(8), "one-fc"),
    "timm, efficientnet": (lambda: EfficientNetSE(8, act_layer=nn.SiLU), "two-fc"),
    "timm, legacy": (lambda: LegacySE(8, 2), "two-fc"),
    "torchvision": (lambda: torchvision.ops.SqueezeExcitation(8, 4, nn.SiLU), "two-fc"),
    "torchvision, hard": (lambda: torchvision.ops.SqueezeExcitation(8, 4, scale_activation=nn.Hardsigmoid), "two-fc"),
    "a user's": (UsersOwn, "two-fc"),
    "hugging face": (HuggingFaceLike, "two-fc"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_gates_are_found_and_heard(name):
    make, kind = FOREIGN[name]
    network = nn.Sequential(nn.Conv2d(3, 8, 3), make(), nn.ReLU()).eval()
    (gate,) = find_gates(network)
    assert (gate.name, gate.kind, gate.channels) == ("1", kind, 8)
    assert (gate.low, gate.neutral, gate.high) == (0, 0.5, 1)
    x = torch.randn(5, 3, 9, 9)
    before = network(x)
    values, output = heard(network, x)
    assert torch.equal(output, before)
    u = network[0](x)
    (excitation,) = values["1"]
    assert excitation.shape == (5, 8)
    assert torch.equal(u * excitation[:, :, None, None], network[1](u))
    assert not any(module._forward_hooks for module in network.modules())


def test_channels_last_gate_of_timm():
    network = nn.Sequential(SqueezeExciteCl(16))
    x = torch.randn(2, 4, 4, 16)
    values, output = heard(network, x)
    assert torch.equal(x * values["0"][0][:, None, None, :], output)


@pytest.mark.parametrize("identity_init", [False, True])
@pytest.mark.parametrize("gate", GATE_NAMES)
def test_our_gates_and_their_ranges(gate, identity_init):
    module = senet.SqueezeExcite(8, senet.SEConfig(2, gate=gate, identity_init=identity_init))
    (found,) = find_gates(nn.Sequential(module))
    ends = {"sigmoid": (0, 0.5, 1), "hard_sigmoid": (0, 0.5, 1), "tanh": (-1, 0, 1), "relu": (0, 0, float("inf"))}[gate]
    if identity_init:
        ends = {"tanh": (0, 1, 2), "relu": (0, 1, float("inf"))}.get(gate, (0, 1, 2))
    assert (found.low, found.neutral, found.high) == ends
    x = torch.randn(3, 8, 6)
    values, _ = heard(nn.Sequential(module), x)
    assert torch.equal(values["0"][0], module.gate(x))


def test_no_squeeze_gives_the_mean_over_the_map():
    module = senet.SqueezeExcite(8, senet.SEConfig(2, squeeze="none"))
    x = torch.randn(3, 8, 5, 5)
    values, _ = heard(nn.Sequential(module), x)
    torch.testing.assert_close(values["0"][0], module.gate(x).mean((2, 3)))


def test_fused_block_ends_are_heard_too():
    network = senet.create_model("se_resnet8", 10).double()  # in training mode its tails run fused
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        before = network(x)
    values, output = heard(network, x)
    assert all(len(v) == 1 for v in values.values())
    torch.testing.assert_close(output, before, rtol=1e-9, atol=1e-9)
    assert len(values) == 3


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (lambda: timm.create_model("seresnet18"), 8),
        (lambda: timm.create_model("legacy_seresnet18"), 8),
        (lambda: timm.create_model("efficientnet_b0"), 16),
        (lambda: timm.create_model("mobilenetv3_small_050"), 9),
        (lambda: timm.create_model("regnety_002"), 13),
        (lambda: timm.create_model("ese_vovnet19b_slim"), 4),
        (lambda: torchvision.models.mobilenet_v3_small(), 9),
        (lambda: torchvision.models.regnet_y_400mf(), 16),
        (lambda: senet.create_model("se_mobilenet_v1"), 13),
    ],
)
def test_whole_networks(model, count):
    network = model().eval()
    gates = find_gates(network)
    assert len(gates) == count
    values, _ = heard(network, torch.randn(2, 3, 64, 64))
    for gate in gates:
        (excitation,) = values[gate.name]
        assert excitation.shape == (2, gate.channels)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "ghostnet_050", "vit_tiny_patch16_224", "mixer_s32_224"])
def test_networks_without_gates_have_none(name):
    expected = sum(type(m).__name__ == "SqueezeExcite" for m in timm.create_model(name).modules())
    assert len(find_gates(timm.create_model(name))) == expected


def test_a_lookalike_is_told_when_it_runs():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 4)
            self.outer = nn.Linear(4, 8)
            self.sigmoid = nn.Sigmoid()

        def forward(self, x):
            return self.sigmoid(self.outer(self.inner(x)))

    network = nn.Sequential(Decoder())
    values, _ = heard(network, torch.randn(2, 8))
    assert values == {"0": [None]}
    assert find_gates(GluMlp(8)) == []


def test_a_gate_of_two_inputs_is_no_gate_function():
    class Product(nn.Module):
        def forward(self, a, b):
            return a * b

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.gate, self.fc2 = nn.Linear(8, 4), Product(), nn.Linear(4, 8)

    assert [gate.name for gate in find_gates(nn.Sequential(Gated(), UsersOwn()))] == ["1"]


def test_cbam_channel_gate_counts():
    network = nn.Sequential(CbamModule(16, rd_channels=4)).eval()
    values, _ = heard(network, torch.randn(2, 16, 7, 7))
    assert list(values) == ["0.channel"]
    assert values["0.channel"][0].shape == (2, 16)


def test_a_shared_gate_function_is_not_mixed_up():
    network = nn.Sequential(TimmSE(8), TimmSE(8)).eval()
    network[1].gate = network[0].gate
    x = torch.randn(3, 8, 4, 4)
    values, _ = heard(network, x)
    y = network[0](x)
    assert torch.equal(x * values["0"][0][:, :, None, None], y)
    assert torch.equal(y * values["1"][0][:, :, None, None], network[1](y))


def test_wrapped_and_accelerated_networks():
    network = senet.create_model("se_resnet8", 10).eval()
    names = [gate.name for gate in find_gates(network)]
    assert names == ["layer1.0.se", "layer2.0.se", "layer3.0.se"]
    for wrapped in (nn.DataParallel(network), torch.compile(network), senet.accelerate(network)):
        assert [gate.name for gate in find_gates(wrapped)] == names
    fast = senet.accelerate(network)
    inner = plain_network(fast)
    assert type(inner) is type(network)
    assert inner.layer1[0].se is fast.layer1[0].se


def test_what_cannot_be_looked_into():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch leaves TorchScript behind; people still have such files
        scripted = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(senet.InputError, match="TorchScript"):
        find_gates(scripted)
    with pytest.raises(senet.InputError, match="got dict"):
        find_gates({})
