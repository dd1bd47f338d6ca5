"""How the commands run a network: through this package's backend of ``torch.compile``, Inductor, or as it is."""

from __future__ import annotations

import logging
import os
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from senet.acceleration.backend import compile_graph
from senet.errors import InputError
from senet.text import first_line

# What a recipe or an option says → the backend of torch.compile; None runs the network itself.
HOW: dict[str, Any] = {"senet": compile_graph, "inductor": "inductor", "off": None}
VARIABLE = "SENET_COMPILE"
_LOG = logging.getLogger("senet.acceleration")
_said: set[str] = set()  # reasons, so that a comparison of many runs says each only once


def compiled(network: nn.Module, how: str) -> Compiled:
    """What to call instead of ``network``, whose parameters it uses. The network itself is unchanged.

    If the network cannot be compiled, it runs uncompiled, and one line of the log says so with the reason.

    Args:
        network: any network. It is captured at its first call in each mode.
        how: ``"senet"``, ``"inductor"``, or ``"off"``. The environment variable ``SENET_COMPILE`` overrides it.

    Raises:
        InputError: ``how`` or the environment variable has another value.
    """
    chosen = os.environ.get(VARIABLE) or how
    if chosen not in HOW:
        name = VARIABLE if os.environ.get(VARIABLE) else "compile"
        raise InputError(f"{name}={chosen!r} is unknown; choose one of {', '.join(HOW)}")
    return Compiled(network, chosen)


class Compiled:
    """Calls a network through ``torch.compile``, or directly if ``how`` is ``"off"`` or compiling has failed.

    It is no module, so that the network's keys stay what they are. Copies and pickles capture their network anew.
    """

    def __init__(self, network: nn.Module, how: str) -> None:
        self.network = network
        self.how = how
        self._call: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output."""
        if HOW[self.how] is None:
            return self.network(*args, **kwargs)
        try:
            if self._call is None:
                self._call = torch.compile(_with_own_code(self.network), backend=HOW[self.how])
            return self._call(*args, **kwargs)
        except RuntimeError as error:
            if not (self._call is None or isinstance(error, torch._dynamo.exc.TorchDynamoException)):
                raise
            cause = getattr(error, "inner_exception", None) or error
            if isinstance(cause, InputError):  # about a setting, not about the network
                raise cause from None
        result = self.network(*args, **kwargs)  # an error of the network itself is raised here
        _say(f"the network runs uncompiled, which is slower: compile={self.how} failed: {first_line(cause)}")
        self.how = "off"
        return result

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the compiled code, which belongs to this network and this process."""
        return self.__dict__ | {"_call": None}


def _with_own_code(self: nn.Module) -> Callable[..., Any]:
    """A function that calls a network. Dynamo limits the captures of a code object, which networks otherwise share.

    The argument is called ``self`` because Dynamo names parameters by it: as in a captured module, ``self.conv1``.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)

    return types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)


def _say(message: str) -> None:
    _LOG.log(logging.INFO if message in _said else logging.WARNING, message)
    _said.add(message)
