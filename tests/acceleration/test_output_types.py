"""Outputs keep their types: containers, keys, and what is no tensor; what was a list can be appended to."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torchvision

import senet
from helpers.accelerated import Body, assert_close, assert_same, image, outputs

Pair = namedtuple("Pair", "features logits")


@dataclass
class Result:
    logits: torch.Tensor
    features: list


class InAList(Body):
    def forward(self, x):
        return [self.stem(x), self.body(x)]


class InATuple(Body):
    def forward(self, x):
        return self.stem(x), (self.body(x), None)


class InADict(Body):
    def forward(self, x):
        return {"features": [self.stem(x)], "out": {"logits": self.body(x)}, "classes": 10, "name": "a"}


class InOrder(Body):
    def forward(self, x):
        return OrderedDict(out=self.body(x), aux=self.stem(x))


class Named(Body):
    def forward(self, x):
        return Pair(self.stem(x), self.body(x))


class WithNumbers(Body):
    def forward(self, x):
        return self.body(x), x.shape[0], 0.5, [True, x.shape]


@pytest.mark.parametrize("network", [InAList, InATuple, InADict, InOrder, Named, WithNumbers], ids=lambda n: n.__name__)
def test_containers(network):
    assert_same(network, image(), calls=2)
    torch.manual_seed(0)
    model = network().eval()
    ((mine,), (expected,)) = outputs(senet.accelerate(model), image()), outputs(model, image())
    assert type(mine) is type(expected)


def test_lists_and_dictionaries_can_be_changed():
    (features,) = outputs(senet.accelerate(InAList().eval()), image())
    features.append(features[0])
    features.insert(0, features[0])
    assert len(features) == 4
    (named,) = outputs(senet.accelerate(InOrder().eval()), image())
    named.update(more=1)
    named.move_to_end("out")
    assert list(named) == ["aux", "more", "out"]


class InADataclass(Body):
    def forward(self, x):
        return Result(self.body(x), [self.stem(x)])


def test_a_dataclass():
    torch.manual_seed(0)
    model = InADataclass().eval()
    fast = senet.accelerate(model)
    for _ in range(2):
        ((mine,), (expected,)) = outputs(fast, image()), outputs(model, image())
        assert type(mine) is Result
        assert_close([mine.logits, mine.features], [expected.logits, expected.features])


class Passing(Body):
    """The image itself is returned, too."""

    def forward(self, x):
        return self.body(x), x


def test_an_input_that_is_returned_is_the_same_tensor():
    x = image()
    ((_, returned),) = outputs(senet.accelerate(Passing().eval()), x)
    assert returned is x


def test_features_of_a_network_of_the_zoo():
    model = senet.create_model("se_resnet18", features_only=True).eval()
    fast = senet.accelerate(model)
    ((mine,), (expected,)) = outputs(fast, image(1, 3, 64, 64)), outputs(model, image(1, 3, 64, 64))
    assert type(mine) is type(expected) is list
    assert_close(mine, expected, 1e-4)
    mine.insert(0, mine[0])


def test_a_segmentation_network_of_torchvision():
    torch.manual_seed(0)
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None).eval()
    fast = senet.accelerate(model)
    ((mine,), (expected,)) = outputs(fast, image(1, 3, 64, 64)), outputs(model, image(1, 3, 64, 64))
    assert type(mine) is type(expected) is OrderedDict
    assert_close(mine, expected, 1e-4)
    mine.update(more=1)


def test_subclasses_and_layout_of_outputs():
    """Maps come in a dense layout with the ordinary strides or in channels_last; vectors are contiguous."""
    torch.manual_seed(0)
    model = InATuple().eval()
    (((features, (logits, _)),),) = (outputs(senet.accelerate(model), image()),)
    assert type(features) is type(logits) is torch.Tensor
    assert not features.requires_grad
    assert logits.is_contiguous()
    assert features.is_contiguous() or features.is_contiguous(memory_format=torch.channels_last)
    features.view(-1) if features.is_contiguous() else features.permute(0, 2, 3, 1).reshape(-1)
