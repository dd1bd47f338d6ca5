"""What a file holds is found by its structure; what is no plain number of the right kind is refused by its key."""

import argparse
import zipfile

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import senet
from senet.weights.load import load_pretrained

KEY = "layer1.0.conv1.weight"


@pytest.fixture(scope="module")
def network():
    return senet.create_model("se_resnet8", 5)


@pytest.fixture(scope="module")
def state(network):
    return network.state_dict()


@pytest.fixture(scope="module")
def other(state):
    """Weights of the same network at another time."""
    return {key: value + 1 for key, value in state.items()}


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def loaded(path, content):
    torch.save(content, path)
    return senet.create_model("se_resnet8", 5, pretrained=path)


def refusal(path, content):
    with pytest.raises(senet.InputError) as caught:
        loaded(path, content)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "prefix",
    [
        "net.",
        "model.",
        "backbone.",
        "_fsdp_wrapped_module.",
        "_forward_module.",
        "model._orig_mod.module.",
        "module.model.net.",
        "anything.at.all.",
    ],
)
def test_prefixes_are_found_by_the_keys_that_fit(tmp_path, state, network, prefix):
    assert torch.equal(loaded(tmp_path / "w.pth", under(prefix, state)).fc.weight, network.fc.weight)
    safetensors.torch.save_file(under(prefix, state), tmp_path / "w.safetensors")
    ours = senet.create_model("se_resnet8", 5, pretrained=tmp_path / "w.safetensors")
    assert torch.equal(ours.fc.weight, network.fc.weight)


def test_wrappers_in_the_middle_of_keys(tmp_path, state, network):
    wrapped = {
        key.replace("layer1.", "layer1._orig_mod.").replace("layer2.0.", "layer2._fsdp_wrapped_module.0."): value
        for key, value in state.items()
    }
    assert torch.equal(loaded(tmp_path / "w.pth", wrapped).layer2[0].conv1.weight, network.layer2[0].conv1.weight)


def test_a_prefix_of_another_layout(tmp_path, state, network):
    cadene = {}
    for key, value in senet.create_model("se_resnet50_v1", 5).state_dict().items():
        stem = "layer0." if key.startswith(("conv1.", "bn1.")) else ""
        cadene["model." + stem + key.replace(".se.", ".se_module.").replace("fc.", "last_linear.")] = value
    torch.save(cadene, tmp_path / "w.pth")
    ours = senet.create_model("se_resnet50_v1", 5, pretrained=tmp_path / "w.pth")
    assert torch.equal(ours.fc.weight, cadene["model.last_linear.weight"])


def test_a_lightning_checkpoint_says_what_it_leaves(tmp_path, state, network, caplog):
    content = {
        "state_dict": under("net.", state) | {"criterion.weight": torch.ones(3), "accuracy.tp": torch.tensor(3)},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.1), "best_k_models": {}}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}],
        "hyper_parameters": {"lr": 0.1},
        "epoch": 3,
    }
    assert torch.equal(loaded(tmp_path / "w.ckpt", content).fc.weight, network.fc.weight)
    assert "under 'net.'" in caplog.text
    assert "criterion.weight, accuracy.tp" in caplog.text
    content["hyper_parameters"] = argparse.Namespace(lr=0.1)
    message = refusal(tmp_path / "w.ckpt", content)
    assert "argparse.Namespace" in message
    assert "state_dict" in message


