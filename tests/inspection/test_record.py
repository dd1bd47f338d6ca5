"""``senet.record_excitations`` and ``Excitations.load`` with what is unusual: compiled parts, keywords, damage."""

import random

import numpy as np
import pytest
import timm
import torch
from torch import nn

import senet

X, TARGETS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(4)


@pytest.mark.parametrize("what", ["whole", "stage", "block"])
def test_parts_that_were_compiled_and_have_run_are_heard(what):
    network = timm.create_model("seresnet18", num_classes=3).eval()
    expected = senet.record_excitations(network, [(X, TARGETS)])
    if what == "stage":
        network.layer1 = torch.compile(network.layer1, backend="eager")
    else:
        {"whole": network, "block": network.layer1[0]}[what].compile(backend="eager")
    with torch.no_grad():
        network(X)
    found = senet.record_excitations(network, [(X, TARGETS)])
    assert [name.replace("_orig_mod.", "") for name in found.sites] == list(expected.sites)
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.mean, two.mean, rtol=1e-5, atol=1e-6)


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.se, self.last = nn.Conv2d(3, 8, 1), senet.SqueezeExcite(8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.last(self.se(x=self.conv(x))).mean((2, 3))


def test_a_gate_that_is_called_by_keyword():
    network = Keyword().eval()
    found = senet.record_excitations(network, [X])
    with torch.no_grad():
        np.testing.assert_allclose(found["se"].overall()[0], network.se.gate(network.conv(X)).mean(0), rtol=1e-5)
    report = senet.fold(network, found, example_input=X[:1])
    assert report.with_fate("kept") == ["se"]  # an nn.Identity has another keyword
    assert "it was tried" in report.sites[0].reason
    report = senet.fold(network, found, constants=True, example_input=X[:1])
    assert report.with_fate("constant") == ["se"]
    report.network(X)


def test_a_batch_without_images_is_passed_over():
    network = nn.Sequential(senet.SqueezeExcite(3))
    whole = senet.record_excitations(network, [(X, TARGETS)])
    parts = senet.record_excitations(network, [(X[:0], TARGETS[:0]), (X, TARGETS), (X[:0], TARGETS[:0])])
    assert np.array_equal(parts["0"].mean, whole["0"].mean)
    with pytest.raises(senet.InputError, match="gave no images"):
        senet.record_excitations(network, [(X[:0], TARGETS[:0])])


@pytest.mark.parametrize("ending", ["npz", "parquet"])
def test_every_damage_to_a_file_is_told_in_one_line(tmp_path, ending):
    path = tmp_path / f"excitations.{ending}"
    senet.record_excitations(nn.Sequential(senet.SqueezeExcite(3)), [(X, TARGETS)]).save(path)
    whole, rng, said = path.read_bytes(), random.Random(0), []
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 2, 8))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            senet.Excitations.load(path)
        except senet.InputError as error:
            said.append(str(error))
    assert len(said) > 100
    assert all("not a readable file" in one and "\n" not in one for one in said)
