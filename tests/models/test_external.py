"""`torchvision:NAME` and `timm:NAME`: what their builders are given, and heads that other data want."""

import pytest
import torchvision
from torch import nn

import senet


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("timm:resnet18.a9", {}, "timm has no model 'resnet18.a9'; did you mean timm:resnet18"),
        ("torchvision:resnet18", {"num_classes": -1}, "num_classes=-1 is not allowed; it must be an integer from 1 on"),
        ("torchvision:resnet18", {"num_classes": 0}, "num_classes=0 is not allowed; it must be an integer from 1 on"),
        ("timm:resnet18", {"num_classes": -1}, "num_classes=-1 is not allowed; it must be an integer from 0 on"),
        ("torchvision:resnet18", {"in_chans": 1}, "takes images of 3 channels only"),
    ],
)
def test_mistakes(name, arguments, message):
    with pytest.raises(senet.InputError, match=message):
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
        with pytest.raises(senet.InputError, match=f"no linear classifier to replace; .* num_classes={own} alone"):
            senet.create_model(f"torchvision:{name}", wanted, pretrained="default")
    same = senet.create_model(f"torchvision:{name}", own, pretrained="default")
    assert set(same.state_dict()) <= set(state)  # pretrained detectors have frozen norms, which do not count batches
