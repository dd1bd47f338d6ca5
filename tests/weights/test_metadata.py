"""Metadata of a weight file, with every entry replaced by something else: one line that names it, or a network."""

import copy
import json

import pytest
import safetensors.torch
import torch

import senet
from helpers.messages import one_line
from senet import SEConfig
from senet.weights.metadata import check_fields

WRONG = ["null", "[]", "{}", "-1", "1e400", "NaN", '"x"', "9" * 5000, "true", "1.5", "[" * 900 + "]" * 900]
SIZES = ["1000000000000", "900000000000000000"]
VALUES = {"classes": ["a", "b", "c"], "metrics": {"val_error": 1.0}, "trained_on": {"data": "x", "val_fraction": 0.2}}


@pytest.fixture(scope="module")
def network():
    model = senet.create_model("resnet8", 3, drop_rate=0.1)
    senet.attach(model, SEConfig(4))
    return model


@pytest.fixture(scope="module")
def described(network, tmp_path_factory):
    path = senet.save(network, tmp_path_factory.mktemp("saved") / "w.safetensors", VALUES)
    return senet.load_weights(path)[1]


def places(values, path=()):
    yield path
    for key in values if isinstance(values, dict) else range(min(1, len(values))) if isinstance(values, list) else ():
        yield from places(values[key], (*path, key))


def replaced(values, path, text):
    """The JSON of ``values`` with ``text`` at ``path``."""
    if not path:
        return text
    values = copy.deepcopy(values)
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = "@"
    return json.dumps(values).replace('"@"', text)


@pytest.mark.parametrize("text", [*WRONG, *SIZES], ids=lambda text: text[:6])
def test_every_entry_of_another_type_is_one_line_or_a_network(tmp_path, network, described, text):
    path, refused = tmp_path / "w.safetensors", {}
    for place in places(described):
        safetensors.torch.save_file(network.state_dict(), path, {"senet": replaced(described, place, text)})
        for read in (senet.build_from_checkpoint, senet.from_pretrained):
            try:
                read(path)
            except senet.InputError as error:
                refused[place] = str(error)
    for message in refused.values():
        assert message.startswith(str(path))
        assert "\n" not in message
        assert len(message) < 500
    assert {("model",), ("num_classes",), ("in_chans",), ("attached", "gates", "layer1.0.bn2")} <= refused.keys()
    if text not in ("null", "{}"):
        assert {("kwargs",), ("attached", "config"), ("trained_on",)} <= refused.keys()


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (("num_classes",), "9" * 5000),
        (("attached", "gates", "layer1.0.bn2"), "null"),
        (("attached", "config", "reduction"), "[]"),
        (("trained_on", "val_fraction"), '"x"'),
        (("classes", 0), "1"),
        (("kwargs", "drop_rate"), '"x"'),
    ],
)
def test_the_entry_is_named(tmp_path, network, described, place, text):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(network.state_dict(), path, {"senet": replaced(described, place, text)})
    with pytest.raises(senet.InputError) as caught:
        senet.build_from_checkpoint(path)
    assert str(caught.value).startswith(str(path))
    for name in place:
        assert str(name) in str(caught.value)


def test_a_size_that_the_file_does_not_have_asks_for_no_memory(tmp_path, network, described):
    """The network would have 2.6e14 bytes."""
    path = tmp_path / "w.safetensors"
    text = replaced(described | {"classes": None}, ("num_classes",), "1000000000000")
    safetensors.torch.save_file(network.state_dict(), path, {"senet": text})
    for read in (senet.build_from_checkpoint, senet.from_pretrained):
        with pytest.raises(senet.InputError, match=one_line("'fc.weight' … (3, 64) … (1000000000000, 64)")):
            read(path)


def test_a_file_does_not_name_other_files(tmp_path):
    model = senet.create_model("timm:resnet18", 3)
    values = {"model": "timm:resnet18", "num_classes": 3, "kwargs": {"checkpoint_path": str(tmp_path / "other.pth")}}
    senet.save_weights(tmp_path / "w.safetensors", model, values)
    with pytest.raises(senet.InputError, match="checkpoint_path is not allowed"):
        senet.build_from_checkpoint(tmp_path / "w.safetensors")


@pytest.mark.parametrize("text", ["null", "[1]", '"x"', '{"senet": []}', "[" * 100_000, "9" * 5000, ""])
def test_a_damaged_config_of_a_folder_is_one_line(tmp_path, network, text):
    senet.save(network, tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text(text)
    with pytest.raises(senet.InputError) as caught:
        senet.from_pretrained(tmp_path / "folder")
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_metadata_that_are_no_json_are_not_written(tmp_path):
    with pytest.raises(senet.InputError, match=one_line("w.safetensors: … JSON")):
        senet.save_weights(tmp_path / "w.safetensors", torch.nn.Linear(2, 2), {"note": {1, 2}})
    assert list(tmp_path.iterdir()) == []


def test_fields_are_held_to_annotations():
    check_fields({"reduction": 4, "stages": [2, 3], "hidden": None, "unknown": object()}, SEConfig, "w:")
    for values, message in (
        ({"reduction": True}, "w: reduction … true … finite number"),
        ({"stages": [2, "3"]}, 'w: stages[1] … "3" … integer'),
        ({"hidden": 1.0}, "w: hidden … 1.0 … integer"),
        ({"bias": 0}, "w: bias … 0 … true or false"),
    ):
        with pytest.raises(senet.InputError, match=one_line(message)):
            check_fields(values, SEConfig, "w:")
