"""Plain modules: those whose weights fully define what they compute, so that their weights can be used directly.

Fast forms read the weights of a layer instead of calling it. The result is the same only for PyTorch's own layer
classes with ordinary parameters: not for pruned, parametrized, low-rank adapted, quantized, sharded, or offloaded
layers, and not for layers with hooks.
"""

from typing import NoReturn

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook

from senet.errors import InputError

# The last two represent ordinary tensors while a network is traced.
_ORDINARY = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
_POINTWISE = ((1, 1), (1, 1), (0, 0), 1)


def has_hooks(module: nn.Module, known: int = 0) -> bool:
    """Whether the module's call has hooks or is replaced. ``known`` is the number of forward hooks to ignore."""
    return _has_any_global_hook() or has_own_hooks(module, known)


def has_own_hooks(module: nn.Module, known: int = 0) -> bool:
    """The same as ``has_hooks``, but ignores global hooks."""
    if len(module._forward_hooks) > known or "forward" in vars(module):
        return True
    return bool(module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def is_plain(layer: nn.Module | None) -> bool:
    """Whether ``layer`` is ``nn.Conv2d`` or ``nn.Linear`` itself, on ordinary tensors, with no hooks of its own."""
    if layer is None or type(layer) not in (nn.Conv2d, nn.Linear) or has_own_hooks(layer):
        return False
    # layer.weight would also exist for a pruned layer, where it is not a parameter.
    own = layer._parameters
    if len(own) != 2 or "weight" not in own or "bias" not in own:
        return False
    return type(own["weight"]) in _ORDINARY and (own["bias"] is None or type(own["bias"]) in _ORDINARY)


def is_plain_fc(layer: nn.Module | None) -> bool:
    """Whether ``layer`` is a plain fully connected layer: linear, or a 1×1 convolution."""
    if type(layer) is nn.Conv2d and (layer.kernel_size, layer.stride, layer.padding, layer.groups) != _POINTWISE:
        return False
    return is_plain(layer)


def refuse_to_script(module: nn.Module) -> NoReturn:
    """Raise an error: the ``__prepare_scriptable__`` of a module, which ``torch.jit.script`` calls first."""
    raise InputError(
        f"torch.jit.script cannot compile {type(module).__name__}; "
        "use torch.export or torch.compile, or torch.jit.trace for TorchScript"
    )
