"""What fits loads; what does not is refused in one line, also where names and shapes would let it pass."""

import os
import pickle

import pytest
import safetensors.torch
import torch

import senet
from helpers.messages import assert_said, one_line
from senet import SEConfig
from senet.weights.fit import grouped
from senet.weights.load import load_pretrained

IDENTITY = SEConfig(identity_init=True)


def saved(path, model, metadata=None):
    senet.save_weights(path, model, metadata)
    return path


def refused(message, path, name="se_resnet8", classes=5, **arguments):
    with pytest.raises(senet.InputError, match=message) as caught:
        senet.create_model(name, classes, pretrained=path, **arguments)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert str(caught.value).startswith(str(path))


class Malicious:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("name", ["evil.pth", "evil.bin", "evil.safetensors", "evil.caffemodel"])
def test_a_malicious_file_never_runs_whatever_its_name(tmp_path, form, name):
    trace, path = tmp_path / "ran", tmp_path / name
    content = {"state_dict": {"conv1.weight": torch.zeros(1)}, "evil": Malicious(trace)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content["evil"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    refused("rejected because .* could run code" if path.suffix in (".pth", ".bin") else "not a readable", path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Malicious(trace)))  # it would have run
    assert trace.exists()


def test_groups_are_few_and_counted():
    keys = [f"layer{s}.{b}.se.fc{i}.{leaf}" for s in (1, 2) for b in range(9) for i in (1, 2) for leaf in ("w", "b")]
    assert grouped(keys) == "layer1 36, layer2 36"
    assert grouped(keys[:8]) == "layer1.0.se.fc1 2, layer1.0.se.fc2 2, layer1.1.se.fc1 2, layer1.1.se.fc2 2"
    assert grouped(["fc.weight"]) == "fc.weight"
    assert grouped([f"a{i}.w" for i in range(40)]) == "a0, a1, a2, a3, and 36 more"


def test_mismatches_are_counted_and_grouped(tmp_path):
    path = saved(tmp_path / "w.safetensors", senet.create_model("se_resnet50", 5))
    refused(r"323 missing \(layer3 323\)$", path, "se_resnet101")  # 17 blocks of 19 tensors
    refused(r"64 unexpected \(layer1 12, layer2 16, layer3 24, layer4 12\)$", path, "resnet50")
    refused(
        r"of a different shape .*conv1\.weight is \(64, 3, 7, 7\) in the file and \(64, 1, 7, 7\) in this network",
        path,
        "se_resnet50",
        in_chans=1,
    )


def test_a_plain_file_names_the_way_into_the_twin(tmp_path):
    path = saved(tmp_path / "w.safetensors", senet.create_model("resnet8", 5))
    refused(
        r"12 missing \(layer1\.0\.se 4, layer2\.0\.se 4, layer3\.0\.se 4\).*se=SEConfig\(identity_init=True\)", path
    )


@pytest.mark.parametrize(
    "name",
    [
        "resnet8",
        "resnet18",
        "inception_v3",
        "bn_inception",
        "mobilenet_v1",
        pytest.param("vgg16_bn", marks=pytest.mark.slow),
    ],
)
def test_plain_weights_open_every_identity_initialised_twin_at_the_plain_output(tmp_path, name):
    plain = senet.create_model(name, 5).eval()
    path = saved(tmp_path / "w.safetensors", plain)
    twin = senet.create_model(f"se_{name}", 5, se=IDENTITY, pretrained=path).eval()
    size = senet.model_spec(name).min_size + 32
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        assert torch.equal(plain(x), twin(x))


def test_default_of_an_identity_initialised_twin_is_the_plain_networks(tmp_path, monkeypatch):
    from senet.weights import known

    plain = senet.create_model("resnet8", 5)
    path = saved(tmp_path / "w.safetensors", plain)
    row = known.KnownWeights(str(path), 32, 1, "bilinear", 0, 0, "MIT")
    monkeypatch.setitem(known.KNOWN_WEIGHTS, "resnet8", row)
    twin = senet.create_model("se_resnet8", 5, se=IDENTITY, pretrained="default")
    assert torch.equal(twin.conv1.weight, plain.conv1.weight)
    assert torch.equal(senet.create_model("se_resnet8", 5, se=None, pretrained="default").fc.weight, plain.fc.weight)
    message = one_line("no weights … 'se_resnet8' … 'resnet8' … se=SEConfig(identity_init=True)")
    with pytest.raises(senet.InputError, match=message):
        senet.create_model("se_resnet8", 5, pretrained="default")
    with pytest.raises(senet.InputError, match=one_line("no weights … 'resnet14' … file")):
        senet.create_model("resnet14", 5, pretrained="default")
    with pytest.raises(senet.InputError, match="made by senet\\.create_model"):
        load_pretrained(torch.nn.Linear(2, 2), "default")


@pytest.mark.parametrize(
    ("file", "network", "message"),
    [
        (SEConfig(gate="tanh"), SEConfig(), "gate='tanh'.* gate='sigmoid'"),
        (IDENTITY, SEConfig(), r"pass se=SEConfig\(identity_init=True\)"),
        (SEConfig(), SEConfig(squeeze="max", placement="post"), r"squeeze='avg', placement='standard'"),
    ],
)
def test_gates_of_the_same_shapes_that_compute_something_else_are_refused(tmp_path, file, network, message):
    model = senet.create_model("se_resnet8", 5, se=file)
    path = saved(tmp_path / "w.safetensors", model, model.network_config.to_dict())
    refused(message, path, se=network)
    senet.create_model("se_resnet8", 7, se=file, pretrained=path)


def with_gates(config):
    model = senet.create_model("resnet8", 5)
    senet.attach(model, config)
    return model


def test_attached_gates_of_the_same_shapes_that_compute_something_else_are_refused(tmp_path):
    path = senet.save(with_gates(SEConfig(4, identity_init=True)), tmp_path / "w.safetensors")
    load_pretrained(with_gates(SEConfig(4, identity_init=True)), path)
    for other, message in (
        (SEConfig(4, gate="tanh", identity_init=True), "gate='sigmoid' … gate='tanh'"),
        (SEConfig(4), "identity_init=True … identity_init=False"),
    ):
        with pytest.raises(senet.InputError, match=one_line(message)):
            load_pretrained(with_gates(other), path)


@pytest.mark.parametrize("wrappers", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_wrappers_of_compiled_and_parallel_networks_are_taken_off_in_any_order(tmp_path, wrappers):
    model = senet.create_model("se_resnet8", 5)
    torch.save({wrappers + key: value for key, value in model.state_dict().items()}, tmp_path / "w.pth")
    assert torch.equal(senet.create_model("se_resnet8", 5, pretrained=tmp_path / "w.pth").fc.weight, model.fc.weight)


@pytest.mark.parametrize("kwargs", [{"num_classes": 0}, {"features_only": True}])
def test_a_file_without_a_classifier_gets_a_new_one(tmp_path, caplog, kwargs):
    trunk = senet.create_model("se_resnet8", **kwargs)
    path = senet.save(trunk, tmp_path / "w.safetensors")
    model = senet.from_pretrained(path, num_classes=5, features_only=False)
    (said,) = caplog.messages
    assert_said(said, f"{path} … no classifier … fc.weight, fc.bias")
    assert torch.equal(model.layer3[0].conv2.weight, trunk.layer3[0].conv2.weight)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    caplog.clear()
    refused("missing", path, "se_resnet14")
    assert not caplog.messages


@pytest.mark.parametrize(
    "text", ["[1]", "3", '{"model": "resnet8", "se": 5}', '{"model": "resnet8", "kwargs": 5}', "[" * 100_000]
)
def test_damaged_metadata_are_one_line(tmp_path, text):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(senet.create_model("resnet8", 5).state_dict(), path, {"senet": text})
    refused(r"damaged|not a readable", path, "resnet8")
    for read in (senet.build_from_checkpoint, senet.from_pretrained):
        with pytest.raises(senet.InputError, match=r"damaged|not a readable"):
            read(path)


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v2", "timm:efficientnet_b0"])
def test_a_new_classifier_in_other_libraries_networks(tmp_path, name, caplog):
    path = senet.save(senet.create_model(name, 9), tmp_path / "w.safetensors")
    model = senet.from_pretrained(path, num_classes=4)
    assert_said(caplog.text, "number of classes … classifier.")
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 4)


@pytest.mark.parametrize(
    "content",
    [
        b"<html>not found</html>",
        b"hello",
        b"\x80\x02X\xff\xff\xff\xff",
        b"(lp0\n.",
        b".",
        safetensors.torch.save({"a": torch.zeros(1)}),
        safetensors.torch.save({"a": torch.zeros(1), "b": torch.zeros(9)}),
    ],
)
def test_a_file_of_something_else_is_one_line(tmp_path, content):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    refused("not a readable PyTorch weight file|rejected", path, "resnet8")


def test_a_file_of_numbered_tensors_is_one_line(tmp_path):
    torch.save({0: torch.zeros(1)}, tmp_path / "w.pth")
    refused("contains no state dict", tmp_path / "w.pth", "resnet8")


def test_ones_own_checkpoint_tells_its_strides_and_pooling(tmp_path):
    model = senet.create_model("resnet50_v1", 5)
    path = saved(tmp_path / "w.safetensors", model, model.network_config.to_dict())
    refused(r"was trained in a different network.* with ceil_pool=True, stride_in_1x1=True", path, "resnet50")
    senet.create_model("resnet50", 5, pretrained=path, ceil_pool=True, stride_in_1x1=True)
    refused("ceil_pool=True", path, "resnet50", stride_in_1x1=True)


def test_foreign_layouts_tell_their_strides_pooling_and_gates(tmp_path):
    cadene = {}
    for key, value in senet.create_model("se_resnet50_v1", 5).state_dict().items():
        stem = "layer0." if key.startswith(("conv1.", "bn1.")) else ""
        cadene[stem + key.replace(".se.", ".se_module.").replace("fc.", "last_linear.")] = value
    path = tmp_path / "w.pth"
    torch.save(cadene, path)
    senet.create_model("se_resnet50_v1", 5, pretrained=path)
    refused("ceil_pool=True, stride_in_1x1=True", path, "se_resnet50")
    refused(r"gate='sigmoid'", path, "se_resnet50_v1", se=SEConfig(gate="relu"))


@pytest.mark.parametrize("new_form", [True, False])
def test_files_of_old_form_without_counters_and_of_half_precision_load(tmp_path, new_form):
    model = senet.create_model("se_resnet8", 5)
    state = {k: v.half() for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=new_form)
    ours = senet.create_model("se_resnet8", 5, pretrained=tmp_path / "w.pth")
    assert ours.conv1.weight.dtype == torch.float32
    torch.testing.assert_close(ours.conv1.weight, model.conv1.weight, rtol=1e-3, atol=1e-3)
    assert ours.bn1.num_batches_tracked == 0


def test_gates_without_biases_load_into_gates_with_them(tmp_path):
    bare = senet.create_model("se_resnet8", 5, se=SEConfig(bias=False)).eval()
    path = saved(tmp_path / "w.safetensors", bare)
    ours = senet.create_model("se_resnet8", 5, pretrained=path).eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(x), bare(x), rtol=0, atol=1e-6)
    refused(
        r"6 unexpected \(layer1\.0\.se 2, layer2\.0\.se 2, layer3\.0\.se 2\)",
        saved(tmp_path / "b.safetensors", ours),
        se=SEConfig(bias=False),
    )
