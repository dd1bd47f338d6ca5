"""What a network can do with attached gates: be copied, saved, compiled, exported, trained; and what is refused."""

import copy
import io
import json
import pickle
import warnings

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DataParallel

import senet
from helpers.messages import one_line
from senet import SEConfig, SitePolicy
from senet.attachment.report import LR_MULTIPLIER
from senet.nn.attachment import attached, described, in_line

RESNET18 = [f"layer{stage}.{block}.bn2" for stage in (1, 2, 3, 4) for block in (0, 1)]
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """One residual block, and one concatenation in a container, whose gate stands at the input of what follows."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.dense = Dense({"a": nn.Conv2d(8, 4, 3, padding=1), "b": nn.Conv2d(12, 4, 3, padding=1)})
        self.last = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu_(self.norm(self.conv(x)).add_(x))
        return self.head(torch.relu(self.last(self.dense(x))).mean((2, 3)))


class Dense(nn.ModuleDict):
    def forward(self, x):
        for layer in self.values():
            x = torch.cat([x, layer(x)], 1)
        return x


SMALL = ["norm", "last:input"]


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture
def opened(small):
    """A network with gates that are not 1, and its output."""
    for gate in senet.attach(small, SEConfig(identity_init=True, hidden=4)).gates:
        nn.init.normal_(gate.fc2.weight)
    with torch.no_grad():
        return small, small(X)


def test_sites_of_both_sides(small):
    assert [site.name for site in senet.find_sites(small)] == SMALL
    report = senet.attach(small)
    assert list(attached(small)) == SMALL
    assert {key for key in small.state_dict() if ".se." in key} >= {"norm.se.fc1.weight", "last.se.fc2.bias"}
    assert [site.map_size for site in report.sites] == [(224, 224), (224, 224)]


def test_copies_and_pickles(opened):
    model, y = opened
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    for twin in twins:
        with torch.no_grad():
            assert torch.equal(twin(X), y)
            attached(twin)["norm"].fc2.weight.zero_()  # the copy's own gate
            assert not torch.equal(twin(X), y)
        assert senet.detach(twin) == SMALL
    with torch.no_grad():
        assert torch.equal(model(X), y)


def test_a_pickle_keeps_its_hook_from_hooks_to_come(opened, monkeypatch):
    """In a new process hooks are numbered from 0 again; one with the gate's number would replace it."""
    model, y = opened
    content = pickle.dumps(model)
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "next_id", 0)
    twin = pickle.loads(content)
    for _ in range(20):
        twin.norm.register_forward_hook(lambda module, args, output: None)
    with torch.no_grad():
        assert torch.equal(twin(X), y)


def test_state_dicts_and_safetensors(opened, tmp_path):
    model, y = opened
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    fresh = Small().eval()
    senet.attach(fresh, SEConfig(identity_init=True, hidden=4))
    fresh.load_state_dict(load_file(tmp_path / "a.safetensors"), strict=True)
    with torch.no_grad():
        assert torch.equal(fresh(X), y)
    plain = Small().state_dict()
    missing, unexpected = model.load_state_dict(plain, strict=False)  # pretrained weights load as they did
    assert not unexpected
    assert all(".se." in key for key in missing)


def test_a_saved_network_is_made_again(tmp_path):
    model = senet.create_model("torchvision:squeezenet1_1", 4).eval()
    for gate in senet.attach(model, sites="late", example_input=X).gates:
        nn.init.normal_(gate.fc2.weight)
    assert json.loads(json.dumps(described(model))) == described(model)
    senet.save(model, tmp_path / "a.safetensors")
    for twin in (
        senet.from_pretrained(tmp_path / "a.safetensors"),
        senet.build_from_checkpoint(tmp_path / "a.safetensors")[0],
    ):
        with torch.no_grad():
            assert torch.equal(twin(X), model(X))
        assert list(attached(twin)) == list(attached(model))


def test_export_and_fx(opened):
    model, y = opened
    with torch.no_grad():
        program = torch.export.export(model, (X,))
        torch.testing.assert_close(program.module()(X), y)
        assert set(program.state_dict) == set(model.state_dict())
        assert torch.equal(torch.fx.symbolic_trace(model)(X), y)


