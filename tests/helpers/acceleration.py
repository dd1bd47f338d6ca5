"""What tests look at inside an accelerated network, where its report cannot tell."""

from senet.acceleration.executor import Planned


def inference_form(fast):
    """What runs in evaluation mode: ``graph``, and ``run`` with the plans that were made for shapes of images."""
    return fast._form()


def modules_of(fast, kind):
    """The modules of a kind in the inference graph, in order."""
    return [module for module in inference_form(fast).graph.modules() if isinstance(module, kind)]


def batch_sizes(monkeypatch):
    """A list that grows by the number of images of each call of a graph, or of a part of one."""
    sizes, call = [], Planned.__call__
    monkeypatch.setattr(Planned, "__call__", lambda self, *x: (sizes.append(len(x[0])), call(self, *x))[1])
    return sizes
