"""Every activation is a module that is called once, so it can be replaced and listened to, as in timm's networks."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

import senet
from helpers.images import images
from helpers.networks import all_names, assert_same_outputs, randomized
from senet import SEConfig

QUICK = {"se_resnet8", "se_resnet18", "se_resnet50", "se_preresnet164", "se_wrn16_8", "se_shufflenet_v1_g3"}
QUICK |= {"se_bn_inception", "se_mobilenet_v1", "resnet18"}
ACTIVATIONS = (nn.ReLU, nn.ReLU6)


def replaced(model):
    """Leaky ReLUs in the place of all ReLUs, as people do it."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, ACTIVATIONS):
                setattr(parent, name, nn.LeakyReLU(0.3))
    return model


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("resnet18", lambda: torchvision.models.resnet18(num_classes=10)),
        ("resnet50", lambda: torchvision.models.resnet50(num_classes=10)),
        ("se_resnet18", lambda: timm.create_model("seresnet18", num_classes=10)),
        ("se_resnet50", lambda: timm.create_model("seresnet50", num_classes=10)),
        ("mobilenet_v1", lambda: timm.create_model("mobilenetv1_100", num_classes=10)),
    ],
)
def test_replaced_activations_give_the_outputs_of_other_libraries(name, theirs):
    theirs = randomized(theirs()).double()
    ours = senet.create_model(name, num_classes=10).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = images(batch=2)
    with torch.no_grad():
        before = ours(x)
        after, expected = replaced(ours)(x), replaced(theirs)(x)
    assert not torch.allclose(after, before, rtol=1e-3)
    assert_same_outputs(after, expected)


@pytest.mark.parametrize("name", all_names(QUICK))
def test_no_relu_is_left_when_all_are_replaced(name):
    """torch.fx sees functions and methods as well as modules."""
    graph = torch.fx.symbolic_trace(replaced(senet.create_model(name, num_classes=3)).eval())
    calls = [node.target for node in graph.graph.nodes if node.op in ("call_function", "call_method")]
    called = {target if isinstance(target, str) else target.__name__ for target in calls}
    assert not called & {"relu", "relu_", "relu6", "hardtanh", "clamp", "clamp_min", "threshold"}
    assert any(isinstance(module, nn.LeakyReLU) for module in graph.modules())


@pytest.mark.parametrize("placement", ["standard", "pre", "post", "identity", "3x3"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wrn16_8", "shufflenet_v1_g3"])
def test_full_backward_hooks_on_every_module_change_nothing_and_hear_every_activation(name, placement):
    """They forbid in-place writes onto the outputs of modules. Guided backpropagation needs them on activations."""
    torch.manual_seed(0)
    model = senet.create_model(name, num_classes=3, se=SEConfig(reduction=4, placement=placement)).double()
    heard_model, heard = copy.deepcopy(model), []
    for module in heard_model.modules():
        module.register_full_backward_hook(lambda module, given, received: heard.append(module))
    side = 8 if name == "wrn16_8" else 32
    x = torch.randn(2, 3, side, side, dtype=torch.float64, requires_grad=True)
    for each in (model, heard_model):
        each(x).square().sum().backward()
    activations = [module for module in heard_model.modules() if isinstance(module, ACTIVATIONS)]
    assert [heard.count(module) for module in activations] == [1] * len(activations)
    for ours, other in zip(model.parameters(), heard_model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad)


@pytest.mark.parametrize("name", all_names(QUICK - {"se_preresnet164"}))
def test_full_backward_hooks_work_in_every_network(name):
    model, heard = senet.create_model(name, num_classes=3), []
    for module in model.modules():
        module.register_full_backward_hook(lambda module, given, received: heard.append(module))
    side = max(32, senet.model_spec(name).min_size)
    model(torch.randn(2, 3, side, side, requires_grad=True)).sum().backward()
    assert set(heard) >= {module for module in model.modules() if isinstance(module, ACTIVATIONS)}


@pytest.mark.parametrize("name", all_names(QUICK))
def test_every_activation_is_called_once(name):
    model, calls = senet.create_model(name, num_classes=3).eval(), {}
    for path, module in model.named_modules():
        if isinstance(module, ACTIVATIONS):
            calls[path] = 0
            module.register_forward_hook(lambda *args, path=path: calls.__setitem__(path, calls[path] + 1))
    side = max(32, senet.model_spec(name).min_size)
    with torch.no_grad():
        model(torch.zeros(2, 3, side, side))
    assert calls
    assert {path for path, count in calls.items() if count != 1} == set()
