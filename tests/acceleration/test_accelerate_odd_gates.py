"""``senet.accelerate``: gates whose FCs are no plain layers, networks on two devices, images that it does not take."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torchvision.ops.misc import SqueezeExcitation

import senet
from helpers.gates import doubled, hooked, in_a_sequence, low_rank, pruned, weight_normed
from helpers.messages import one_line
from senet.ops.conv import early_gate


def hooked_as_a_whole(gate):
    gate.register_forward_hook(doubled)


def in_python(module, args, output):
    """A hook that changes nothing, and that no graph can contain."""
    torch._dynamo.graph_break()


def another_forward(gate):
    fc1 = gate.fc1
    fc1.forward = _Forward(fc1)


class _Forward:
    def __init__(self, fc):
        self.fc = fc

    def __call__(self, x):
        return 3 * type(self.fc).forward(self.fc, x)


CHANGES = (hooked, hooked_as_a_whole, weight_normed, low_rank, in_a_sequence, pruned)


def zoo():
    torch.manual_seed(0)
    return senet.create_model("se_resnet8", num_classes=10).eval()


def torchvisions():
    torch.manual_seed(0)
    gates = [SqueezeExcitation(16, 4), SqueezeExcitation(16, 8)]
    for gate in gates:
        nn.init.normal_(gate.fc2.bias)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), gates[0], nn.ReLU(), nn.Conv2d(16, 16, 1), nn.SiLU(), gates[1]]
    return nn.Sequential(*layers).eval()


def attached():
    torch.manual_seed(0)
    net = senet.create_model("resnet8", num_classes=10)
    senet.attach(net, example_input=torch.zeros(1, 3, 32, 32))
    for gate in senet.find_gates(net):
        nn.init.normal_(gate.module.fc2.weight)
    return net.eval()


MAKERS = (zoo, torchvisions, attached)


def first_gate(net):
    return senet.find_gates(net)[0].module


def named(value):
    return value.__name__


@pytest.fixture
def x():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def same(fast, net, x):
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", MAKERS, ids=named)
@pytest.mark.parametrize("change", CHANGES, ids=named)
def test_such_a_gate_is_left_as_it_is(change, make, x):
    net = make()
    change(first_gate(net))
    fast = senet.accelerate(net)
    same(fast, net, x)
    same(fast.train().eval(), net, x)
    assert len(fast.acceleration.inference) >= len(senet.find_gates(net)) - 1  # the others are fast all the same


@pytest.mark.parametrize("make", [MAKERS[0], *(pytest.param(m, marks=pytest.mark.slow) for m in MAKERS[1:])], ids=named)
@pytest.mark.parametrize("change", [*CHANGES, another_forward], ids=named)
def test_a_gate_that_becomes_such_one_later_is_called(change, make, x):
    net = make()
    fast = senet.accelerate(net)
    same(fast, net, x)
    change(first_gate(net))
    change(first_gate(fast))
    same(fast, net, x)


def test_a_hook_that_goes_again_makes_it_fast_again(x):
    net = zoo()
    fast = senet.accelerate(net)
    same(fast, net, x)
    gates = set(fast.acceleration.inference)
    place = senet.find_gates(fast)[0].name
    handle = first_gate(fast).fc1.register_forward_hook(in_python)
    same(fast, net, x)
    handle.remove()
    same(fast, net, x)
    assert set(fast.acceleration.inference) == gates
    assert place in gates


def test_who_listens_to_every_module_hears_those_of_an_accelerated_network(x):
    heard = []
    fast = senet.accelerate(zoo())
    everywhere = register_module_forward_hook(lambda module, args, output: heard.append(module))
    try:
        fast(x)
    finally:
        everywhere.remove()
    assert first_gate(fast).fc2 in heard


def test_such_gates_train(x):
    net = zoo()
    low_rank(first_gate(net))
    fast = senet.accelerate(net).train()
    net.train()
    for each in (net, fast):
        each(x).square().sum().backward()
    a, b = first_gate(net).fc1.b.weight.grad, first_gate(fast).fc1.b.weight.grad
    assert a.abs().max() > 0
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()))


def meta_norm(net):
    next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)).to("meta")


def meta_statistics(net):
    norm = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)][-1]
    norm.running_var = norm.running_var.to("meta")


def meta_gate(net):
    first_gate(net).to("meta")


def meta_fc(net):
    first_gate(net).fc2.to("meta")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.slow), "after"])
@pytest.mark.parametrize("move", [meta_norm, meta_statistics, meta_gate, meta_fc], ids=named)
def test_a_network_on_two_devices_gets_the_ordinary_error(move, when, training, x):
    net = zoo().train(training)
    if when == "before":
        move(net)
    fast = senet.accelerate(net)
    if when == "after":
        fast(x)
        move(fast)
        move(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs uncompiled
        assert outcome(fast, x) == outcome(net, x)


def outcome(net, x):
    """The kind of error, or the device of the output: PyTorch takes weights on "meta" with maps that are not."""
    try:
        return net(x).device
    except Exception as error:
        return type(error)


class Sum(nn.Module):
    """A block whose shortcut comes from outside of the network."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.se = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), senet.SqueezeExcite(16)

    def forward(self, x, shortcut):
        return torch.relu(self.se(self.norm(self.conv(x))) + shortcut)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_shortcut_on_another_device_gets_the_ordinary_error(training):
    fast, x = senet.accelerate(Sum().train(training)), torch.randn(2, 16, 32, 32)
    fast(x, x)
    with pytest.raises(RuntimeError, match="device"), torch.no_grad():
        fast(x, x.to("meta"))


