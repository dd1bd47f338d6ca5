"""``senet.accelerate``: a copy of a network, captured by ``torch.compile`` and run by the backend ``"senet"``."""

import copy
import functools
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import TorchDynamoException
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map

from senet.acceleration.backend import PASSES, Options, rewritten
from senet.acceleration.report import Acceleration
from senet.errors import InputError
from senet.nn.attachment import tensors_of
from senet.text import first_line


def accelerate(
    model: nn.Module, backend: str = "auto", then: str = "auto", mode: str | None = None, example_input: Any = None
) -> nn.Module:
    """A copy of ``model`` that computes the same function faster; ``model`` is not changed.

    The copy has the same class, parameters, and keys. ``torch.compile`` captures it at the first call, and again
    whenever something that it read has changed; the backend ``"senet"`` rewrites what was captured. Without gradients,
    in eval mode, norms are folded into convolutions, gates are computed before the last 1×1 convolution of a block, and
    gate, shortcut, and ReLU are applied in one sweep or in the epilogue of that convolution (docs/zero-tax.md). Outputs
    agree up to float32 rounding (1e-5 relative in a trained ResNet); feature maps are returned in channels_last. In
    training mode, norm, gate, shortcut, and ReLU are computed in sweeps. Gates are recognized by what they compute,
    whoever wrote them (docs/accelerate.md). Everything else runs as it was captured; ``fast.acceleration`` lists both.

    Weights may change in any way that PyTorch counts: in place, by an optimizer, by ``load_state_dict``. Copies and
    pickles stay accelerated. Everything that inspects operations sees the ordinary network: torch.func, forward-mode
    differentiation, ``torch.jit.trace``, ``torch.export``, torch.fx, fake tensors, and dispatch modes. An outer
    ``torch.compile`` breaks its graph at the network and calls it as it is.

    Args:
        model: any network. What Dynamo cannot capture runs uncompiled.
        backend: who computes what is replaced. ``"native"``: oneDNN and C++ on the CPU; ``"triton"``: on a CUDA
            device; ``"reference"``: plain PyTorch; ``"auto"``: the first of these that is available.
        then: who runs the graph afterwards: ``"eager"``, ``"inductor"``, or ``"auto"``: Inductor on a CUDA device.
        mode: Inductor's, as in ``torch.compile``: ``"reduce-overhead"`` (CUDA graphs), ``"max-autotune"``.
        example_input: if given, an input of one call, in the current mode: the network is captured now, and compared
            with the ordinary network.

    Raises:
        InputError: an option is unknown or not available (the message gives the reason), or the network is wrapped for
            several devices, compiled, or TorchScript.
    """
    options = Options(backend, then, mode)
    _check(model)
    fast = _copy(model)
    Captured(fast, options, vars(fast).get("forward")).install()
    if example_input is not None:
        check(fast, model, example_input, options)
    return fast


def explain(model: nn.Module, example_input: Any, backend: str = "auto", then: str = "auto") -> Acceleration:
    """What runs for each gate and tail of ``model``, in inference and in training, and why nothing faster.

    Copies of the network are captured in both modes; ``model`` is not changed.

    Args:
        model: any network.
        example_input: an input of one call.
        backend, then: as in ``accelerate``.

    Raises:
        InputError: as in ``accelerate``.
    """
    found = Acceleration()
    for training in (False, True):
        fast = accelerate(model, backend, then).train(training)
        vars(fast)["forward"].report = found
        with torch.set_grad_enabled(training):
            fast(example_input)
    return found


def check(fast: nn.Module, model: nn.Module, example_input: Any, options: Options) -> None:
    """Compare the captured network with the ordinary one, in the current mode; on a difference, use the ordinary one.

    Args:
        fast: the accelerated copy of ``model``.
        model: the ordinary network. Copies of it are run.
        example_input: an input of one call.
        options: those of ``fast``.
    """
    captured: Captured = vars(fast)["forward"]

    def outputs(network: nn.Module, x: Any) -> list[Tensor]:
        with torch.random.fork_rng(), torch.set_grad_enabled(network.training):
            torch.manual_seed(0)
            return [t.detach().double() for t in tree_leaves(network(x)) if isinstance(t, Tensor)]

    def distance(a: list[Tensor], b: list[Tensor]) -> float:
        if [t.shape for t in a] != [t.shape for t in b]:
            return float("inf")
        return max(
            (float((s - t).abs().max() / t.abs().max().clamp_min(1e-30)) for s, t in zip(a, b, strict=True)),
            default=0.0,
        )

    ordinary = outputs(_copy(model), example_input)
    exact = outputs(_copy(model).double(), tree_map(_doubled, example_input))
    allowed = 10 * distance(ordinary, exact) + 1e-5

    def is_right(without: tuple[str, ...]) -> bool:
        tried = _copy(model)
        Captured(tried, replace(options, without=without), vars(tried).get("forward")).install()
        return distance(outputs(tried, example_input), exact) <= allowed

    # A training step changes the statistics of a network, so the copy itself is only run in evaluation.
    buffers = {name: buffer.clone() for name, buffer in fast.named_buffers()}
    right = is_right(()) if fast.training else distance(outputs(fast, example_input), exact) <= allowed
    for name, buffer in fast.named_buffers():
        if not torch.equal(buffer, buffers[name]):  # a counter, say
            buffer.copy_(buffers[name])
    if not right:
        guilty = next((name for name in PASSES if is_right((name,))), "the capture")
        captured.report.ordinary = f"the pass {guilty!r} changes its output"
        warnings.warn(f"senet: the network runs uncompiled: {captured.report.ordinary}", stacklevel=3)


