"""Squeeze-and-Excitation for PyTorch: the block, the networks, the training, and the instruments to look inside."""

import importlib
from typing import TYPE_CHECKING, Any

from senet._version import __version__

if TYPE_CHECKING:
    from senet.errors import InputError
    from senet.gates.accelerate import accelerate
    from senet.models.registry import ModelSpec, create_model, list_models, model_spec, register_model
    from senet.models.weights import build_from_checkpoint, load_weights, save_weights
    from senet.nn.residual_tail import ResidualTail
    from senet.nn.squeeze_excite import SEConfig, SqueezeExcite
    from senet.ops.backend import use_backend

# Public name → where it lives. Loaded at first use (PEP 562), so that the command line answers without importing torch.
_HOMES = {
    "InputError": "senet.errors",
    "ModelSpec": "senet.models.registry",
    "ResidualTail": "senet.nn.residual_tail",
    "SEConfig": "senet.nn.squeeze_excite",
    "SqueezeExcite": "senet.nn.squeeze_excite",
    "accelerate": "senet.gates.accelerate",
    "build_from_checkpoint": "senet.models.weights",
    "create_model": "senet.models.registry",
    "list_models": "senet.models.registry",
    "load_weights": "senet.models.weights",
    "model_spec": "senet.models.registry",
    "register_model": "senet.models.registry",
    "save_weights": "senet.models.weights",
    "use_backend": "senet.ops.backend",
}

__all__ = [
    "InputError",
    "ModelSpec",
    "ResidualTail",
    "SEConfig",
    "SqueezeExcite",
    "__version__",
    "accelerate",
    "build_from_checkpoint",
    "create_model",
    "list_models",
    "load_weights",
    "model_spec",
    "register_model",
    "save_weights",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'senet' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
