"""What tests look at inside an accelerated network, where its report cannot tell."""

import torch

from senet.acceleration.executor import Planned


def instances(monkeypatch, kind):
    """A list that grows by each object of a class that is made, in order."""
    made, init = [], kind.__init__

    def noting(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(kind, "__init__", noting)
    return made


def batch_sizes(monkeypatch):
    """A list that grows by the number of images of each call of a graph, or of a part of one."""
    sizes, call = [], Planned.__call__
    monkeypatch.setattr(Planned, "__call__", lambda self, *x: (sizes.append(len(x[0])), call(self, *x))[1])
    return sizes


def report_of(fast, *inputs):
    """The report of an accelerated network after one call without gradients."""
    with torch.no_grad():
        fast(*inputs)
    return fast.acceleration
