import pytest
from torch import nn

from senet.nn.modes import evaluating


def test_every_module_gets_its_own_mode_back():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Sequential(nn.Dropout(), nn.ReLU()))
    model[0].eval()
    model[1][1].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == before