@pytest.mark.parametrize("name", ["model", "net", "params", "whatever"])
def test_the_state_dict_is_found_under_any_name(tmp_path, state, network, name, caplog):
    optimizer = {"state": {0: {"exp_avg": torch.ones(9)}}, "param_groups": [{"lr": 0.1}]}
    content = {name: state, "optimizer": optimizer, "solver": optimizer, "epoch": 3, "loss": torch.tensor(0.5)}
    assert torch.equal(loaded(tmp_path / "w.pth", content).fc.weight, network.fc.weight)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda s, o: {"state_dict": o, "state_dict_ema": s}, "'state_dict_ema', and ignored state_dict"),
        (lambda s, o: {"state_dict": under("module.", o), "model_ema": under("module.", s)}, "'model_ema'"),
        (lambda s, o: {"model": o, "ema": {"decay": 0.99, "shadow": s}}, "'ema.shadow', and ignored model"),
        (lambda s, o: {"params": o, "params_ema": s}, "'params_ema', and ignored params"),
        (lambda s, o: {"model": o, "ema_state_dict": s}, "'ema_state_dict', and ignored model"),
        (lambda s, o: {"state_dict": under("model.", o) | under("ema_model.module.", s)}, "under 'ema_model.'"),
        (lambda s, o: o | under("ema.", s), "under 'ema.'"),
        (lambda s, o: {"state_dict_ema": s}, ""),
        (lambda s, o: {"ema": s, "optimizer": {"state": {}, "param_groups": []}}, ""),
        (lambda s, o: under("module.", s) | {"n_averaged": torch.tensor(3)}, ""),
    ],
)
def test_averaged_weights_win_and_it_is_said_where_there_are_both(tmp_path, state, other, make, told, caplog):
    ours = loaded(tmp_path / "w.pth", make(state, other))
    assert torch.equal(ours.fc.weight, state["fc.weight"])
    assert torch.equal(ours.bn1.running_var, state["bn1.running_var"])
    assert ("loaded the averaged weights" in caplog.text) == bool(told)
    assert told in caplog.text


def test_pytorchs_own_averaged_model_loads(tmp_path, network):
    content = AveragedModel(network).state_dict()
    assert torch.equal(loaded(tmp_path / "w.pth", content).fc.weight, network.fc.weight)


def test_two_networks_in_one_file_are_no_guess(tmp_path, state, other):
    message = refusal(tmp_path / "w.pth", under("student.", state) | under("teacher.", other))
    assert "'student.', 'teacher.'" in message
    assert "(first, second)" in refusal(tmp_path / "w.pth", {"first": state, "second": other})


def test_no_false_hint(tmp_path, state):
    """Only a file in which nothing but the gates is missing is a plain network's."""
    plain = senet.create_model("resnet8", 5).state_dict()
    assert "identity_init=True" in refusal(tmp_path / "w.pth", under("net.", plain))
    for content in ({"x" + key: value for key, value in plain.items()}, {"fc.weight": state["fc.weight"]}):
        message = refusal(tmp_path / "w.pth", content)
        assert "missing" in message
        assert "plain" not in message


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("int64", lambda v: v.round().long()),
        ("bool", lambda v: v > 0),
        ("complex64", lambda v: v + 0j),
        ("float8_e4m3fn", lambda v: v.to(torch.float8_e4m3fn)),
        ("meta", lambda v: v.to("meta")),
        ("sparse", lambda v: v.to_sparse()),
        ("sparse", lambda v: v.flatten(1).to_sparse_csr()),
        ("quantized", lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8)),
        ("nested", lambda v: torch.nested.nested_tensor([v[0], v[1]])),
        ("claims 4,000,000,000,000 bytes", lambda v: torch.zeros(1).expand(10**12)),
        ("1 of 2,304 values that are NaN or infinity", lambda v: v.index_fill(0, torch.tensor(0), 1).flatten()),
        ("values that are NaN or infinity", lambda v: v * torch.inf),
        ("values that are NaN or infinity", lambda v: v.double() * 1e300),
    ],
)
@pytest.mark.filterwarnings("ignore")  # PyTorch's, on sparse, nested and quantized tensors
def test_values_of_another_kind_are_refused_by_their_key(tmp_path, state, kind, change):
    value = change(state[KEY])
    if value.dim() == 1 and value.numel() == state[KEY].numel():
        value = value.reshape_as(state[KEY]).clone()
        value.view(-1)[7] = torch.nan
    message = refusal(tmp_path / "w.pth", state | {KEY: value})
    assert repr(KEY) in message
    assert kind in message


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_rounded_and_counters_stay_counters(tmp_path, state, kind):
    ours = loaded(tmp_path / "w.pth", {key: value.to(kind) for key, value in state.items()})
    assert torch.equal(ours.fc.weight, state["fc.weight"].to(kind).float())
    assert ours.bn1.num_batches_tracked.dtype == torch.int64
    counter = "bn1.num_batches_tracked"
    assert repr(counter) in refusal(tmp_path / "w.pth", state | {counter: torch.tensor(0.5)})
    assert repr(counter) in refusal(tmp_path / "w.pth", state | {counter: torch.tensor(True)})


