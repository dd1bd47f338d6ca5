"""What modules of this package tell ``torch.jit.script``."""

from typing import NoReturn

from torch import nn

from senet.errors import InputError


def refuse_to_script(module: nn.Module) -> NoReturn:
    """Raise an error: the ``__prepare_scriptable__`` of a module, which ``torch.jit.script`` calls first."""
    raise InputError(
        f"torch.jit.script cannot compile {type(module).__name__}; "
        "use torch.export or torch.compile, or torch.jit.trace for TorchScript"
    )
