"""The table of known weights against what timm and torchvision say of their own."""

import pytest
import timm
import torch
import torchvision

import senet
from senet.weights.key_maps import recognize
from senet.weights.known import KNOWN_WEIGHTS

TORCHVISION = {name: row for name, row in KNOWN_WEIGHTS.items() if row.source.startswith("torchvision:")}
TIMM = {name: row for name, row in KNOWN_WEIGHTS.items() if row.source.startswith("timm:")}
RELEASES = {name: row for name, row in KNOWN_WEIGHTS.items() if row.source.startswith("https:")}


def test_every_row_names_a_network_and_has_sane_numbers():
    assert KNOWN_WEIGHTS.keys() <= set(senet.list_models())
    assert len(TORCHVISION) + len(TIMM) + len(RELEASES) == len(KNOWN_WEIGHTS)
    for name, row in KNOWN_WEIGHTS.items():
        assert row.input_size == senet.model_spec(name).input_size
        assert 65 < row.top1 < row.top5 < 100
        assert row.licence in ("Apache-2.0", "BSD-3-Clause")


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_rows(name):
    row = KNOWN_WEIGHTS[name]
    weights = torchvision.models.get_weight(row.source.removeprefix("torchvision:"))
    transform, accuracy = weights.transforms(), weights.meta["_metrics"]["ImageNet-1K"]
    assert (row.top1, row.top5) == (accuracy["acc@1"], accuracy["acc@5"])
    assert [row.input_size] == transform.crop_size
    assert round(row.input_size / row.crop) == transform.resize_size[0]
    assert row.interpolation == transform.interpolation.value
    if name == "inception_v3":  # torchvision's network rescales ImageNet's normalisation to 0.5 in its forward
        assert (row.mean, row.std) == ((0.5,) * 3, (0.5,) * 3)
    else:
        assert (list(row.mean), list(row.std)) == (transform.mean, transform.std)


@pytest.mark.parametrize("name", TIMM | RELEASES)
def test_timms_rows(name):
    row = KNOWN_WEIGHTS[name]
    if name in TIMM:
        cfg = timm.models.get_pretrained_cfg(row.source.removeprefix("timm:"))
        assert cfg.hf_hub_id == row.source.replace("timm:", "timm/")
    else:
        url, _, digits = row.source.partition("#sha256=")
        [cfg] = [c for n in timm.list_models("legacy_*") if (c := timm.models.get_pretrained_cfg(n)).url == url]
        assert url.endswith(f"-{digits}.pth")
    assert cfg.input_size == (3, row.input_size, row.input_size)
    assert (cfg.crop_pct, cfg.interpolation) == (row.crop, row.interpolation)
    assert (cfg.mean, cfg.std) == (row.mean, row.std)
    assert (cfg.license, cfg.num_classes) == (row.licence.lower(), 1000)


@pytest.mark.parametrize("name", KNOWN_WEIGHTS)
def test_the_publishers_network_has_the_keys_and_shapes_of_ours(name):
    source = KNOWN_WEIGHTS[name].source
    with torch.device("meta"):
        if name in TORCHVISION:
            builder, _, _ = source.removeprefix("torchvision:").partition("_Weights")
            extra = {"init_weights": False} if name == "inception_v3" else {}
            theirs = torchvision.models.get_model(builder.lower(), **extra)
        elif name in TIMM:
            theirs = timm.create_model(source.removeprefix("timm:").partition(".")[0])
        else:
            url = source.partition("#")[0]
            [oracle] = [n for n in timm.list_models("legacy_*") if timm.models.get_pretrained_cfg(n).url == url]
            theirs = timm.create_model(oracle)
        ours = senet.create_model(name).state_dict()
    state = theirs.state_dict()
    converted = recognize(state).convert(state)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in ours.items()}
