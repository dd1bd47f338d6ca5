"""The inference form against the ordinary network, and the way there and back."""

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from torch import nn

import senet
from helpers.acceleration import batch_sizes, instances, report_of
from helpers.images import images
from helpers.messages import one_line
from helpers.networks import all_names, relative, settled
from senet import SEConfig
from senet.acceleration.fold import EARLY, LATE
from senet.acceleration.modules import FoldedConv2d, FoldedSum, FoldedTail
from senet.ops.conv import early_gate
from senet.ops.csrc import build

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")

QUICK = {"se_resnet20", "se_resnet50", "se_mobilenet_v1"}
NAMES = all_names(QUICK)


def size_of(name):
    spec = senet.model_spec(name)
    return max(spec.min_size, 32 if spec.input_size == 32 else 64)


@pytest.mark.parametrize("name", NAMES)
def test_every_network_computes_the_same_function(name):
    torch.manual_seed(0)
    size = size_of(name)
    model = settled(senet.create_model(name, 7), size)
    x = images(size)
    with torch.no_grad():
        exact = model(x)
        assert relative(senet.accelerate(model, "reference")(x), exact) < 1e-9
        # In float32 the order of sums differs: it must be as good as the ordinary network in float32 is, or 1e-5.
        single = copy.deepcopy(model).float()
        own_error = relative(single(x.float()).double(), exact)
        fast = senet.accelerate(single)
        assert relative(fast(x.float()).double(), exact) <= max(1e-5, 4 * own_error)
        assert relative(fast(x[:1].float()).double(), exact[:1]) <= max(1e-5, 4 * own_error)
    assert type(fast) is type(model)
    assert list(fast.state_dict()) == list(single.state_dict())
    assert fast.acceleration.breaks == []


def test_bottlenecks_get_the_early_gate_and_basic_blocks_the_late_one():
    x = images(dtype=torch.float32, batch=2)
    for name, form, count in (("se_resnet50", EARLY, 16), ("se_resnet18", LATE, 8)):
        report = report_of(senet.accelerate(senet.create_model(name).eval()), x)
        assert list(report.inference.values()) == [form] * count
        assert report.left == {}


