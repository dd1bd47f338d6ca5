"""`torchvision:NAME` and `timm:NAME`: what their builders are given, and heads that other data want."""

import pytest
import torchvision
from torch import nn

import senet
from helpers.messages import one_line


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("timm:resnet18.a9", {}, "timm … 'resnet18.a9' … timm:resnet18"),
        ("torchvision:resnet18", {"num_classes": -1}, "num_classes=-1 … at least 1"),
        ("torchvision:resnet18", {"num_classes": 0}, "num_classes=0 … at least 1"),
        ("timm:resnet18", {"num_classes": -1}, "num_classes=-1 … at least 0"),
        ("torchvision:resnet18", {"in_chans": 1}, "in_chans=3"),
    ],
)
def test_mistakes(name, arguments, message):
    with pytest.raises(senet.InputError, match=one_line(message)):
        senet.create_model(name, **arguments)


@pytest.mark.parametrize("name", ["densenet121", "mobilenet_v2"])
def test_drop_rate_by_either_name(name):
    model = senet.create_model(f"torchvision:{name}", 2, drop_rate=0.25)
    rates = {m.drop_rate for m in model.modules() if hasattr(m, "drop_rate")}
    dropouts = {m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    assert rates | dropouts == {0.25}


@pytest.mark.parametrize(
    ("name", "own", "wanted"),
    [
        ("mobilenet_v3_small", 1000, 3),
        ("lraspp_mobilenet_v3_large", 21, 1000),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", 91, 5),
    ],
)
def test_heads_of_pretrained_networks(name, own, wanted, monkeypatch):
    """Only a classifier of as many classes as the weights know is replaced: not a detector's last linear layer."""
    backbone = {} if own == 1000 else {"weights_backbone": None}
    state = torchvision.models.get_model(name, weights=None, num_classes=own, **backbone).state_dict()
    theirs = torchvision.models.get_model_weights(name)
    monkeypatch.setattr(theirs, "get_state_dict", lambda *_, **__: state)
    if own == 1000:
        assert senet.create_model(f"torchvision:{name}", wanted, pretrained="default").classifier[-1].out_features == 3
    else:
        with pytest.raises(senet.InputError, match=one_line(f"no linear classifier … num_classes={own}")):
            senet.create_model(f"torchvision:{name}", wanted, pretrained="default")
    same = senet.create_model(f"torchvision:{name}", own, pretrained="default")
    assert set(same.state_dict()) <= set(state)  # pretrained detectors have frozen norms, which do not count batches
