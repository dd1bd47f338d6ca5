from contextlib import suppress

from torch import nn

from senet.nn.modes import evaluating


def test_every_module_gets_its_own_mode_back():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Sequential(nn.Dropout(), nn.ReLU()))
    model[0].eval()
    model[1][1].eval()
    before = [module.training for module in model.modules()]
    with suppress(RuntimeError), evaluating(model):
        during = [module.training for module in model.modules()]
        raise RuntimeError
    assert not any(during)
    assert [module.training for module in model.modules()] == before
