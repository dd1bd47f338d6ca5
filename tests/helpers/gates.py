"""Changes of a gate after which its fully connected layers are no plain ones, and must be called."""

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune


class LowRank(nn.Module):
    """As adapters do: the layer, whose weights can be read through it, and a product of two small matrices."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.a, self.b = nn.Conv2d(base.in_channels, 2, 1, bias=False), nn.Conv2d(2, base.out_channels, 1, bias=False)
        generator = torch.Generator().manual_seed(0)
        for matrix in (self.a.weight, self.b.weight):
            nn.init.normal_(matrix, 0, 0.5, generator=generator)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def doubled(module, args, output):
    """A hook that can be copied and pickled."""
    return 2 * output


def low_rank(gate):
    gate.fc1 = LowRank(gate.fc1)


def pruned(gate):
    prune.l1_unstructured(gate.fc1, "weight", 0.5)


def weight_normed(gate):
    parametrizations.weight_norm(gate.fc2)
    with torch.no_grad():
        gate.fc2.parametrizations.weight.original0.mul_(3)


def in_a_sequence(gate):
    gate.fc2 = nn.Sequential(gate.fc2, nn.Hardtanh())


def hooked(gate):
    gate.fc2.register_forward_hook(doubled)
