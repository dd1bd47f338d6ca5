"""Networks that are not fresh any more, and how two of them are compared.

Fresh norms hide errors: means of 0, variances of 1 and scales of 1 make a wrong order or a wrong eps invisible, and
in evaluation they let a deep network amplify every rounding.
"""

import pytest
import torch
from torch import nn

from helpers.images import images
from senet.models import registry

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def all_names(quick, names=None):
    """Parameters of a test: every registered network, or these, of which the quick ones belong to `make test`."""
    return [pytest.param(n, marks=[] if n in quick else [pytest.mark.slow]) for n in names or registry.list_models()]


def with_statistics_of(model, *batches):
    """In evaluation mode; its batch norms have the statistics of these batches alone."""
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def settled(model, size=64, batch=8, dtype=torch.float64):
    """In evaluation mode, with the statistics of real maps."""
    return with_statistics_of(model.to(dtype), images(size, batch, dtype=dtype, seed=1))


def randomized(model, scales=(0.4, 0.9)):
    """In evaluation mode; every batch norm has statistics, scales and shifts of its own, every convolution its bias."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.weight, *scales, generator=generator)
        if isinstance(module, nn.BatchNorm2d | nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias, 0, 0.1, generator=generator)
    return model.eval()


def relative(mine, expected):
    """The largest difference, relative to the largest expected number."""
    return ((mine - expected).abs().max() / expected.abs().max()).item()


def assert_same_outputs(mine, expected, tolerance=1e-10, spread=1e-3):
    """Equal, where the expected numbers differ from one another: else the comparison would prove nothing."""
    assert mine.shape == expected.shape
    assert expected.std() > spread, "the oracle's outputs are all alike"
    assert relative(mine, expected) < tolerance


def assert_same_function(ours, theirs, size=64, batch=2, state=None, **bounds):
    """Both networks give the same logits, in their own precision; ``state`` of the one is loaded into the other."""
    if state is not None:
        ours.load_state_dict(state, strict=True)
    x = images(size, batch, dtype=next(theirs.parameters()).dtype)
    with torch.no_grad():
        assert_same_outputs(ours.eval()(x), theirs.eval()(x), **bounds)


def own_registry(monkeypatch):
    """What the test registers is forgotten at its end; ``register_model`` has no way back."""
    monkeypatch.setattr(registry, "_SPECS", dict(registry._specs()))
