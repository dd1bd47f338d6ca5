"""Squeeze-and-Excitation for PyTorch: the block, the networks, training, and tools to attach, inspect, and fold it."""

import importlib
from typing import TYPE_CHECKING, Any

from senet._version import __version__

if TYPE_CHECKING:
    from senet.acceleration.accelerate import accelerate, explain
    from senet.attachment.attach import attach, detach
    from senet.attachment.policies import SitePolicy
    from senet.attachment.report import AttachReport
    from senet.attachment.site import Site
    from senet.attachment.sites import find_sites
    from senet.errors import InputError
    from senet.folding.fold import fold
    from senet.folding.report import FoldReport
    from senet.hub.save import from_pretrained, push_to_hub, save
    from senet.hub.timm_registry import register_timm
    from senet.inspection.doctor import diagnose
    from senet.inspection.excitations import Excitations
    from senet.inspection.record import record_excitations
    from senet.models.registry import ModelSpec, list_models, model_spec, register_model
    from senet.nn.attachment import in_line
    from senet.nn.squeeze_excite import SEConfig, SqueezeExcite
    from senet.ops.dispatch import use_backend
    from senet.surgery.find_gates import find_gates
    from senet.system.allocator import keep_freed_memory
    from senet.weights.create import create_model
    from senet.weights.load import build_from_checkpoint, load_weights, save_weights

# Public name → module. Loaded at first use (PEP 562), so the command line starts without importing torch.
_HOMES = {
    "AttachReport": "senet.attachment.report",
    "Excitations": "senet.inspection.excitations",
    "FoldReport": "senet.folding.report",
    "InputError": "senet.errors",
    "ModelSpec": "senet.models.registry",
    "SEConfig": "senet.nn.squeeze_excite",
    "Site": "senet.attachment.site",
    "SitePolicy": "senet.attachment.policies",
    "SqueezeExcite": "senet.nn.squeeze_excite",
    "accelerate": "senet.acceleration.accelerate",
    "explain": "senet.acceleration.accelerate",
    "attach": "senet.attachment.attach",
    "build_from_checkpoint": "senet.weights.load",
    "create_model": "senet.weights.create",
    "detach": "senet.attachment.attach",
    "diagnose": "senet.inspection.doctor",
    "find_gates": "senet.surgery.find_gates",
    "find_sites": "senet.attachment.sites",
    "fold": "senet.folding.fold",
    "from_pretrained": "senet.hub.save",
    "in_line": "senet.nn.attachment",
    "keep_freed_memory": "senet.system.allocator",
    "list_models": "senet.models.registry",
    "load_weights": "senet.weights.load",
    "model_spec": "senet.models.registry",
    "push_to_hub": "senet.hub.save",
    "record_excitations": "senet.inspection.record",
    "register_model": "senet.models.registry",
    "register_timm": "senet.hub.timm_registry",
    "save": "senet.hub.save",
    "save_weights": "senet.weights.load",
    "use_backend": "senet.ops.dispatch",
}

__all__ = [
    "AttachReport",
    "Excitations",
    "FoldReport",
    "InputError",
    "ModelSpec",
    "SEConfig",
    "Site",
    "SitePolicy",
    "SqueezeExcite",
    "__version__",
    "accelerate",
    "attach",
    "build_from_checkpoint",
    "create_model",
    "detach",
    "diagnose",
    "explain",
    "find_gates",
    "find_sites",
    "fold",
    "from_pretrained",
    "in_line",
    "keep_freed_memory",
    "list_models",
    "load_weights",
    "model_spec",
    "push_to_hub",
    "record_excitations",
    "register_model",
    "register_timm",
    "save",
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