def test_torch_compile_breaks_no_graph(opened):
    model, y = opened
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(X), y)
    model.train()
    expected, got = copy.deepcopy(model), torch.compile(model, fullgraph=True, backend="aot_eager")
    expected(X).square().sum().backward()
    got(X).square().sum().backward()
    for name, gate in attached(model).items():
        torch.testing.assert_close(gate.fc1.weight.grad, attached(expected)[name].fc1.weight.grad)


@pytest.mark.slow
def test_onnx(opened):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, y = opened
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(model, (X,), dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), y, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_distributed_data_parallel(opened, tmp_path):
    model, _ = opened
    expected = copy.deepcopy(model).train()
    expected(X).square().sum().backward()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model.train())
        wrapped(X).square().sum().backward()
        with pytest.raises(senet.InputError, match=one_line("model.module")):
            senet.attach(wrapped)
    finally:
        torch.distributed.destroy_process_group()
    for name, gate in attached(model).items():
        torch.testing.assert_close(gate.fc1.weight.grad, attached(expected)[name].fc1.weight.grad)


def test_gates_in_line_within_one_another():
    model = torchvision.models.resnet18().eval()
    senet.attach(model, sites=["layer1.0", "layer1.0.bn2"], example_input=torch.zeros(1, 3, 32, 32))
    with torch.no_grad():
        for gate in attached(model).values():
            nn.init.normal_(gate.fc2.weight)
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(in_line(model)(x), model(x))


def test_gates_in_line(opened):
    model, y = opened
    twin = in_line(model)
    with torch.no_grad():
        assert torch.equal(twin(X), y)
    assert isinstance(twin.norm[1], senet.SqueezeExcite)
    assert isinstance(twin.last[0], senet.SqueezeExcite)
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}
    assert list(attached(model)) == SMALL
    plain = Small()
    assert in_line(plain) is plain


def test_accelerate_sees_the_gates():
    model = torchvision.models.resnet18().double().eval()
    for gate in senet.attach(model, example_input=X.double()).gates:
        nn.init.normal_(gate.fc2.weight)
    fast = senet.accelerate(model, "reference")
    with torch.no_grad():
        torch.testing.assert_close(fast(X.double()), model(X.double()), rtol=1e-9, atol=1e-9)
    assert list(fast.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "preresnet164", "shake26_2x96d"])
@pytest.mark.slow
def test_our_own_networks_keep_their_fast_tails_and_every_bit(name, training):
    model = senet.create_model(name, 5).train(training)
    x = torch.randn(2, 3, 64, 64)
    twin = copy.deepcopy(model)
    senet.attach(twin, example_input=x)
    outputs = []
    for each in (model, twin):
        torch.manual_seed(1)  # shake-shake's weights
        outputs.append(each(x))
    assert torch.equal(*outputs)


def test_a_second_attach(small):
    report = senet.attach(small)
    with pytest.raises(senet.InputError, match=one_line("2 gates … already attached")):
        senet.attach(small)
    other = SEConfig(identity_init=True, reduction=4)
    shown = senet.attach(small, other, dry_run=True)
    assert [site.name for site in shown.sites] == SMALL
    assert shown.own_parameters == report.own_parameters
    assert attached(small)["norm"] is report.gates[0]
    with pytest.raises(senet.InputError, match="no module 'nothing'"):
        senet.attach(small, other, sites=["nothing"])
    assert attached(small)["norm"] is report.gates[0]  # a failure leaves it as it was
    senet.attach(small, other)
    assert [gate.config for gate in attached(small).values()] == [other, other]
    assert senet.detach(small) == SMALL
    assert senet.detach(small) == []


def test_hooks_of_others_stay(small):
    seen = []
    handle = small.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    senet.attach(small)
    count = len(seen)
    small(X)
    assert len(seen) == count + 1
    senet.detach(small)
    assert list(small.norm._forward_hooks) == [handle.id]