def _doubled(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"accelerate: expected a network, got {type(model).__name__}; pass an nn.Module")
    if is_accelerated(model):
        raise InputError("accelerate: the network is already accelerated; use it as it is")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise InputError(f"accelerate: the network is wrapped in {type(model).__name__}; accelerate model.module")
    if "_orig_mod" in model._modules:  # asking for the class would load the compiler
        raise InputError("accelerate: the network is compiled; accelerate the ordinary one, then compile it")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("accelerate: the network is TorchScript, which cannot be inspected; pass the ordinary one")


def is_accelerated(model: nn.Module) -> bool:
    """Whether the network comes from ``accelerate``."""
    return isinstance(vars(model).get("forward"), Captured)


def _copy(model: nn.Module) -> nn.Module:
    memo = {key: t.detach().clone() for key, t in tensors_of(model).items() if not t.is_leaf}
    twin = copy.deepcopy(model, memo)
    # torchvision's feature extractors come out of a copy in training mode.
    return twin if twin.training == model.training else twin.train(model.training)


class Captured:
    """The ``forward`` of an accelerated network: an attribute of the instance, so that its class stays the same.

    Args:
        module: the network.
        options: those of the backend.
        replaced: a ``forward`` that the network has instead of that of its class.
        report: what is told what was done.
    """

    def __init__(
        self,
        module: nn.Module,
        options: Options,
        replaced: Callable[..., Any] | None = None,
        report: Acceleration | None = None,
    ) -> None:
        self.module, self.options, self.replaced = module, options, replaced
        self.report = Acceleration() if report is None else report
        own = types.MethodType(type(module).forward, module) if replaced is None else replaced
        functools.update_wrapper(self, own, updated=())
        # Dynamo limits the captures per code object: each network has its own.
        self._ordinary = _own_code(module, replaced)
        self.__code__ = self._ordinary.__code__  # Dynamo looks for it when it captures a network of torch.fx
        self._compiled = torch.compile(self._ordinary, backend=self._rewritten)

    def install(self) -> None:
        """Make this the ``forward`` of the network."""
        own = {"forward": self, "acceleration": self.report, "_replicate_for_data_parallel": self.replicate}
        self.module.__dict__ |= own

    def replicate(self) -> Any:
        """A replica of the network for ``nn.DataParallel``: an ordinary one, because its weights are others."""
        replica: Any = type(self.module)._replicate_for_data_parallel(self.module)
        for name in ("forward", "acceleration", "_replicate_for_data_parallel"):
            del replica.__dict__[name]
        return replica

    def _rewritten(self, module: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        return rewritten(module, example_inputs, self.options, self.report)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the captured network; the ordinary one for whoever inspects operations."""
        # is_exporting() would always be true in Dynamo before torch 2.12.
        if torch.compiler._is_exporting_flag:
            return self._ordinary(*args, **kwargs)
        return self._run(*args, **kwargs)

    @torch.compiler.disable(recursive=False)
    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.report.ordinary is not None or _looks_at_operations(args, kwargs):
            return self._ordinary(*args, **kwargs)
        try:
            # Hooks that are added later are heard. This is read while guards are made, in whichever call that is.
            before, dynamo_config.skip_nnmodule_hook_guards = dynamo_config.skip_nnmodule_hook_guards, False
            try:
                return self._compiled(*args, **kwargs)
            finally:
                dynamo_config.skip_nnmodule_hook_guards = before
        except TorchDynamoException as failure:
            error = getattr(failure, "inner_exception", failure)
            if isinstance(error, InputError):  # the backend that was asked for cannot run here
                raise error from None
            result = self._ordinary(*args, **kwargs)  # or the network's own error
            self.report.ordinary = f"torch.compile could not capture it: {first_line(error)}"
            warnings.warn(f"senet: the network runs uncompiled: {self.report.ordinary}", stacklevel=2)
            return result

    def __deepcopy__(self, memo: dict[int, Any]) -> "Captured":
        """That of the copied network, which the copy of this network's attributes knows."""
        replaced, report = copy.deepcopy(self.replaced, memo), copy.deepcopy(self.report, memo)
        return Captured(memo.get(id(self.module), self.module), self.options, replaced, report)

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"module": self.module, "options": self.options, "replaced": self.replaced, "report": self.report}
        return object.__new__, (Captured,), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _own_code(module: nn.Module, replaced: Callable[..., Any] | None) -> Callable[..., Any]:
    """The network's own ``forward`` in a function with a code object of its own."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return type(module).forward(module, *args, **kwargs) if replaced is None else replaced(*args, **kwargs)

    code = forward.__code__.replace(co_name=f"{type(module).__name__}_forward")
    return types.FunctionType(code, forward.__globals__, closure=forward.__closure__)


def _looks_at_operations(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether somebody wants to see operations or calls, or has tensors without memory."""
    if torch.jit.is_tracing() or _get_current_dispatch_mode() is not None or _has_any_global_hook():
        return True
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    dispatch = Tensor.__torch_dispatch__  # of fake and distributed tensors it is their own
    proxies = any(isinstance(leaf, fx.Proxy) for leaf in leaves)
    return proxies or not tensors or any(type(tensor).__torch_dispatch__ is not dispatch for tensor in tensors)