def test_a_classifier_that_is_not_loaded_may_be_anything(tmp_path, state):
    head = {"fc.weight": torch.full((7, 64), torch.nan), "fc.bias": torch.zeros(7)}
    assert loaded(tmp_path / "w.pth", state | head).fc.weight.isfinite().all()


@pytest.mark.parametrize("content", [[1, 2], 3, None, {}, torch.ones(3), {"a": 3}, {"loss": torch.tensor(1.0)}])
def test_a_file_of_anything_else_holds_no_state_dict(tmp_path, content):
    assert "no state dict" in refusal(tmp_path / "w.pth", content)


def test_truncated_empty_and_inflated_files_and_folders_are_one_line(tmp_path, state):
    path = tmp_path / "w.pth"
    torch.save(state, path)
    content = path.read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 10):
        path.write_bytes(content[:length])
        with pytest.raises(senet.InputError, match=r"w\.pth: (not a readable|rejected because it is damaged)"):
            senet.load_weights(path)
    with pytest.raises(senet.InputError, match=r"is a folder.*from_pretrained"):
        senet.create_model("se_resnet8", 5, pretrained=tmp_path)
    path.write_bytes(content)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "z.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, bytes(10**6) if "/data/" in part.filename else old.read(part))
    with pytest.raises(senet.InputError, match=r"z\.pth: .* claim [\d,]+ bytes"):
        senet.load_weights(tmp_path / "z.pth")


class Extra(nn.Linear):
    def __init__(self, extra):
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, extra):
        self.extra = extra


@pytest.mark.parametrize("extra", [{"scale": [1, 2.5], "name": "a"}, None, torch.arange(3)])
def test_extra_states_go_and_come_back(tmp_path, extra):
    senet.save_weights(tmp_path / "w.safetensors", nn.Sequential(Extra(extra)), {"note": 1})
    state, metadata = senet.load_weights(tmp_path / "w.safetensors")
    assert metadata.keys() == {"note", "senet_version"}
    by_hand, ours = nn.Sequential(Extra(0)), nn.Sequential(Extra(0))
    by_hand.load_state_dict(state)
    load_pretrained(ours, tmp_path / "w.safetensors")
    for each in (by_hand, ours):
        assert torch.equal(each[0].extra, extra) if isinstance(extra, torch.Tensor) else each[0].extra == extra


@pytest.mark.parametrize("extra", [(1, 2), {1: 2}, {1}, b"bytes", object()])
def test_extra_states_that_would_come_back_otherwise_are_refused(tmp_path, extra):
    with pytest.raises(senet.InputError, match=r"'0\._extra_state'.*get_extra_state"):
        senet.save_weights(tmp_path / "w.safetensors", nn.Sequential(Extra(extra)))
    assert list(tmp_path.iterdir()) == []


def test_extra_states_of_no_module_here_are_left(tmp_path, state, network, caplog):
    ours = loaded(tmp_path / "w.pth", state | {"fc._extra_state": {"scale": torch.ones(3)}})
    assert torch.equal(ours.fc.weight, network.fc.weight)
    assert "fc._extra_state" in caplog.text
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "bare.pth")
    module = Extra("kept")
    load_pretrained(module, tmp_path / "bare.pth")
    assert module.extra == "kept"


@pytest.mark.parametrize("value", [torch.ones(3).to_sparse(), 3, [1.0]])
def test_what_safetensors_cannot_hold_is_refused_by_its_key(tmp_path, value):
    with pytest.raises(senet.InputError, match="'a'"):
        senet.save_weights(tmp_path / "w.safetensors", {"a": value})
