"""What attaching must not disturb, wherever it is called: inference mode, autocast, other hooks, buffers, arguments."""

from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import senet
from helpers.messages import one_line
from senet import SEConfig
from senet.nn.attachment import attached

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
OTHER = SEConfig(identity_init=True, reduction=4)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.stem(x)
        return torch.relu(x + self.norm(self.conv(x)))


class Whole(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x)


def names(model, x=X, **kwargs):
    return [site.name for site in senet.find_sites(model, example_input=x, **kwargs)]


def test_attached_in_inference_mode_gates_can_learn():
    model = Block()
    with torch.inference_mode():
        report = senet.attach(model, example_input=torch.randn(1, 3, 16, 16))
        assert [site.name for site in report.sites] == ["norm"]
    model(X).sum().backward()
    assert model.norm.se.fc2.weight.grad is not None


def test_a_network_made_in_inference_mode():
    with torch.inference_mode():
        model = Block()
    assert names(model) == ["norm"]


def test_gates_have_the_type_of_parameters_under_autocast():
    model = Block()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (gate,) = senet.attach(model, example_input=X).gates
    assert gate.fc1.weight.dtype == torch.float32


def test_the_example_is_not_written_to():
    class Inplace(Block):
        def forward(self, x):
            return super().forward(x.mul_(0.5))

    x = X.clone()
    assert names(Inplace(), x) == ["norm"]
    assert torch.equal(x, X)
    with torch.inference_mode():
        x = X.clone()
    assert names(Inplace(), x) == ["norm"]


def test_buffers_that_a_run_replaces():
    class Counting(Block):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("grid", torch.zeros(0))

        def forward(self, x):
            self.calls = self.calls + 1
            if self.grid.shape != x.shape[2:]:
                self.grid = torch.zeros(x.shape[2:])
            return super().forward(x) + self.grid

    model = Counting()
    before = model.calls
    names(model)
    assert model.calls is before
    assert model.grid.shape == (16, 16)  # a cache, of which other attributes may know


def test_lazy_modules_are_refused_untouched():
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    for kwargs in ({}, {"example_input": X}, {"sites": ["0"]}):
        with pytest.raises(senet.InputError, match=one_line("lazy modules … run it once")):
            senet.attach(model, **kwargs)
    assert isinstance(model[0], nn.LazyConv2d)
    model(X)
    assert names(model) == ["2"]


def test_a_dry_run_keeps_the_order_of_hooks():
    model = Block().eval()
    nn.init.ones_(senet.attach(model, example_input=X).gates[0].fc2.bias)
    seen = []
    model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    model(X)
    gated = seen[-1]
    senet.attach(model, OTHER, example_input=X, dry_run=True)
    with pytest.raises(senet.InputError, match="no module 'nothing'"):
        senet.attach(model, OTHER, example_input=X, sites=["nothing"])
    model(X)
    assert torch.equal(seen[-1], gated)


def test_sites_are_found_as_if_there_were_no_attached_gates():
    model = Block()
    report = senet.attach(model, example_input=X)
    assert senet.find_sites(model, example_input=X) == report.sites
    assert attached(model) == {"norm": report.gates[0]}


def test_gates_of_a_part_that_was_converted():
    part = Block()
    senet.attach(part, example_input=X)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Whole(part))
    assert senet.detach(model) == ["part.norm"]
    assert not any(".se." in key for key in model.state_dict())


def compiled_in_place():
    model = Block()
    model.compile(backend="aot_eager")
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (compiled_in_place, "the model is compiled"),
        (lambda: Whole(compiled_in_place()), "'part' is compiled"),
        (lambda: torch.compile(Block()), "the model is compiled"),
        (lambda: nn.Sequential(torch.compile(Block())), "'0' is compiled"),
        (lambda: nn.DataParallel(Block()), "wrapped in DataParallel"),
        (lambda: torch.jit.script(nn.Conv2d(3, 8, 1)), "is TorchScript"),
        (lambda: "resnet18", "'resnet18' … torch.nn.Module"),
    ],
)
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # people have such networks all the same
def test_what_would_not_notice_its_gates(build, message):
    model = build()
    for command in (senet.attach, senet.detach):
        with pytest.raises(senet.InputError, match=one_line(f"{command.__name__}: … {message}")):
            command(model)


def test_a_module_called_by_keyword_takes_no_gate_before_it():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.b(input=F.relu(self.a(x)))

    model = Keyword()
    assert [site.name for site in senet.attach(model, example_input=X).sites] == ["a"]
    model(X)
    with pytest.raises(senet.InputError, match=one_line("'b' does not take a tensor")):
        senet.find_sites(model, sites=["b:input"], example_input=X)


def test_the_input_of_a_block_can_be_named():
    model = torchvision.models.resnet18()
    assert names(model, torch.zeros(1, 3, 32, 32), sites=["layer1.0:input"]) == ["layer1.0:input"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sites": [nn.ReLU()]}, "sites … ReLU … names"),
        ({"sites": None}, "sites … NoneType … names"),
        ({"sites": ["twin"]}, "'twin' … same module … 'norm'"),
        ({"config": {"reduction": 4}}, "config={'reduction': 4} … senet.SEConfig"),
    ],
)
def test_mistaken_arguments(arguments, message):
    model = Block()
    model.twin = model.norm
    with pytest.raises(senet.InputError, match=one_line(message)):
        senet.attach(model, **arguments, example_input=X)


def test_find_sites_wants_a_network():
    with pytest.raises(senet.InputError, match=one_line("find_sites: 'resnet18' … torch.nn.Module")):
        senet.find_sites("resnet18")


def test_examples_of_other_libraries():
    """Hugging Face's processors return a mapping that is no dict; sizes may be pairs, and `default_cfg` a name."""

    class Wide(Block):
        def forward(self, x):
            assert x.shape[2:] == (24, 40)
            return super().forward(x)

    class Config:
        image_size = (24, 40)

    assert names(Block(), UserDict(x=X)) == ["norm"]
    model = Wide()
    model.config, model.default_cfg = Config(), "wide.yaml"
    assert senet.find_sites(model)[0].map_size == (24, 40)


def test_the_cost_of_an_image_from_a_list_of_images():
    """Detectors take lists; the first axis of an image is no batch."""

    class Detector(Block):
        def forward(self, images):
            return super().forward(torch.stack(images))

    ours = senet.attach(Detector(), example_input=(list(X),), dry_run=True).summary()
    assert ours.partition(":")[2] == senet.attach(Block(), example_input=X, dry_run=True).summary().partition(":")[2]
