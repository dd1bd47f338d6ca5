"""Counted costs against other people's networks and counts, and against arithmetic by hand; turns in timing."""

import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import senet
from helpers.messages import one_line
from senet import SEConfig, SqueezeExcite
from senet.cost.count import Cost, meta_model, model_cost, module_cost, module_costs
from senet.system.timing import Timing, interleaved, ratio


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("se_resnet50", "seresnet50"),
        ("se_resnet50_v1", "legacy_seresnet50"),
        ("se_resnext50_32x4d", "legacy_seresnext50_32x4d"),
        ("se_resnext101_32x4d", "seresnext101_32x4d"),
        ("senet154", "senet154"),
        ("inception_resnet_v2", "inception_resnet_v2"),
        ("mobilenet_v1", "mobilenetv1_100"),
    ],
)
def test_counts_are_those_of_timms_network(name, oracle):
    with torch.device("meta"):
        theirs = timm.create_model(oracle).eval()
        x = torch.zeros(1, 3, *[senet.model_spec(name).input_size] * 2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        theirs(x)
    cost = model_cost(name)
    assert cost.params == sum(p.numel() for p in theirs.parameters())
    assert cost.running_stats == sum(b.numel() for key, b in theirs.named_buffers() if "running" in key)
    assert cost.mult_adds == counter.get_total_flops() // 2
    gates = {key: p for key, p in theirs.named_parameters() if ".se." in key or ".se_module." in key}
    assert cost.se_params == sum(p.numel() for p in gates.values())
    assert cost.se_mult_adds == sum(p.numel() for key, p in gates.items() if key.endswith("weight"))
    assert module_cost(theirs, x.shape[-1]) == cost  # SE is found in their network as well


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("resnet18", "ResNet18_Weights"),
        ("resnet50", "ResNet50_Weights"),
        ("resnet101", "ResNet101_Weights"),
        ("resnet152", "ResNet152_Weights"),
        ("resnext50_32x4d", "ResNeXt50_32X4D_Weights"),
        ("vgg16_bn", "VGG16_BN_Weights"),
    ],
)
def test_counts_are_those_that_torchvision_publishes(name, weights):
    published = getattr(torchvision.models, weights).IMAGENET1K_V1.meta
    cost = model_cost(name)
    assert cost.params == published["num_params"]
    assert cost.mult_adds / 1e9 == pytest.approx(published["_ops"], abs=1.1e-3)  # it prints three decimals


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet20", 0.27),
        ("resnet32", 0.46),
        ("resnet44", 0.66),
        ("resnet56", 0.85),
        ("resnet110", 1.7),
        ("preresnet164", 1.7),
        ("wrn16_8", 11.0),
    ],
)
def test_cifar_counts_are_those_of_the_networks_own_papers(name, millions):
    assert model_cost(name, 10).params / 1e6 == pytest.approx(millions, rel=0.025)


def test_multiply_adds_of_layers_counted_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    model.train()
    model[0].eval()
    costs = module_costs(model, 10)
    assert costs[""].mult_adds == 3 * 8 * 9 * 100 + 8 * 5
    assert (costs["0"].mult_adds, costs["1"].mult_adds, costs["3"].mult_adds) == (3 * 8 * 9 * 100, 0, 8 * 5)
    assert costs["3"].params == 8 * 5 + 5
    assert model.training
    assert not model[0].training, "every module keeps its own mode"


@pytest.mark.parametrize(("squeeze", "pixels"), [("avg", 1), ("max", 1), ("none", 36)])
def test_a_gates_share_counted_by_hand(squeeze, pixels):
    gate = SqueezeExcite(32, SEConfig(reduction=4, squeeze=squeeze))
    model = nn.Sequential(nn.Conv2d(3, 32, 1), gate, nn.BatchNorm2d(32))
    costs = module_costs(model, 6)
    whole = costs[""]
    assert whole.se_params == costs["1"].params == 2 * 32 * 8 + 8 + 32
    assert whole.se_mult_adds == costs["1"].mult_adds == 2 * 32 * 8 * pixels
    assert whole.squeeze_adds == (32 * 36 if squeeze != "none" else 0)
    assert whole.scale_mults == 32 * 36
    assert whole.mult_adds == 3 * 32 * 36 + whole.se_mult_adds
    assert whole.running_stats == 2 * 32
    assert whole.params_with_statistics == whole.params + 64
    assert whole.paper_mult_adds == whole.mult_adds + whole.squeeze_adds
    assert not gate._forward_hooks


