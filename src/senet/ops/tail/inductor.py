"""The sweeps under ``torch.compile``, on CPU and GPU: each is compiled once per layout, dtype, and set of options.

Sizes are dynamic. Feature maps (*maps*) are passed as (N, C, S) with S or C contiguous, so all stages of a network, all
batch sizes, and all image sizes share one kernel, and nothing is recompiled when they change.
"""

import functools
import os
import types
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from senet.ops.csrc.build import compiler
from senet.ops.layout import in_layout
from senet.ops.tail import definitions as sweeps
from senet.text import first_line


def why_not() -> str | None:
    """The reason why the sweeps cannot be compiled on this machine, or None. Nothing is compiled to find out."""
    if os.environ.get("TORCHDYNAMO_DISABLE", "0") == "1":
        return "torch.compile is disabled by TORCHDYNAMO_DISABLE=1"
    if torch.cuda.is_available():
        return None
    if compiler() is None:
        return "torch.compile needs a C++ compiler, and none was found (install g++ or clang, or set CXX)"
    return None


_broken: list[str] = []  # the first failure of the compiler; afterwards, the sweeps run uncompiled


def _flat(x: Tensor, last: bool) -> Tensor:
    """View a map as (N, C, S). ``last``: it is channels_last, otherwise contiguous."""
    return x.movedim(1, -1).flatten(1, -2).transpose(1, 2) if last else x.flatten(2)


def _unflat(flat: Tensor, u: Tensor, last: bool) -> Tensor:
    """Restore the shape and layout of the map ``u`` from (N, C, S)."""
    if last:
        return flat.transpose(1, 2).reshape(u.shape[0], *u.shape[2:], u.shape[1]).movedim(-1, 1)
    return flat.reshape(u.shape)


# The compiled functions. They create the views themselves: a view from outside would prevent autograd from accumulating
# gradients in place.
def _moments(last: bool, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return sweeps.moments(_flat(u, last))


def _mean(last: bool, u: Tensor) -> Tensor:
    return sweeps.mean(_flat(u, last))


def _affine(last: bool, u: Tensor, m: Tensor, a: Tensor, b: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    flat_shortcut = None if shortcut is None else _flat(shortcut, last)
    return _unflat(sweeps.affine(_flat(u, last), m, a, b, flat_shortcut, relu), u, last)


def _affine_backward(
    last: bool, dout: Tensor, out: Tensor | None, u: Tensor, m: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    if out is None:
        return None, *sweeps.product_sums(_flat(dout, last), _flat(u, last), m)
    g, da, db = sweeps.affine_backward(_flat(dout, last), _flat(out, last), _flat(u, last), m)
    return _unflat(g, u, last), da, db


def _moments_backward(last: bool, g: Tensor, u: Tensor, m: Tensor, a: Tensor, dm: Tensor, dv: Tensor) -> Tensor:
    return _unflat(sweeps.moments_backward(_flat(g, last), _flat(u, last), m, a, dm, dv), u, last)


@functools.cache
def _compiled(body: types.FunctionType, key: tuple[object, ...]) -> Callable[..., Any]:
    """A sweep compiled for one layout, dtype, and set of options. Each has its own code object, hence its own cache."""
    own = types.FunctionType(body.__code__.replace(co_name=body.__name__), body.__globals__)
    return torch.compile(own, dynamic=True, fullgraph=True)


def _run(body: Callable[..., Any], u: Tensor, *args: Any) -> Any:
    """Run ``body(last, *args)`` compiled, or uncompiled if the compiler has failed."""
    last = not u.is_contiguous()
    args = tuple(_prepared(x, u, last) for x in args)
    if _broken:
        return body(last, *args)
    key = (last, u.is_inference(), torch.is_autocast_enabled(u.device.type), *map(_kind, args))
    try:
        with torch.no_grad():
            return _compiled(cast(types.FunctionType, body), key)(last, *args)
    except Exception as error:
        # The definitions run where the compiler fails. Their own errors are raised unchanged.
        result = body(last, *args)
        _broken.append(str(error))
        warnings.warn(
            f"senet: torch.compile failed; the sweeps run uncompiled, which is slower: {first_line(error)}",
            stacklevel=2,
        )
        return result


def _kind(x: Any) -> object:
    """The part of the cache key for ``x``. Sizes are dynamic, but Dynamo recompiles for a size of 1, up to a limit."""
    return (x.dtype, x.device, tuple(size == 1 for size in x.shape)) if isinstance(x, Tensor) else x


def _prepared(x: Any, u: Tensor, last: bool) -> Any:
    """A map in the compiled layout, copied only if necessary; anything else unchanged.

    Tensors are detached: callers handle gradients, and Dynamo would access ``.grad``, which warns.
    """
    if not isinstance(x, Tensor):
        return x
    x = x.detach() if x.requires_grad else x
    return in_layout(x, last) if x.ndim == u.ndim else x


def moments(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ``definitions.moments``."""
    return _run(_moments, u, u)


def mean(u: Tensor) -> Tensor:
    """See ``definitions.mean``."""
    return _run(_mean, u, u)


def affine(u: Tensor, m: Tensor, a: Tensor, b: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """See ``definitions.affine``."""
    return _run(_affine, u, u, m, a, b, shortcut, relu)


def affine_backward(dout: Tensor, out: Tensor | None, u: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ``definitions.affine_backward``."""
    g, da, db = _run(_affine_backward, u, dout, out, u, m)
    return dout if g is None else g, da, db


def moments_backward(g: Tensor, u: Tensor, m: Tensor, a: Tensor, dm: Tensor, dv: Tensor) -> Tensor:
    """See ``definitions.moments_backward``."""
    return _run(_moments_backward, u, g, u, m, a, dm, dv)
