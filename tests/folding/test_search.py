"""``senet.fold`` with what is not right, and its search."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import senet
from helpers.messages import assert_said, one_line
from senet import InputError, SEConfig

IMAGES = [torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))]


@pytest.fixture(scope="module")
def model():
    generator = torch.Generator().manual_seed(2)
    network = senet.create_model("se_resnet8", 5, se=SEConfig(4)).train()
    with torch.no_grad():
        for _ in range(20):
            network(torch.randn(8, 3, 16, 16, generator=generator))
    return network.eval()


@pytest.fixture(scope="module")
def excitations(model):
    return senet.record_excitations(model, IMAGES)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sites": "layer9*"}, "no gate … 'layer9*'"),
        ({"sites": ["layer1.0.bn1"]}, "no gate 'layer1.0.bn1'"),
        ({"sites": []}, "sites is empty"),
        ({"stage": 7}, "stage 7 … 2, 3, 4"),
        ({"max_drop": 0.1}, "requires evaluate="),
        ({"max_drop": -1, "evaluate": lambda network: 1.0}, "at least 0"),
        ({"evaluate": lambda network: float("nan")}, "a finite accuracy"),
        ({"evaluate": []}, "gave no images"),
        ({"example_input": torch.zeros(1, 4, 8, 8)}, "example_input"),
    ],
)
def test_arguments(model, excitations, kwargs, message):
    with pytest.raises(InputError, match=one_line(f"fold: … {message}")) as caught:
        senet.fold(model, excitations, **kwargs)
    assert "name modules" not in str(caught.value)  # a remedy of attach's


def test_other_networks(model, excitations):
    with pytest.raises(InputError, match="has no SE gates"):
        senet.fold(senet.create_model("resnet8", 5), excitations)
    with pytest.raises(InputError, match=one_line("no gate 'layer1.0.se' … record")):
        senet.fold(senet.create_model("se_mobilenet_v1", 5), excitations)
    wide = senet.create_model("torchvision:resnet18", 5)
    with pytest.raises(InputError, match="has no SE gates"):
        senet.fold(wide, excitations)
    with pytest.raises(InputError, match=one_line("'layer1.0.se' … 16 channels … 64")):
        senet.fold(senet.create_model("se_resnet18", 5), excitations)
    with pytest.raises(InputError, match="is accelerated"):
        senet.fold(senet.accelerate(model), excitations)


def test_a_network_without_weights(excitations):
    with torch.device("meta"):
        empty = senet.create_model("se_resnet8", 5, se=SEConfig(4))
    with pytest.raises(InputError, match="on the meta device"):
        senet.fold(empty, excitations)


def test_damaged_excitations(model, excitations):
    damaged = copy.deepcopy(excitations)
    damaged["layer2.0.se"].mean[:] = np.nan
    with pytest.raises(InputError, match=r"'layer2\.0\.se' are NaN"):
        senet.fold(model, damaged)


def test_a_gate_that_was_not_recorded(model):
    some = senet.record_excitations(model, IMAGES, sites="layer1*")
    report = senet.fold(model, some, example_input=torch.zeros(1, 3, 16, 16))
    assert [site.fate for site in report.sites] == ["folded", "kept", "kept"]
    assert report.sites[1].reason == "it was not recorded"
    with pytest.raises(InputError, match=one_line("'layer2.0.se' … 1 recorded gates")):
        senet.fold(model, some, ["layer2.0.se"], example_input=torch.zeros(1, 3, 16, 16))


def counting(accuracies):
    """An ``evaluate`` that gives these numbers in turn, and the networks that it was given."""
    seen = []

    def evaluate(network):
        seen.append(network)
        return accuracies[len(seen) - 1]

    return evaluate, seen


def test_the_search_takes_the_least_moving_first_and_leaves_out_what_costs_too_much(model, excitations):
    order = sorted(excitations.sites, key=lambda name: excitations[name].variation())
    evaluate, seen = counting([90.0, 89.95, 89.8, 89.9])
    told = []
    report = senet.fold(
        model,
        excitations,
        evaluate=evaluate,
        max_drop=0.1,
        measure=lambda before, after: (0.8, 0.9, 1.0),
        progress=lambda *what: told.append(what),
        example_input=IMAGES[0],
    )
    assert [step.site for step in report.steps] == ["", *order]
    assert [step.kept for step in report.steps] == [True, True, False, True]
    assert [step.folds for step in report.steps] == [0, 1, 2, 2]
    assert [round(step.drop, 3) for step in report.steps] == [0, 0.05, 0.2, 0.1]
    assert [len(senet.find_gates(network)) for network in seen] == [3, 2, 1, 1]
    assert set(report.with_fate("folded")) == {order[0], order[2]}
    assert [gate.name for gate in senet.find_gates(report.network)] == [order[1]]
    assert report.steps[0].parameters == report.parameters[0] == sum(p.numel() for p in model.parameters())
    assert report.final.parameters == report.parameters[1] == sum(p.numel() for p in report.network.parameters())
    assert told == [(0, 3, order[0]), (1, 3, order[1]), (2, 3, order[2]), (3, 3, "")]
    assert report.summary().startswith("2 of 3 gates of CifarResNet folded, 1 kept; parameters")
    assert_said(report.summary(), "accuracy 90.00 → 89.90 … -0.10 … 0.90")
    assert order[1] in str(report)
    assert report.to_dict()["steps"][0]["variation"] is None


def test_without_a_budget_every_step_is_kept_and_told(model, excitations):
    evaluate, _ = counting([90.0, 10.0, 20.0])
    report = senet.fold(model, excitations, stage=4, evaluate=evaluate, example_input=IMAGES[0])
    assert [(step.site, step.kept) for step in report.steps] == [("", True), ("layer3.0.se", True)]
    assert [site.fate for site in report.sites] == ["kept", "kept", "folded"]
    assert [site.stage for site in report.sites] == [2, 3, 4]
    assert report.final.drop == 80


def test_a_loader_gives_the_accuracy_in_percent(model, excitations):
    x = IMAGES[0]
    with torch.no_grad():
        answers = model(x).argmax(1)
    wrong = (answers + torch.tensor([1, 0, 0, 0, 0, 0])) % 5
    loader = [(x[:4], wrong[:4]), (x[4:], wrong[4:])]
    report = senet.fold(model, excitations, ["layer1.0.se"], evaluate=loader, max_drop=100, example_input=x)
    assert report.steps[0].accuracy == pytest.approx(100 * 5 / 6)
    assert len(report.steps) == 2


def test_gates_that_do_not_fold_are_measured_only_where_they_become_constants(excitations, model):
    post = senet.create_model("se_resnet8", 5, se=SEConfig(4, placement="post")).eval()
    found = senet.record_excitations(post, IMAGES)
    evaluate, seen = counting([50.0] * 4)
    report = senet.fold(post, found, evaluate=evaluate, example_input=IMAGES[0])
    assert len(seen) == 1 + len(report.with_fate("folded"))
    evaluate, seen = counting([50.0] * 4)
    report = senet.fold(post, found, evaluate=evaluate, constants=True, example_input=IMAGES[0])
    assert len(seen) == 4
    assert not senet.find_gates(report.network)
    evaluate, _ = counting([50.0] + [0.0] * 3)
    report = senet.fold(post, found, evaluate=evaluate, constants=True, max_drop=1, example_input=IMAGES[0])
    assert [site.fate for site in report.sites] == ["kept"] * 3
    assert all(site.reason.endswith("without it the accuracy is too low") for site in report.sites)
    assert len(senet.find_gates(report.network)) == 3


def test_modes_and_hooks_stay_as_they_are(model, excitations):
    model = copy.deepcopy(model).train()
    model.layer1.eval()
    called = []
    model.conv1.register_forward_hook(lambda *what: called.append(1))
    network = senet.fold(model, excitations, example_input=IMAGES[0]).network
    assert {name: m.training for name, m in network.named_modules()}.items() <= {
        name: m.training for name, m in model.named_modules()
    }.items()
    called.clear()
    network(IMAGES[0])
    assert called == [1]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (IMAGES[0], "no images with a class"),
        ((IMAGES[0], torch.eye(6)), "targets … (6, 6) float32 … integer"),
        (((IMAGES[0] * 9).byte(), torch.arange(6)), "images are torch.uint8"),
        ((IMAGES[0], [0, 1, 2, 3, 4, 0]), "tuple of 2"),
        ({"image": IMAGES[0]}, "the loader gives dict"),
    ],
)
def test_loaders_that_give_no_accuracy(model, excitations, batch, message):
    with pytest.raises(InputError, match=one_line(message)):
        senet.fold(model, excitations, evaluate=[batch], max_drop=1, example_input=IMAGES[0])


def test_networks_that_give_no_classes_need_a_function_to_judge_them(model):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return {"logits": self.inner(x)}

    network = Named().eval()
    found = senet.record_excitations(network, IMAGES)
    with pytest.raises(InputError, match=one_line("dict … (N, classes) … evaluate=")):
        senet.fold(network, found, evaluate=[(IMAGES[0], torch.arange(6))], example_input=IMAGES[0])


def test_images_of_an_unknown_class_and_further_parts_of_a_batch_do_not_count(model, excitations):
    with torch.no_grad():
        answers = model(IMAGES[0]).argmax(1)
    targets = torch.where(torch.arange(6) < 2, -1, answers)
    targets[5] = (targets[5] + 1) % 5
    loader = [(IMAGES[0], targets, torch.arange(6), ["path"] * 6), (IMAGES[0][:0], targets[:0])]
    report = senet.fold(model, excitations, ["layer1.0.se"], evaluate=loader, example_input=IMAGES[0])
    assert report.steps[0].accuracy == 75


def test_what_is_folded_in_inference_mode_trains(model):
    with torch.inference_mode():
        found = senet.record_excitations(model, IMAGES)
        report = senet.fold(model, found, evaluate=lambda network: 1.0, example_input=IMAGES[0])
    assert len(report.with_fate("folded")) == 3
    report.network.train()(IMAGES[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in report.network.parameters())


class Twice(nn.Module):
    """One gate in two places, called in both, or named a second time only."""

    def __init__(self, called_twice):
        super().__init__()
        self.gates = nn.ModuleList([senet.SqueezeExcite(8, SEConfig(4))])
        self.a, self.b, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.first = self.second = self.gates[0]
        self.called_twice = called_twice

    def forward(self, x):
        y = self.b(self.first(self.a(x)))
        return self.last(self.second(y) if self.called_twice else y.tanh()).mean((2, 3))


@pytest.mark.parametrize("called_twice", [False, True])
def test_a_gate_that_stands_in_several_places_goes_from_all(called_twice):
    network = Twice(called_twice).double().eval()
    x = IMAGES[0].double()
    found = senet.record_excitations(network, [x])
    report = senet.fold(network, found, constants=True, example_input=x)
    assert report.with_fate("constant" if called_twice else "folded") == ["gates.0"]
    assert senet.find_gates(report.network) == []
    assert not any(".fc" in key for key in report.network.state_dict())
    mean = torch.from_numpy(found["gates.0"].overall()[0])[:, None, None]
    network.first.register_forward_hook(lambda module, args, output: args[0] * mean)
    with torch.no_grad():
        torch.testing.assert_close(report.network(x), network(x), rtol=1e-12, atol=1e-12)


def test_folding_a_network_with_a_compiled_part(model, excitations):
    network = copy.deepcopy(model)
    network.layer1[0].compile(backend="eager")
    with torch.no_grad():
        network(IMAGES[0])
        expected = senet.fold(model, excitations, example_input=IMAGES[0]).network(IMAGES[0])
        report = senet.fold(network, senet.record_excitations(network, IMAGES), example_input=IMAGES[0])
        assert len(report.with_fate("folded")) == 3
        torch.testing.assert_close(report.network(IMAGES[0]), expected, rtol=1e-4, atol=1e-5)
