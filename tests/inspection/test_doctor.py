"""The doctor names what was put there, and nothing else, for every kind of gate."""

import numpy as np
import pytest
import torch
from torch import nn

import senet
from helpers.excitations import site_of
from helpers.messages import one_line
from senet.inspection.doctor import HEALTHY, KINDS, Thresholds
from senet.nn.squeeze_excite import GATE_NAMES
from senet.surgery.find_gates import find_gates


def gate_of(function, identity=False):
    config = senet.SEConfig(gate=function, identity_init=identity)
    return find_gates(nn.Sequential(senet.SqueezeExcite(8, config)))[0]


def diagnosis(values, targets=None, gate=None, **thresholds):
    values = np.asarray(values, dtype=np.float64)
    targets = np.zeros(len(values), int) if targets is None else np.asarray(targets)
    classes = int(targets.max()) + 1
    site = site_of(values, targets, of=gate or gate_of("sigmoid"), classes=classes, top=2)
    found = senet.Excitations({site.name: site}, tuple(map(str, range(classes))))
    return senet.diagnose(found, Thresholds(**thresholds))[0]


def kinds(result):
    return [finding.kind for finding in result.findings]


def moving(images=200, channels=8, seed=0):
    return np.random.default_rng(seed).uniform(0.1, 0.9, (images, channels))


def test_a_healthy_gate():
    result = diagnosis(moving())
    assert kinds(result) == []
    assert result.row()["advice"] == HEALTHY
    assert (result.dead, result.saturated, result.constant) == (0, 0, 0)


@pytest.mark.parametrize("function", GATE_NAMES)
@pytest.mark.parametrize("identity", [False, True])
def test_dead_and_saturated_channels_in_the_gates_own_range(function, identity):
    gate = gate_of(function, identity)
    unit = gate.high if np.isfinite(gate.high) else 1.0
    values = moving() * unit
    values[:, 2] = 0.001 * unit
    values[:, 5] = 0.02 * unit + 0.005 * unit * np.sin(np.arange(200))
    values[:, 6] = 0.99 * unit
    values[:, 7] = 0.06 * unit
    result = diagnosis(values, gate=gate)
    dead = next(f for f in result.findings if f.kind == "dead")
    assert dead.channels == (2, 5)
    assert dead.value == 0.25
    assert "2 of 8 channels" in dead.sentence
    saturated = [f.channels for f in result.findings if f.kind == "saturated"]
    assert saturated == ([(6,)] if np.isfinite(gate.high) else [])


def test_tanh_that_always_turns_the_sign_is_saturated_too():
    values = moving()
    values[:, 1] = -0.99
    assert diagnosis(values, gate=gate_of("tanh")).findings[0].channels == (1,)


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("function", GATE_NAMES)
def test_a_gate_that_has_learnt_nothing(function, identity):
    module = senet.SqueezeExcite(8, senet.SEConfig(gate=function, identity_init=identity))
    nn.init.normal_(module.fc2.weight, std=1e-4)
    nn.init.zeros_(module.fc2.bias)
    found = senet.record_excitations(nn.Sequential(module), [torch.randn(50, 8, 4)])
    result = senet.diagnose(found)[0]
    assert kinds(result) == ["untrained"]
    effect = {0: "zeroes", 1: "does nothing"}.get(find_gates(nn.Sequential(module))[0].neutral, "shrinks")
    assert effect in result.findings[0].sentence


def test_input_independent_gates_are_ranked_and_named():
    factors = np.linspace(0.2, 0.9, 8)
    jitter = np.random.default_rng(0).normal(size=(200, 8))
    steady = diagnosis(factors + 0.004 * jitter)
    assert kinds(steady) == ["input-independent"]
    assert steady.constant == 8
    assert "senet fold" in steady.findings[0].sentence
    lively = diagnosis(factors + 0.05 * jitter)
    assert kinds(lively) == []
    assert steady.variation < 0.05 < lively.variation
    assert steady.variation == pytest.approx(0.004 / np.sqrt((factors**2).mean()), rel=0.1)


def test_mostly_saturated_gates_are_candidates_to_fold():
    result = diagnosis(np.full((50, 8), 0.98))
    assert kinds(result) == ["saturated", "input-independent"]
    assert "senet fold" in result.findings[0].sentence


def test_class_selective_gates():
    targets = np.arange(300) % 3
    values = moving(300) * 0.1 + 0.1
    values[:, :4] += 0.3 * targets[:, None]
    result = diagnosis(values, targets)
    assert kinds(result) == ["class-selective"]
    assert result.findings[0].channels == (0, 1, 2, 3)
    assert kinds(diagnosis(values, np.zeros(300, int))) == []
    assert kinds(diagnosis(values, np.random.default_rng(0).permutation(targets))) == []


def test_thresholds_move_the_lines_and_are_checked():
    values = moving()
    values[:, 0] = 0.08
    assert diagnosis(values).dead == 0
    assert diagnosis(values, dead=0.1).dead == 1
    assert "0.1" in Thresholds(dead=0.1).sentence()
    for value in (-0.1, 2, float("nan")):
        with pytest.raises(senet.InputError, match="dead="):
            Thresholds(dead=value)


def test_one_image_is_too_few():
    found = senet.record_excitations(nn.Sequential(senet.SqueezeExcite(4)), [torch.randn(1, 4, 3)])
    with pytest.raises(senet.InputError, match=one_line("1 images")):
        senet.diagnose(found)


def test_rows_are_for_tables():
    values = moving()
    values[:, 0] = 0
    row = diagnosis(values).row()
    assert row["findings"] == "dead"
    assert row["site"] == "0"
    assert set(KINDS) >= {row["findings"]}
