"""Which modules may be read instead of called: those whose weights say all that they do.

Fast forms take the weights of a layer and compute it in their own way. That means the same only for the layers of
PyTorch themselves, with parameters that are there: not for pruned, parametrized, low-rank adapted, quantized, sharded
or offloaded ones, nor for one that somebody listens to.
"""

from typing import NoReturn

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook

from senet.errors import InputError

# The last two stand for ordinary ones while a network is traced.
_ORDINARY = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
_POINTWISE = ((1, 1), (1, 1), (0, 0), 1)


def has_hooks(module: nn.Module, known: int = 0) -> bool:
    """Whether someone listens to the module's call, or has replaced it; ``known`` forward hooks may be there."""
    return _has_any_global_hook() or has_own_hooks(module, known)


def has_own_hooks(module: nn.Module, known: int = 0) -> bool:
    """See ``has_hooks``; what listens to every module there is does not count."""
    if len(module._forward_hooks) > known or "forward" in vars(module):
        return True
    return bool(module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def is_plain(layer: nn.Module | None) -> bool:
    """Whether ``layer`` is ``nn.Conv2d`` or ``nn.Linear`` itself, on ordinary tensors, with no hooks of its own."""
    if layer is None or type(layer) not in (nn.Conv2d, nn.Linear) or has_own_hooks(layer):
        return False
    # Not layer.weight: a pruned layer has that, too, beside its parameters.
    own = layer._parameters
    if len(own) != 2 or "weight" not in own or "bias" not in own:
        return False
    return type(own["weight"]) in _ORDINARY and (own["bias"] is None or type(own["bias"]) in _ORDINARY)


def is_plain_fc(layer: nn.Module | None) -> bool:
    """Whether ``layer`` is plain and a fully connected one: linear, or a 1×1 convolution."""
    if type(layer) is nn.Conv2d and (layer.kernel_size, layer.stride, layer.padding, layer.groups) != _POINTWISE:
        return False
    return is_plain(layer)


def refuse_to_script(module: nn.Module) -> NoReturn:
    """What ``torch.jit.script`` calls first, as a module's ``__prepare_scriptable__``."""
    raise InputError(
        f"torch.jit.script cannot compile {type(module).__name__}, which picks its form as it runs; "
        "use torch.export or torch.compile, or torch.jit.trace for TorchScript"
    )
