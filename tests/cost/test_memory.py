"""Activation memory against arithmetic, autograd on real tensors and timm's networks; parts against the whole."""

from dataclasses import fields

import pytest
import timm
import torch
from torch import nn

import senet
from helpers.messages import one_line
from senet import SEConfig
from senet.bench.memory import saved_for_backward
from senet.cost.count import Cost, meta_model, module_costs
from senet.cost.memory import activation_memory
from senet.cost.parts import cost_parts, network_cost
from senet.errors import InputError

SIDE = 10
MAP = 4 * SIDE * SIDE  # bytes of one channel


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1), nn.Sigmoid()
    )


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_maps_of_a_small_network_counted_by_hand(device):
    model = small().to(device)
    memory = activation_memory(model, SIDE)
    # each convolution keeps its input, the norm its input, the ReLU and the sigmoid their outputs
    assert memory.saved == {"": 23 * MAP, "0": 3 * MAP, "1": 8 * MAP, "2": 8 * MAP, "4": 4 * MAP}
    # while the norm runs: the image, its input and its output
    assert memory.peak == (3 + 8 + 8) * MAP
    assert model.training


@pytest.mark.parametrize("name", ["se_resnet8", "se_shufflenet_v1_g3", "se_mobilenet_v1", "preresnet164"])
def test_saved_is_what_a_training_step_keeps(name):
    """Autograd on real tensors, in training mode, where each norm keeps a mean and a deviation a channel besides."""
    torch.manual_seed(0)
    model, size = senet.create_model(name, 10), 64 if senet.model_spec(name).input_size == 224 else 32
    counted = activation_memory(meta_model(name, 10), size)
    norms = 2 * 4 * sum(module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    model.train()
    with senet.use_backend("reference"):
        kept = saved_for_backward(model, torch.randn(1, 3, size, size), torch.tensor([3]))
    loss = 10 * 4 + 8 + 4  # the log-probabilities, the label, the sum of weights
    assert counted.saved[""] == kept - norms - loss


@pytest.mark.parametrize(("name", "oracle"), [("se_resnet50", "seresnet50"), ("senet154", "legacy_senet154")])
def test_timms_network_keeps_as_much(name, oracle):
    with torch.device("meta"):
        theirs = timm.create_model(oracle)
    assert activation_memory(theirs, 224).saved[""] == activation_memory(meta_model(name), 224).saved[""]


def test_memory_grows_with_the_area():
    small_images, large = (activation_memory(meta_model("vgg16_bn", 0), size) for size in (64, 128))
    pooled = 4 * 512  # features, whatever the size
    assert large.peak == 4 * small_images.peak
    assert large.saved[""] == pytest.approx(4 * small_images.saved[""], abs=4 * pooled)


def test_inference_mode_does_not_matter():
    expected = network_cost("se_resnet8")
    real = senet.create_model("se_resnet8", 10)
    with torch.inference_mode():
        assert network_cost("se_resnet8") == expected
        assert activation_memory(real, 32) == expected.memory


def test_what_is_frozen_keeps_nothing_and_still_has_parts():
    model = senet.create_model("se_resnet8", 10).requires_grad_(False)
    model.fc.requires_grad_(True)
    costs, memory = module_costs(model, 32), activation_memory(model, 32)
    parts = {part.name: part.saved for part in cost_parts(model, costs, memory)}
    assert parts == {"stem": 0, "stage 2": 0, "stage 3": 0, "stage 4": 0, "head": 4 * model.num_features}


class Listed(nn.Module):
    """Layers in a list, the second of them also by a name of its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)])
        self.last = self.layers[1]

    def forward(self, x):
        return self.last(self.layers[1](self.layers[0](x)))


def test_lists_and_shared_modules_have_their_parts():
    model = Listed()
    costs, memory = module_costs(model, SIDE), activation_memory(model, SIDE)
    assert memory.saved[""] == memory.saved["layers"] == (3 + 8 + 8) * MAP
    for per, names in (("stage", ["layers"]), ("block", ["layers.0", "layers.1"])):
        parts = cost_parts(model, costs, memory, per)
        assert [part.name for part in parts] == names
        assert sum_of(parts) == costs[""]


def sum_of(parts):
    return Cost(*(sum(getattr(part.cost, field.name) for part in parts) for field in fields(Cost)))


FAMILIES = ("se_resnet50", "se_vgg16_bn", "se_bn_inception", "se_inception_resnet_v2", "preresnet164")
FAMILIES += ("se_mobilenet_v1", "se_shufflenet_v1_g3", "se_shake26_2x96d")


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_are_the_whole_and_gates_stand_in_the_stage_they_are_in(name):
    model, spec = meta_model(name), senet.model_spec(name)
    costs, memory = module_costs(model, spec.input_size), activation_memory(model, spec.input_size)
    for per in ("stage", "block"):
        parts = cost_parts(model, costs, memory, per)
        assert sum_of(parts) == costs[""]
        assert sum(part.saved for part in parts) == memory.saved[""]
        assert (parts[0].name, parts[-1].name) == ("stem", "head")
        assert parts[-1].cost.se_params == 0
    if spec.se is not None:
        only = network_cost(name, 96, se=SEConfig(stages=(4,)))
        assert [part.name for part in only.parts if part.cost.se_params] == ["stage 4"]


def test_blocks_of_a_resnet_and_what_stands_around_them():
    parts = network_cost("se_resnet50", 64, "block").parts
    blocks = [f"layer{stage}.{block}" for stage, count in enumerate((3, 4, 6, 3), 1) for block in range(count)]
    assert [part.name for part in parts] == ["stem", *blocks, "head"]
    last = parts[-2].cost
    assert last.params == 2048 * 512 + 512 * 512 * 9 + 512 * 2048 + 2 * (512 + 512 + 2048) + last.se_params
    assert last.se_params == 2 * 2048 * 128 + 128 + 2048
    assert parts[-1].cost.params == 2048 * 1000 + 1000


def test_parts_of_another_librarys_network():
    with torch.device("meta"):
        model = timm.create_model("seresnet50")
    costs, memory = module_costs(model, 64), activation_memory(model, 64)
    stages = {part.name: part for part in cost_parts(model, costs, memory, "stage")}
    ours = {part.name: part for part in network_cost("se_resnet50", 64).parts}
    for number in range(1, 5):
        assert stages[f"layer{number}"].cost == ours[f"stage {number + 1}"].cost
    assert "layer2.3" in {part.name for part in cost_parts(model, costs, memory, "block")}


def test_images_that_are_too_small():
    with pytest.raises(InputError, match=one_line("74 … inception_v3 … at least 75")):
        network_cost("inception_v3", 74)