IMAGES = {
    "channels": torch.zeros(1, 1, 32, 32),
    "channels_last": torch.zeros(1, 32, 32, 3),
    "one image": torch.zeros(3, 32, 32),
    "no channels": torch.zeros(32, 32),
    "clip": torch.zeros(1, 3, 2, 32, 32),
    "uint8": torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
    "half": torch.zeros(1, 3, 32, 32, dtype=torch.float16),
    "double": torch.zeros(1, 3, 32, 32, dtype=torch.float64),
    "meta": torch.zeros(1, 3, 32, 32, device="meta"),
    "list": [1],
    "None": None,
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("make", [zoo, torchvisions], ids=named)
def test_images_that_it_does_not_take_get_the_ordinary_error(make, image, gradients, x):
    net = make()
    fast = senet.accelerate(net)
    with torch.set_grad_enabled(gradients):
        fast(x)  # planned for this size
        with pytest.raises(Exception) as ordinary:  # noqa: PT011 whatever it is
            net(IMAGES[image])
        with pytest.raises(type(ordinary.value)) as ours:
            fast(IMAGES[image])
    if not gradients:
        assert str(ours.value) == str(ordinary.value)


@pytest.mark.parametrize("image", ["channels", "one image", "half"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_so_do_they_with_any_backend(backend, image):
    if backend == "native" and early_gate.why_not(backend, torch.zeros(1)) is not None:
        pytest.skip("no C++ compiler")
    fast = senet.accelerate(zoo(), backend=backend)
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match=r"channels|4D|type"):
        fast(IMAGES[image])


def test_one_image_without_a_batch_is_taken_where_the_network_takes_it():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    fast, image = senet.accelerate(net), torch.randn(3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(fast(image), net(image))


@pytest.mark.filterwarnings("ignore")  # torch.jit.script is on its way out
@pytest.mark.parametrize(
    "make",
    [
        attached,
        zoo,
        lambda: senet.SqueezeExcite(8),
        lambda: senet.create_model("resnet8"),
        lambda: senet.accelerate(zoo()),
    ],
    ids=["attached", "zoo", "gate", "plain", "accelerated"],
)
def test_torch_jit_script_is_refused_with_what_to_use(make):
    with pytest.raises(senet.InputError, match=one_line("torch.jit.script … torch.export")) as refused:
        torch.jit.script(make())
    assert "\n" not in str(refused.value)
