"""Inception-v3 against torchvision's, Inception-ResNet-v2 against timm's, BN-Inception against the authors' layers."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision

import senet
from helpers.messages import one_line
from helpers.networks import assert_same_function, assert_same_outputs, randomized
from senet import InputError, SEConfig, SqueezeExcite
from senet.cost.count import model_cost
from senet.models.inception import HalvingMaxPool

SCALES = (0.8, 1.2)  # the networks are deep


def torchvision_v3():
    """torchvision's network without its auxiliary classifier, which ours does not have."""
    return torchvision.models.inception_v3(num_classes=7, aux_logits=True, init_weights=False)


@pytest.mark.parametrize("side", [75, 120])
def test_torchvisions_weights_give_torchvisions_logits(side):
    theirs = torchvision_v3()
    randomized(theirs.double(), SCALES)
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith("AuxLogits.")}
    ours = senet.create_model("inception_v3", num_classes=7).double()
    assert_same_function(ours, theirs, side, batch=1, state=state, spread=1e-6)


@pytest.mark.parametrize("side", [75, pytest.param(122, marks=pytest.mark.slow)])
def test_timms_weights_give_timms_logits(side):
    theirs = timm.create_model("inception_resnet_v2", num_classes=7)
    randomized(theirs.double(), SCALES)
    ours = senet.create_model("inception_resnet_v2", num_classes=7).double()
    assert_same_function(ours, theirs, side, batch=1, state=theirs.state_dict(), spread=1e-6)


# The authors' SE-BN-Inception, module by module: output channels and bottleneck; the side of the map at 224 × 224.
SE_BN_MODULES = {
    "3a": (256, 16, 28),
    "3b": (320, 20, 28),
    "3c": (576, 36, 14),
    "4a": (576, 36, 14),
    "4b": (576, 36, 14),
    "4c": (608, 38, 14),
    "4d": (608, 38, 14),
    "4e": (1056, 66, 7),
    "5a": (1024, 64, 7),
    "5b": (1024, 64, 7),
}


def test_bn_inceptions_modules_are_the_authors():
    with torch.device("meta"):
        model = senet.create_model("se_bn_inception")
        shapes = {}
        for name in SE_BN_MODULES:
            module = model.get_submodule(f"inception_{name}")
            module.register_forward_hook(lambda _, args, out, name=name: shapes.update({name: out.shape}))
            assert module.se.fc1.out_channels == SE_BN_MODULES[name][1]
        model(torch.zeros(1, 3, 224, 224))
    assert {name: (c, h, w) for name, (_, c, h, w) in shapes.items()} == {
        name: (channels, side, side) for name, (channels, _, side) in SE_BN_MODULES.items()
    }


def caffe_module(unit, x, name):
    """A module as Caffe's definition lists its layers: convolutions, poolings, concatenation."""
    halves = name in ("3c", "4e")
    stride = 2 if halves else 1
    paths = [] if halves else [unit("branch1x1", x)]
    paths.append(unit("branch3x3_2", unit("branch3x3_1", x), stride, 1))
    double = unit("branch3x3dbl_2", unit("branch3x3dbl_1", x), 1, 1)
    paths.append(unit("branch3x3dbl_3", double, stride, 1))
    if halves:
        paths.append(F.max_pool2d(x, 3, 2, ceil_mode=True))
    elif name == "5b":
        paths.append(unit("branch_pool", F.max_pool2d(x, 3, 1, 1)))
    else:  # Caffe's average counts the padding
        ninths = torch.full((x.shape[1], 1, 3, 3), 1 / 9, dtype=x.dtype)
        paths.append(unit("branch_pool", F.conv2d(x, ninths, padding=1, groups=x.shape[1])))
    return torch.cat(paths, 1)


