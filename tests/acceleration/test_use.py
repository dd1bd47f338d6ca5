"""How the commands run a network: compiled as they are told, and uncompiled where that fails."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

import senet
from helpers.messages import one_line
from senet.acceleration import use
from senet.acceleration.use import compiled

X = torch.randn(4, 3, 8, 8)


@pytest.fixture
def network():
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(5, 3))


def said(caplog):
    return [record for record in caplog.records if record.name.startswith("senet")]  # torch logs its traces


def fails(graph, example_inputs, **_):
    raise RuntimeError("no tape left\nin the drive")


def test_a_network_is_captured_once_in_each_mode_and_stays_what_it_is(graphs, network):
    keys, kind = list(network.state_dict()), type(network)
    run = compiled(network, "senet")
    for training in (True, False):
        network.train(training)
        for _ in range(2):
            twin = copy.deepcopy(network)
            assert torch.equal(run(X), twin(X))
    assert len(graphs) == 2
    assert (list(network.state_dict()), type(network)) == (keys, kind)


def test_the_parameters_that_are_trained_are_the_networks(graphs, network):
    run, twin = compiled(network, "senet"), copy.deepcopy(network)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (network, twin)]
    for _ in range(3):
        for call, optimizer in zip((run, twin), optimizers, strict=True):
            optimizer.zero_grad()
            call(X).square().mean().backward()
            optimizer.step()
    for key, value in network.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key]), key


def test_other_batches_are_captured_once_more(graphs, network):
    run = compiled(network.eval(), "senet")
    for count in (4, 3, 7, 5, 6, 2):
        assert torch.equal(run(X[:1].expand(count, -1, -1, -1)), network(X[:1].expand(count, -1, -1, -1)))
    assert len(graphs) == 2


class Wide(nn.Module):
    """A class of networks that share the code of ``forward``, as all of the zoo do."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)

    def forward(self, x):
        return self.conv(x) if self.training else self.conv(x).relu()


def test_networks_of_one_class_do_not_use_up_each_others_captures(graphs):
    """Dynamo stops at eight for one code object."""
    for width in range(1, 7):
        network = Wide(width)
        run, before = compiled(network, "senet"), len(graphs)
        for training in (True, False):
            network.train(training)
            run(X)
        assert len(graphs) == before + 2


def test_off_runs_the_network_itself(graphs, network):
    assert torch.equal(compiled(network.eval(), "off")(X), network(X))
    assert not graphs


def test_inductor_is_the_other_choice(graphs, monkeypatch, network):
    heard = []
    monkeypatch.setitem(use.HOW, "inductor", lambda graph, example: heard.append(graph) or graph.forward)
    compiled(network, "inductor")(X)
    assert (len(heard), len(graphs)) == (1, 0)


@pytest.mark.parametrize(("variable", "captures"), [("off", 0), ("senet", 1), ("", 1)])
def test_the_environment_overrides_the_recipe(graphs, monkeypatch, network, variable, captures):
    monkeypatch.setenv("SENET_COMPILE", variable)
    compiled(network, "senet")(X)
    assert len(graphs) == captures


@pytest.mark.parametrize(("variable", "how", "name"), [("fast", "senet", "SENET_COMPILE"), (None, "fast", "compile")])
def test_other_values_are_said_with_those_that_there_are(graphs, monkeypatch, network, variable, how, name):
    if variable:
        monkeypatch.setenv("SENET_COMPILE", variable)
    with pytest.raises(senet.InputError, match=one_line(f"{name}='fast' … senet, inductor, off")):
        compiled(network, how)


@pytest.mark.parametrize("backend", [fails, "there is none"])
def test_what_cannot_be_compiled_runs_uncompiled_and_says_so_once(graphs, monkeypatch, caplog, network, backend):
    monkeypatch.setitem(use.HOW, "senet", backend)
    networks = (network.eval(), copy.deepcopy(network))
    with caplog.at_level(logging.INFO, "senet"):
        for each in networks:
            run = compiled(each, "senet")
            for _ in range(2):
                assert torch.equal(run(X), each(X))
    assert [record.levelname for record in said(caplog)] == ["WARNING", "INFO"]  # the file of each run has it
    message = said(caplog)[0].getMessage()
    assert "uncompiled" in message
    assert "\n" not in message
    if backend is fails:
        assert message.endswith("no tape left")


def test_an_error_of_the_network_is_its_own(graphs, caplog, network):
    run = compiled(network, "senet")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        run(torch.randn(1, 3, 3, 3))
    with pytest.raises(RuntimeError, match="channels"):
        run(torch.randn(2, 5, 8, 8))
    assert not said(caplog)
    run(X)
    assert len(graphs) >= 1  # it is still compiled


def test_a_bad_setting_is_an_error_and_no_fallback(graphs, monkeypatch, caplog, network):
    def refuses(graph, example_inputs, **_):
        raise senet.InputError("backend 'triton' cannot run here")

    monkeypatch.setitem(use.HOW, "senet", refuses)
    with pytest.raises(senet.InputError, match="'triton' cannot run here"):
        compiled(network, "senet")(X)
    assert not said(caplog)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))])
def test_copies_run_their_own_network(graphs, network, again):
    run = compiled(network.eval(), "senet")
    before = run(X)
    twin = again(run)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(twin(X), before)
    assert not torch.equal(run(X), before)
    assert len(graphs) == 2


def test_a_module_that_owns_one_has_only_the_networks_keys(network):
    owner = nn.Module()
    owner.model, owner.run = network, compiled(network, "off")
    assert {key.partition(".")[0] for key in owner.state_dict()} == {"model"}
