"""`--attach`: other libraries' networks and our own plain ones are trained and compared with gates attached."""

import pytest
import torch

import senet
from helpers.messages import one_line
from senet.comparison.compare import compare, twins
from senet.evaluation.evaluate import load_network
from senet.nn.attachment import attached
from senet.runs.recipe import load_recipe
from senet.runs.settings import RunSettings
from senet.training.classifier import build_optimizer
from senet.training.run import train

RECIPE = load_recipe("digits", ["epochs=1", "schedule.warmup_epochs=0", "batch_size=64", "attached_lr=10"])


def settings(model, **kwargs):
    return RunSettings(data="digits", model=model, device="cpu", workers=0, limit_batches=2, **kwargs)


def test_names():
    assert twins("resnet8+se") == ("resnet8", "resnet8+se")
    assert twins("timm:resnet10t") == ("timm:resnet10t", "timm:resnet10t+se")
    with pytest.raises(senet.InputError, match=one_line("'se_resnet8' already has SE … 'resnet8'")):
        twins("se_resnet8+se")
    with pytest.raises(senet.InputError, match=r"create 'resnet8', then call senet\.attach"):
        senet.create_model("resnet8+se")


@pytest.mark.parametrize("model", ["resnet8", pytest.param("timm:resnet10t", marks=pytest.mark.slow)])
def test_a_run_with_gates_and_its_checkpoint(model, tmp_path):
    train(settings(f"{model}+se", se=(("reduction", 4),)), RECIPE, tmp_path / "run", loggers=False)
    network, metadata, _ = load_network(tmp_path / "run" / "best.safetensors", None)
    assert metadata["model"] == model
    gates = attached(network)
    assert len(gates) == {"resnet8": 3, "timm:resnet10t": 4}[model]
    assert {gate.config.reduction for gate in gates.values()} == {4}
    assert all(gate.fc2.weight.any() for gate in gates.values())  # they have learned
    assert "SE blocks attached to" in (tmp_path / "run" / "log.txt").read_text()


def test_sites_of_a_run(tmp_path):
    train(settings("resnet8+se", sites="layer3.0.bn2,layer2.0.bn2"), RECIPE, tmp_path / "run", loggers=False)
    network, _, _ = load_network(tmp_path / "run" / "best.safetensors", None)
    assert set(attached(network)) == {"layer3.0.bn2", "layer2.0.bn2"}


def test_gates_learn_faster():
    model = senet.create_model("resnet8", 3)
    report = senet.attach(model, example_input=torch.zeros(1, 3, 32, 32))
    optimizer = build_optimizer(model, RECIPE)
    fast = {id(p) for p in report.parameters()["params"]}
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert {rates[each] for each in fast} == {RECIPE.lr * 10}
    assert {rate for each, rate in rates.items() if each not in fast} == {RECIPE.lr}


def test_compare_with_and_without(tmp_path, monkeypatch):
    monkeypatch.setattr("senet.comparison.step_time.BUDGET", 0.1)
    found = compare(settings("resnet8+se"), RECIPE, tmp_path / "out", seeds=1)
    assert (found.plain.model, found.se.model) == ("resnet8", "resnet8+se")
    gates = senet.attach(senet.create_model("resnet8", 10, 1), dry_run=True, example_input=torch.zeros(1, 1, 8, 8))
    assert found.se.cost.params - found.plain.cost.params == gates.added_parameters
    assert found.se.cost.mult_adds - found.plain.cost.mult_adds == gates.added_mult_adds