def test_dry_run_and_search_leave_no_trace(small):
    small.train()
    small.stem.eval()
    small.conv.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in small.state_dict().items()}
    modes = [module.training for module in small.modules()]
    trainable = [p.requires_grad for p in small.parameters()]
    random = torch.get_rng_state()
    report = senet.attach(small, dry_run=True)
    assert senet.find_sites(small) == report.sites
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
    assert [module.training for module in small.modules()] == modes
    assert [p.requires_grad for p in small.parameters()] == trainable
    assert all(p.grad is None for p in small.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())
    with pytest.raises(senet.InputError, match=one_line("dry run")):
        report.parameters()


def test_gates_take_type_mode_and_device(small):
    small.double().train()
    report = senet.attach(small, example_input=X.double())
    assert {gate.fc1.weight.dtype for gate in report.gates} == {torch.float64}
    assert all(gate.training for gate in report.gates)
    with torch.device("meta"):
        shapes = torchvision.models.resnet18()
    report = senet.attach(shapes)
    assert {gate.fc1.weight.device.type for gate in report.gates} == {"meta"}
    assert shapes(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 1000)


def test_report():
    model = torchvision.models.resnet18()
    own = sum(p.numel() for p in model.parameters())
    report = senet.attach(model)
    text = str(report).splitlines()
    assert text[0].split() == ["site", "kind", "stage", "channels", "map", "parameters", "multiply-adds"]
    assert text[2].split() == ["layer1.0.bn2", "residual", "2", "64", "56×56", "580", "512"]
    assert len(text) == 2 + 8 + 2
    # Section 4 of the paper: 2/r · Σ C² weights, and here the biases
    weights = 2 * sum(c * c for c in (64, 128, 256, 512)) * 2 // 16
    assert report.added_mult_adds == weights
    assert report.added_parameters == weights + 2 * sum(c // 16 + c for c in (64, 128, 256, 512))
    assert report.own_parameters == own
    assert f"{report.added_parameters:,} parameters (+0.76 %)" in text[-1]
    groups = report.parameter_groups(0.01)
    assert [group["lr"] for group in groups] == [0.01, 0.01 * LR_MULTIPLIER]
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(p.numel() for p in model.parameters())
    torch.optim.SGD(groups, lr=0.01)
    assert report.parameters()["lr_scale"] == LR_MULTIPLIER


def test_sync_batch_norm(opened):
    """The conversion replaces norms and drops their hooks; the gates must not silently fall out."""
    model, y = opened
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    with torch.no_grad():
        torch.testing.assert_close(converted(X), y)
    assert list(attached(converted)) == SMALL
    assert senet.detach(converted) == SMALL
    assert [site.name for site in senet.attach(converted).sites] == SMALL


def test_detach_before_the_first_run_of_a_converted_network(opened):
    model, _ = opened
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert senet.detach(converted) == SMALL
    assert not any(".se." in key for key in converted.state_dict())


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), {}, "Sequential … no convolution"),
        (lambda: nn.Linear(3, 4), {}, "guessed inputs … no convolution"),
        (Small, {"example_input": X[:, :2]}, "example_input … channels"),
        (Small, {"example_input": X.to("meta")}, "example_input … meta … cpu"),
        (Small, {"sites": "layt"}, "'layt' … 'late'"),
        (Small, {"sites": []}, "is empty"),
        (Small, {"sites": ["norm", "norm"]}, "names a module twice"),
        (Small, {"sites": ["norm", "norm:input"]}, "names a module twice"),
        (Small, {"sites": ["nrm"]}, "no module 'nrm' … 'norm'"),
        (Small, {"sites": ["stem"]}, "'stem' … Sequential"),
        (Small, {"sites": ["head"]}, "'head' … (1, 5)"),
        (Small, {"sites": SitePolicy(min_channels=64)}, "2 sites … SitePolicy(min_channels=64)"),
        (Small, {"config": SEConfig(placement="identity")}, "shortcut is the identity"),
        (lambda: DataParallel(Small()), {}, "wrapped in DataParallel"),
        (lambda: torch.compile(Small()), {}, "compiled … ordinary model"),
        (lambda: senet.accelerate(senet.create_model("resnet8", 2)), {}, "is accelerated"),
        (lambda: torchvision.models.swin_t(), {}, "no site … SwinTransformer"),
    ],
)
def test_what_is_refused(build, arguments, message):
    with pytest.raises(senet.InputError, match=one_line(message)):
        senet.attach(build(), **arguments)