class Odd(nn.Module):
    """Layers in a list, a gate and a convolution in two places each, a gate called by keyword, and no gate at all."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)])
        gate = SqueezeExcite(8, SEConfig(4, bias=False))
        self.a, self.b = (
            nn.ModuleDict({"se": gate}),
            nn.ModuleDict({"se": gate, "conv": nn.Conv2d(8, 8, 1, bias=False)}),
        )
        self.again = self.b["conv"]
        self.head = Autoencoder()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        x = self.b["se"](x=self.a["se"](x))
        return self.head(self.again(self.b["conv"](x)).mean((2, 3)))


class Autoencoder(nn.Module):
    """What an SE gate is made of, and none: it does not return its input rescaled."""

    def __init__(self):
        super().__init__()
        self.fc1, self.relu, self.fc2, self.sigmoid = nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8), nn.Sigmoid()

    def forward(self, x):
        hidden = self.relu(self.fc1(x))
        return self.sigmoid(self.fc2(hidden)), hidden


def test_lists_shared_modules_and_what_only_looks_like_a_gate():
    model, pixels = Odd(), 5 * 5
    costs = module_costs(model, 5)
    assert costs["layers"].mult_adds == (3 * 8 + 8 * 8 * 9) * pixels, "a list is not called, its layers are"
    assert costs["a"].se_mult_adds == costs["a"].mult_adds == 2 * (2 * 8 * 2), "both calls"
    assert (costs["b"].se_mult_adds, costs["b"].mult_adds) == (0, 2 * 8 * 8 * pixels)
    assert (costs[""].squeeze_adds, costs[""].scale_mults) == (2 * 8 * pixels, 2 * 8 * pixels)
    assert costs[""].se_params == costs["a.se"].params == 2 * 8 * 2
    assert costs["head"].params == 2 * 8 * 2 + 2 + 8
    children = [cost for name, cost in costs.items() if name and "." not in name]
    for field in ("params", "mult_adds", "se_params", "se_mult_adds", "squeeze_adds", "scale_mults"):
        assert sum(getattr(cost, field) for cost in children) == getattr(costs[""], field)


def test_attached_gates_are_counted_where_they_are_attached():
    model = senet.create_model("resnet8", 10)
    before = module_cost(model, 32)
    senet.attach(model, SEConfig(4))
    costs = module_costs(model, 32)
    added = sum(p.numel() for name, p in model.named_parameters() if ".se." in name)
    assert costs[""].se_params == costs[""].params - before.params == added > 0
    for name, cost in costs.items():
        if name.endswith(".se"):
            norm = costs[name.removesuffix(".se")]
            assert norm.se_mult_adds == norm.mult_adds == cost.mult_adds > 0


def test_networks_without_parameters_and_with_a_scripted_part():
    assert module_cost(nn.AvgPool2d(2), 4) == Cost()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit")  # deprecated, in a category that moves
        scripted = torch.jit.script(nn.Conv2d(3, 4, 1))
    assert module_cost(nn.Sequential(scripted, nn.Conv2d(4, 2, 1)), 4).mult_adds == (3 * 4 + 4 * 2) * 16


def test_images_that_are_too_small_for_a_count():
    for size in (0, 74):
        with pytest.raises(senet.InputError, match=one_line(f"{size} … inception_v3 … at least 75")):
            model_cost("inception_v3", input_size=size)


def test_a_wrapped_network_and_a_real_one_count_as_the_one_without_memory():
    real = senet.create_model("se_resnet8", 10)
    expected = model_cost("se_resnet8")
    assert module_cost(real, 32) == expected
    assert module_cost(torch.compile(real), 32) == expected
    assert module_cost(nn.DataParallel(real), 32) == expected
    assert next(meta_model("se_resnet8").parameters()).is_meta


def test_equation_5_is_the_counted_weights_of_the_gates():
    blocks_and_channels = [(3, 256), (4, 512), (6, 1024), (3, 2048)]
    cost = model_cost("resnet50", se=SEConfig(bias=False))
    assert cost.se_params == 2 * sum(n * c * c for n, c in blocks_and_channels) // 16
    assert cost.se_params == cost.params - model_cost("resnet50").params
    assert cost.se_mult_adds == cost.se_params  # a vector meets each weight once


def test_interleaving_turns_the_order_and_counts_rounds():
    calls = []
    timings = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4, warmup=2)
    assert "".join(calls) == "abbaabbaabba"
    assert all(len(t.rounds) == 4 for t in timings.values())


def test_ratio_is_of_the_same_rounds():
    drifting = Timing((1.0, 2.0, 4.0)), Timing((2.0, 4.0, 8.0))
    result = ratio(*drifting)
    assert (result.q25, result.median, result.q75) == (0.5, 0.5, 0.5)
