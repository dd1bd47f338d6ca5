import pytest
import timm
import torch
from torch import nn

import senet
from senet.measure.cost import model_cost, module_cost
from senet.measure.timing import Timing, interleaved, ratio


@pytest.mark.parametrize(
    ("name", "millions", "giga"),
    # Parameters: derived from Table 2's networks, and timm's counts. Multiply-adds: Table 2 within ±0.02 (v1 strides).
    [
        ("resnet50_v1", 25.557, 3.86),
        ("se_resnet50_v1", 28.088, 3.87),
        ("resnet101_v1", 44.549, 7.58),
        ("resnet152_v1", 60.193, 11.30),
        ("resnext50_32x4d", 25.029, 4.24),
        ("resnext101_32x4d", 44.178, 7.99),
    ],
)
def test_published_costs(name, millions, giga):
    cost = model_cost(name)
    assert cost.params / 1e6 == pytest.approx(millions, abs=5e-4)
    assert round(cost.mult_adds / 1e9, 2) == pytest.approx(giga, abs=0.02 + 1e-9)  # compared as printed


@pytest.mark.parametrize(
    ("name", "oracle"),
    [("se_resnet50", "seresnet50"), ("se_resnext101_32x4d", "seresnext101_32x4d"), ("senet154", "senet154")],
)
def test_parameter_counts_are_timms(name, oracle):
    with torch.device("meta"):
        theirs = sum(p.numel() for p in timm.create_model(oracle).parameters())
    assert model_cost(name).params == theirs


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
    cost = module_cost(model, 10)
    assert cost.mult_adds == 3 * 8 * 9 * 100 + 8 * 5
    assert model.training


def test_equation_5_gives_the_added_weights():
    plain, se = (model_cost("resnet50", se=config).params for config in (None, senet.SEConfig(bias=False)))
    blocks_and_channels = [(3, 256), (4, 512), (6, 1024), (3, 2048)]
    assert se - plain == 2 * sum(n * c * c for n, c in blocks_and_channels) // 16


def test_interleaving_turns_the_order_and_counts_rounds():
    calls = []
    timings = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4, warmup=2)
    assert "".join(calls) == "abbaabbaabba"
    assert all(len(t.rounds) == 4 for t in timings.values())


def test_ratio_is_of_the_same_rounds():
    drifting = Timing((1.0, 2.0, 4.0)), Timing((2.0, 4.0, 8.0))
    result = ratio(*drifting)
    assert (result.q25, result.median, result.q75) == (0.5, 0.5, 0.5)