def test_no_norm_is_left_in_a_resnet_and_plain_sums_overwrite_their_shortcut(monkeypatch):
    convolutions, sums = instances(monkeypatch, FoldedConv2d), instances(monkeypatch, FoldedSum)
    model = senet.create_model("resnet50").eval()
    report_of(senet.accelerate(model), images(dtype=torch.float32, batch=2))
    assert len(convolutions) == 53 == len([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    assert len(sums) == 16
    assert all(m.overwrites for m in sums)


def test_gated_tails_overwrite_the_shortcuts_that_nobody_reads_any_more(monkeypatch):
    tails = instances(monkeypatch, FoldedTail)
    report_of(senet.accelerate(senet.create_model("se_resnet50").eval()), images(dtype=torch.float32, batch=2))
    assert len(tails) == 16
    assert all(m.overwrites for m in tails)


class OnItself(nn.Module):
    """relu(SE(convolution(x)) + x) or relu(convolution(x) + x): the convolution reads its shortcut."""

    def __init__(self, kernel, gated):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.conv = nn.Conv2d(32, 32, kernel, padding=kernel // 2)
        self.se = senet.SqueezeExcite(32) if gated else nn.Identity()

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return torch.relu(self.se(self.conv(x)) + x)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("gated", [True, False])
def test_a_shortcut_is_not_overwritten_while_its_own_convolution_reads_it(kernel, gated):
    torch.manual_seed(0)
    model, x = OnItself(kernel, gated).eval(), images(20, dtype=torch.float32)
    fast = senet.accelerate(model)
    with torch.no_grad():
        for _ in range(2):
            assert relative(fast(x), model(x)) < 1e-5


@pytest.mark.parametrize("name", ["resnet18", pytest.param("se_resnet50", marks=pytest.mark.slow)])
def test_features_that_are_returned_are_not_overwritten(name):
    torch.manual_seed(0)
    model = settled(senet.create_model(name, features_only=True))
    x = images(64)
    with torch.no_grad():
        for ours, theirs in zip(senet.accelerate(model, "reference")(x), model(x), strict=True):
            assert relative(ours, theirs) < 1e-9
        single = model.float()
        for ours, theirs in zip(senet.accelerate(single)(x.float()), single(x.float()), strict=True):
            assert relative(ours, theirs) < 1e-4


@pytest.mark.parametrize("placement", ["standard", "pre", "post", "identity", "3x3"])
@pytest.mark.parametrize(
    "gate", ["sigmoid", *(pytest.param(g, marks=pytest.mark.slow) for g in ("tanh", "hard_sigmoid"))]
)
def test_placements_and_gates(placement, gate):
    torch.manual_seed(0)
    se = SEConfig(placement=placement, gate=gate, identity_init=gate == "tanh")
    model = settled(senet.create_model("resnet8", 5, se=se), 32)
    x = images(32)
    with torch.no_grad():
        fast = senet.accelerate(model, "reference")
        assert relative(fast(x), model(x)) < 1e-9
        assert len(fast.acceleration.inference) == len(senet.find_gates(model))
        single = model.float()
        assert relative(senet.accelerate(single)(x.float()), single(x.float())) < 1e-5


@pytest.mark.parametrize("squeeze", ["max", "none"])
def test_other_squeezes_are_left_as_they_are(squeeze):
    torch.manual_seed(0)
    model = settled(senet.create_model("resnet8", 5, se=SEConfig(squeeze=squeeze)), 32)
    fast = senet.accelerate(model, "reference")
    with torch.no_grad():
        assert relative(fast(images(32)), model(images(32))) < 1e-9
    assert fast.acceleration.inference == {}
    assert set(fast.acceleration.left) == {gate.name for gate in senet.find_gates(model)}
    assert all(fast.acceleration.left.values())  # each with a reason


@pytest.mark.parametrize("make", [torchvision.models.resnet18, lambda: timm.create_model("resnet26")])
def test_networks_of_others(make, monkeypatch):
    torch.manual_seed(0)
    model = settled(make())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    x = images(64)
    convolutions = instances(monkeypatch, FoldedConv2d)
    with torch.no_grad():
        assert relative(senet.accelerate(model, "reference")(x), model(x)) < 1e-9
    assert len(convolutions) == len(norms)


def test_bfloat16_and_contiguous_images():
    torch.manual_seed(0)
    model = settled(senet.create_model("se_resnet18", 5), dtype=torch.float32)
    x = images(64, dtype=torch.float32)
    with torch.no_grad():
        expected = model(x)
        fast = senet.accelerate(model)
        assert relative(fast(x.contiguous()), expected) < 1e-3
        assert relative(fast(x.contiguous(memory_format=torch.channels_last)), expected) < 1e-3
        half = senet.accelerate(copy.deepcopy(model).bfloat16())(x.bfloat16())
        ordinary = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    # as far from float32 as bfloat16 is anyway
    assert relative(half.float(), expected) < 2 * relative(ordinary.float(), expected)


def test_the_model_itself_is_not_touched():
    torch.manual_seed(0)
    model = senet.create_model("se_resnet8", 5).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    own = dict(vars(model))
    fast = senet.accelerate(model)
    with torch.no_grad():
        fast(images(32, dtype=torch.float32))
    assert vars(model).keys() == own.keys()
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert type(fast) is type(model)
    assert not {p.data_ptr() for p in fast.parameters()} & {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("start", ["eval", "train"])
def test_modes_are_switched_and_eval_folds_what_was_learned(start):
    torch.manual_seed(0)
    model = senet.create_model("se_resnet8", 5).train(start == "train")
    model.fc.bias.requires_grad_(False)
    fast = senet.accelerate(model)
    assert [m.training for m in fast.modules()] == [m.training for m in model.modules()]
    x = images(32, dtype=torch.float32)
    for _ in range(2):
        fast.train()
        model.train()
        assert [p.requires_grad for p in fast.parameters()] == [p.requires_grad for p in model.parameters()]
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
        for each in (fast, model):
            optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
            each(x).square().mean().backward()
            optimizer.step()
            each.zero_grad()
        fast.eval()
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_weights_are_loaded_both_ways_and_parts_are_replaced():
    torch.manual_seed(0)
    model = senet.create_model("se_resnet8", 5).eval()
    other = senet.create_model("se_resnet8", 5).eval()
    fast = senet.accelerate(model)
    x = images(32, dtype=torch.float32)
    with torch.no_grad():
        fast(x)
        fast.load_state_dict(other.state_dict(), strict=True)  # keys are the network's own
        torch.testing.assert_close(fast(x), other(x), rtol=1e-5, atol=1e-6)
        model.load_state_dict(fast.state_dict(), strict=True)  # and back
        torch.testing.assert_close(model(x), other(x), rtol=0, atol=0)
        fast.layer1[0].bn2.weight.mul_(3)
        assert relative(fast(x), other(x)) > 1e-3
        fast.reset_classifier(2)
        assert fast(x).shape == (3, 2)
        assert fast.double()(x.double()).dtype == torch.float64


def test_a_gradient_of_the_image_in_eval_mode():
    torch.manual_seed(0)
    model = settled(senet.create_model("se_resnet8", 5), 32)
    fast = senet.accelerate(model)
    for frozen in (False, True):
        gradients = []
        for each in (model, fast):
            each.requires_grad_(not frozen)
            x = images(32).requires_grad_()
            each(x).square().sum().backward()
            gradients.append(x.grad)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)


def test_copies_and_pickles():
    torch.manual_seed(0)
    model = senet.create_model("se_resnet8", 5).eval()
    fast = senet.accelerate(model)
    x = images(32, dtype=torch.float32)
    with torch.no_grad():
        expected = fast(x)
        for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert type(twin) is type(model)
            torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
            assert len(twin.acceleration.inference) == 3  # it stays accelerated
            twin.conv1.weight.zero_()
            assert relative(twin(x), expected) > 1e-3
        torch.testing.assert_close(fast(x), expected, rtol=0, atol=0)


def test_a_file_of_a_whole_network(tmp_path):
    fast = senet.accelerate(senet.create_model("se_resnet8", 5).eval())
    x = images(32, dtype=torch.float32)
    expected = fast(x)
    torch.save(fast, tmp_path / "network.pt")
    torch.testing.assert_close(torch.load(tmp_path / "network.pt", weights_only=False)(x), expected)


@needs_compiler
def test_micro_batches_give_the_same_and_are_used(monkeypatch):
    torch.manual_seed(0)
    model = settled(senet.create_model("se_resnet20", 5), 32, dtype=torch.float32)
    whole = senet.accelerate(model, "reference")
    fast = senet.accelerate(model, "native")
    x = images(96, batch=16, dtype=torch.float32)
    with torch.no_grad():
        expected = whole(x)
        fast(x)
        sizes = batch_sizes(monkeypatch)
        assert relative(fast(x), expected) < 1e-5
        *parts, rest = sizes
        assert len(parts) > 1  # the early layers
        assert sum(parts) == rest == 16
        assert fast(x[:0]).shape == (0, 5)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_an_outer_compiler_calls_it_as_it_is(compiler):
    torch.manual_seed(0)
    model = settled(senet.create_model("se_resnet8", 5), 32, dtype=torch.float32)
    fast = senet.accelerate(model)
    x = images(32, dtype=torch.float32)
    with torch.no_grad():
        around = torch.compile(nn.Sequential(nn.Identity(), fast, nn.Sigmoid()), backend=compiler)
        assert relative(around(x), model(x).sigmoid()) < 1e-5
        assert relative(torch.compile(fast, backend=compiler)(x), model(x)) < 1e-5
    assert len(fast.acceleration.inference) == 3


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_bad_input_gets_one_line():
    model = senet.create_model("se_resnet8").eval()
    with pytest.raises(senet.InputError, match=one_line("'fast' … auto, reference, native, triton")):
        senet.accelerate(model, "fast")
    with pytest.raises(senet.InputError, match=one_line("then='nvcc' … eager, inductor")):
        senet.accelerate(model, then="nvcc")
    with pytest.raises(senet.InputError, match=one_line("already accelerated")):
        senet.accelerate(senet.accelerate(model))


@pytest.mark.parametrize("given", [False, True], ids=["called", "with an example"])
def test_a_backend_that_cannot_run_here_is_refused_when_the_network_is_captured(given):
    """The dtype and device of the network may change until then."""

    def run(model, backend, x):
        with torch.no_grad():
            return senet.accelerate(model, backend, example_input=x) if given else senet.accelerate(model, backend)(x)

    model, x = senet.create_model("se_resnet8").eval(), images(32)
    if not torch.cuda.is_available():
        with pytest.raises(senet.InputError, match=one_line("'triton' cannot run … CUDA device")):
            run(model, "triton", x.float())
    with pytest.raises(senet.InputError, match=one_line("'native' cannot run … float32 or bfloat16")):
        run(model.double(), "native", x)


def test_a_network_that_branches_on_its_numbers_runs_in_several_graphs():
    fast = senet.accelerate(nn.Sequential(nn.Conv2d(3, 8, 1), Branching(), senet.SqueezeExcite(8)).eval())
    report = report_of(fast, images(32, dtype=torch.float32))
    assert report.breaks
    assert any(__file__ in place for place in report.breaks)  # with the line of the source
    assert any(place in str(report) for place in report.breaks)
    assert list(report.inference) == ["2"]


def test_the_gate_before_the_convolution_is_the_gate_behind_it():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    h, weight, bias = draw(3, 6, 5, 4), draw(10, 6, 1, 1), draw(10)
    se = senet.SqueezeExcite(10, SEConfig(hidden=4)).double()
    behind = se.gate(nn.functional.conv2d(h, weight, bias))
    before = early_gate.move_before(weight, bias, se.fully_connected())
    assert before.w1.shape == (4, 6)
    torch.testing.assert_close(early_gate.gate_of(h, before, "reference"), behind.detach(), rtol=1e-12, atol=1e-14)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    "gate", sorted({"sigmoid", "tanh", "relu", "hard_sigmoid", "identity_sigmoid", "identity_tanh"})
)
def test_native_gate_and_sum_against_the_reference(gate, channels_last, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 37, 5, 7, generator=generator).to(dtype)
    shortcut = torch.randn(3, 37, 5, 7, generator=generator).to(dtype)
    if channels_last:
        x, shortcut = (t.contiguous(memory_format=torch.channels_last) for t in (x, shortcut))
    se = senet.SqueezeExcite(37, SEConfig(hidden=5, gate=gate.removeprefix("identity_"), bias=False)).requires_grad_(
        False
    )
    se.gate_name = gate
    excitation = early_gate.as_tables(se.fully_connected(), dtype)
    expected = early_gate.gate_of(x, excitation, "reference")
    got = early_gate.gate_of(x, excitation, "native")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for relu in (True, False):
        for id_map in (shortcut, None):
            want = early_gate.gated_sum(
                x.double(), got.double(), None if id_map is None else id_map.double(), relu, "reference"
            )
            have = early_gate.gated_sum(x.clone(), got, id_map, relu, "native")
            assert have.dtype == dtype
            tolerance = 1e-6 if dtype == torch.float32 else 2**-8
            torch.testing.assert_close(have.double(), want, rtol=tolerance, atol=tolerance)
