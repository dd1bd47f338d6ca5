"""MobileNet and ShuffleNet against timm, against a forward pass written out from the paper, and against Table 3."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import senet
from helpers.images import images
from helpers.networks import assert_same_outputs, randomized
from senet import SEConfig, SqueezeExcite
from senet.models.mobile import ShuffleUnit


def started(model):
    """In float64, with He's gain for what one group sees: a depthwise convolution would else fade the map away."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, 0, (2 / module.weight[0].numel()) ** 0.5)
    return randomized(model, (0.6, 1.4)).double()


def gated(x, gate):
    """The block of section 3 with the weights of ``gate``, in two matrix products."""
    w1, w2 = gate.fc1.weight[:, :, 0, 0], gate.fc2.weight[:, :, 0, 0]
    hidden = (x.mean((2, 3)) @ w1.T + gate.fc1.bias).clamp(min=0)
    return x * (1 / (1 + (-(hidden @ w2.T + gate.fc2.bias)).exp()))[:, :, None, None]


def test_mobilenet_is_timms_and_takes_its_weights():
    theirs = started(timm.create_model("mobilenetv1_100", num_classes=11))
    ours = senet.create_model("mobilenet_v1", num_classes=11).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        assert_same_outputs(ours(images(batch=2)), theirs(images(batch=2)))


def test_se_mobilenet_is_timms_network_with_a_gate_behind_each_of_the_13_units():
    ours = started(senet.create_model("se_mobilenet_v1", num_classes=11))
    theirs = timm.create_model("mobilenetv1_100", num_classes=11).double().eval()
    plain = {key: value for key, value in ours.state_dict().items() if ".se." not in key}
    theirs.load_state_dict(plain, strict=True)
    units = [unit for stage in theirs.blocks for unit in stage]
    gates = [module for module in ours.modules() if isinstance(module, SqueezeExcite)]
    assert len(units) == len(gates) == 13
    for unit, gate in zip(units, gates, strict=True):
        unit.register_forward_hook(lambda module, args, out, gate=gate: gated(out, gate))
    with torch.no_grad():
        assert_same_outputs(ours(images(batch=2)), theirs(images(batch=2)))


@pytest.mark.parametrize("placement", ["pre", "post", "identity", "3x3"])
def test_mobilenet_has_no_place_for_a_residual_networks_placements(placement):
    with pytest.raises(ValueError, match=f"placement='{placement}'") as caught:
        senet.create_model("mobilenet_v1", se=SEConfig(placement=placement))
    assert "\n" not in str(caught.value)


def grouped_1x1(x, weight, groups):
    """Each group of inputs feeds its own group of outputs."""
    outputs = weight.shape[0] // groups
    parts = x.chunk(groups, dim=1)
    mixed = [
        torch.einsum("nchw,oc->nohw", part, weight[i * outputs : (i + 1) * outputs, :, 0, 0])
        for i, part in enumerate(parts)
    ]
    return torch.cat(mixed, dim=1)


def shuffled(x, groups):
    """Channel j of group i goes to place i of block j (section 3.1 of arXiv 1707.01083)."""
    size = x.shape[1] // groups
    return torch.stack([x[:, i * size + j] for j in range(size) for i in range(groups)], dim=1)


def normed(x, norm):
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return x * scale[:, None, None] + (norm.bias - norm.running_mean * scale)[:, None, None]


def shuffle_unit(x, unit, stride, groups, first_groups, placement="standard"):
    """A ShuffleNet unit as its Fig. 2 draws it, with SE as Fig. 5 of the SE paper places it."""
    at = {place: (lambda t: gated(t, unit.se)) if place == placement and unit.se else (lambda t: t) for place in PLACES}
    h = normed(grouped_1x1(at["pre"](x), unit.conv1.weight, first_groups), unit.bn1).clamp(min=0)
    h = shuffled(h, groups)
    h = at["3x3"](normed(F.conv2d(h, unit.conv2.weight, None, stride, 1, 1, h.shape[1]), unit.bn2))
    branch = at["standard"](normed(grouped_1x1(h, unit.conv3.weight, groups), unit.bn3))
    if stride == 1:
        return at["post"]((branch + at["identity"](x)).clamp(min=0))
    pooled = F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)
    return at["post"](torch.cat((at["identity"](pooled), branch), 1).clamp(min=0))


PLACES = ("standard", "pre", "post", "identity", "3x3")


@pytest.mark.parametrize("name", ["shufflenet_v1_g3", "se_shufflenet_v1_g3"])
def test_shufflenet_is_the_papers(name):
    model = started(senet.create_model(name, num_classes=11))
    with torch.no_grad():
        x = F.conv2d(images(batch=2), model.conv1.weight, None, 2, 1)
        x = F.max_pool2d(normed(x, model.bn1).clamp(min=0), 3, 2, 1)
        for stage, channels, units in ((model.layer1, 240, 4), (model.layer2, 480, 8), (model.layer3, 960, 4)):
            assert len(stage) == units
            for index, unit in enumerate(stage):
                first_groups = 1 if x.shape[1] == 24 else 3
                x = shuffle_unit(x, unit, 2 if index == 0 else 1, 3, first_groups)
                assert x.shape[1] == channels
        assert_same_outputs(model(images(batch=2)), x.mean((2, 3)) @ model.fc.weight.T + model.fc.bias)


@pytest.mark.parametrize("placement", PLACES)
@pytest.mark.parametrize("stride", [1, 2])
def test_every_placement_in_a_shuffle_unit(placement, stride):
    inputs, outputs = (24, 24) if stride == 1 else (12, 36)
    unit = started(ShuffleUnit(inputs, outputs, stride, 2, SEConfig(reduction=2, placement=placement), 3, 3))
    x = torch.rand(2, inputs, 7, 6, dtype=torch.float64)
    with torch.no_grad():
        assert_same_outputs(unit(x), shuffle_unit(x, unit, stride, 3, 3, placement))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.9's own Dynamo looks
@pytest.mark.parametrize("name", ["se_mobilenet_v1", "se_shufflenet_v1_g3"])
def test_compiles_as_one_graph(name):
    model = senet.create_model(name, num_classes=3).double()
    x = images(batch=2)
    expected = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-8, atol=1e-8 * expected.abs().max().item())


def cost(name, se):
    """Parameters in millions and multiply-adds in millions, the gates' pooling among them."""
    pooled = []
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = senet.create_model(name, se=se).eval()
        for module in model.modules():
            if isinstance(module, SqueezeExcite):
                module.register_forward_pre_hook(lambda module, args: pooled.append(args[0].numel()))
        model(torch.zeros(1, 3, 224, 224))
    return sum(p.numel() for p in model.parameters()) / 1e6, (counter.get_total_flops() / 2 + sum(pooled)) / 1e6


def test_mobilenets_published_costs():
    for se, params, mult_adds in ((None, 4.2, 569), (SEConfig(bias=False), 4.7, 572), (SEConfig(), 4.7, 572)):
        millions, mega = cost("mobilenet_v1", se)
        assert round(millions, 1) == params
        assert round(mega) == mult_adds


def test_shufflenets_published_costs():
    (plain, plain_mega), (gated_millions, gated_mega) = (cost("shufflenet_v1_g3", se) for se in (None, SEConfig()))
    assert math.floor(plain * 10) / 10 == 1.8  # the paper's digits, with the rest cut off
    assert math.floor(gated_millions * 10) / 10 == 2.4
    assert round(gated_millions - plain, 1) == 0.6
    assert plain_mega == pytest.approx(140, rel=0.02)  # "140" is the round figure for all networks of that width
    assert round(gated_mega - plain_mega) == 142 - 140
