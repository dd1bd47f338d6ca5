"""Gates beside modules: of modules that are shared, and of norms that a conversion has put in place of others."""

import pytest
import torch
from torch import nn

import senet
from senet import SEConfig
from senet.nn.attachment import attached, in_line

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = self.b = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.b(torch.relu(self.a(x))))


@pytest.fixture
def opened():
    """A function that attaches gates that are far from 1 to a network, and returns what it computes with them."""

    def opened(model, sites):
        torch.manual_seed(0)
        for gate in senet.attach(model, SEConfig(identity_init=True, hidden=4), sites, X).gates:
            nn.init.normal_(gate.fc2.bias)
        with torch.no_grad():
            return model(X)

    return opened


def test_gates_of_a_shared_module_in_line(opened):
    model = Shared().eval()
    y = opened(model, ["a"])
    twin = in_line(model)
    assert twin.a is twin.b
    with torch.no_grad():
        assert torch.equal(twin(X), y)


def test_a_converted_network_keeps_its_gates_when_compiled_or_exported(opened):
    """The pre-hook that attaches them again must run where the network is traced before its first run, too."""
    for run in (
        lambda model: torch.compile(model, backend="aot_eager"),
        lambda model: torch.export.export(model, (X,)).module(),
    ):
        model = Shared().eval()
        with torch.no_grad():
            plain = model(X)
            y = opened(model, ["norm"])
            assert not torch.allclose(plain, y, atol=0.01)
            converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            torch.testing.assert_close(run(converted)(X), y)
        assert list(attached(converted)) == ["norm"]