def caffe_se_bn_inception(state, x):
    """The authors' network as plain functions, with our parameters."""

    def unit(prefix, x, stride=1, pad=0):
        x = F.conv2d(x, state[f"{prefix}.conv.weight"], None, stride, pad)
        norm = [state[f"{prefix}.bn.{what}"] for what in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(x, *norm, eps=1e-5))

    x = F.max_pool2d(unit("conv1", x, 2, 3), 3, 2, ceil_mode=True)
    x = F.max_pool2d(unit("conv2", unit("conv2_reduce", x), 1, 1), 3, 2, ceil_mode=True)
    for name in SE_BN_MODULES:
        prefix = f"inception_{name}"
        x = caffe_module(lambda branch, *args, prefix=prefix: unit(f"{prefix}.{branch}", *args), x, name)
        fcs = [state[f"{prefix}.se.{what}"] for what in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")]
        squeezed = F.relu(F.conv2d(F.adaptive_avg_pool2d(x, 1), *fcs[:2]))
        x = x * torch.sigmoid(F.conv2d(squeezed, *fcs[2:]))
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


def test_se_bn_inception_computes_the_authors_definition():
    model = senet.create_model("se_bn_inception", num_classes=7).double().eval()
    randomized(model, SCALES)
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        assert_same_outputs(model(x), caffe_se_bn_inception(model.state_dict(), x), spread=1e-6)


@pytest.mark.parametrize("side", [1, 2, 7, 8, 28])
def test_halving_pool_is_caffes_at_even_sizes_and_rounds_up_at_odd_ones(side):
    x = -torch.rand(1, 2, side, side)  # negative: a zero from the padding would win
    out = HalvingMaxPool()(x)
    assert out.shape[-1] == (side + 1) // 2
    assert out[0, 0, -1, -1] == x[0, 0, 2 * (out.shape[-1] - 1) :, 2 * (out.shape[-1] - 1) :].max()
    if side % 2 == 0:
        assert torch.equal(out, F.max_pool2d(x, 3, 2, ceil_mode=True))


def test_parameters_of_inception_resnet_v2():
    plain, se = model_cost("inception_resnet_v2"), model_cost("se_inception_resnet_v2")
    with torch.device("meta"):
        assert plain.params == sum(p.numel() for p in timm.create_model("inception_resnet_v2").parameters())
    channels = [320] * 10 + [1088] * 20 + [2080] * 10
    assert se.params - plain.params == sum(2 * c * (c // 16) + c // 16 + c for c in channels)


def test_inception_v3_counts():
    theirs = sum(p.numel() for key, p in torchvision_v3().named_parameters() if not key.startswith("AuxLogits."))
    assert model_cost("inception_v3", 7).params == theirs
    published = torchvision.models.Inception_V3_Weights.DEFAULT.meta["_ops"]
    assert model_cost("inception_v3").mult_adds / 1e9 == pytest.approx(published, abs=6e-4)


def gates_of(name, **kwargs):
    with torch.device("meta"):
        model = senet.create_model(name, se=SEConfig(**kwargs))
    return [gate.removesuffix(".se") for gate, module in model.named_modules() if isinstance(module, SqueezeExcite)]


def test_gates_stand_on_every_module_or_in_the_chosen_stages():
    assert gates_of("bn_inception") == [f"inception_{name}" for name in SE_BN_MODULES]
    assert gates_of("bn_inception", stages=(3, 5)) == [f"inception_{name}" for name in ("3a", "3b", "4e", "5a", "5b")]
    assert gates_of("inception_v3") == [
        *("Mixed_5b", "Mixed_5c", "Mixed_5d"),
        *("Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
        *("Mixed_7a", "Mixed_7b", "Mixed_7c"),
    ]
    assert gates_of("inception_v3", stages=(4,)) == [f"Mixed_6{letter}" for letter in "abcde"]
    assert len(gates_of("inception_resnet_v2")) == 40
    assert gates_of("inception_resnet_v2", stages=(5,)) == [*(f"repeat_2.{i}" for i in range(9)), "block8"]


@pytest.mark.parametrize("name", ["bn_inception", "inception_v3", "inception_resnet_v2"])
def test_other_placements_are_refused(name):
    with torch.device("meta"), pytest.raises(InputError, match=one_line("placement='pre' … residual")):
        senet.create_model(name, se=SEConfig(placement="pre"))


def test_the_gate_scales_the_branch_before_the_constant():
    """relu(x + 0.17 · gate(u) · u), the gate seeing u, not 0.17 · u."""
    block = senet.create_model("se_inception_resnet_v2", num_classes=0).eval().repeat[0]
    x = torch.randn(1, 320, 5, 5)
    with torch.no_grad():
        u = block.conv2d(torch.cat([block.branch0(x), block.branch1(x), block.branch2(x)], 1))
        z = u.mean((2, 3), keepdim=True)
        gate = torch.sigmoid(block.se.fc2(torch.relu(block.se.fc1(z))))
        torch.testing.assert_close(block(x), torch.relu(x + 0.17 * gate * u))
