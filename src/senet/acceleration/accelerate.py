"""``senet.accelerate``: the inference form of a network, with its own keys and a way back to training."""

import contextlib
import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_leaves

from senet.acceleration.fuse import folded
from senet.acceleration.microbatch import InCache
from senet.acceleration.report import Acceleration, known_gates, own_names, products
from senet.acceleration.staleness import Contents, Listeners, Structure
from senet.acceleration.trace import required
from senet.acceleration.training import Swept, hooks_of
from senet.errors import InputError
from senet.nn.attachment import in_line, tensors_of
from senet.nn.plain import refuse_to_script
from senet.ops.border import UnsuitedMapError
from senet.ops.conv import early_gate
from senet.surgery.find_gates import find_gates

_FORMS = ("_fast", "_tails")  # what is made from the network, and made anew when it changes
_OWN = ("_requested", "_trainable", *_FORMS)


def accelerate(model: nn.Module, backend: str = "auto") -> nn.Module:
    """A copy of ``model`` that computes the same function faster; ``model`` is not changed.

    In eval mode, norms are folded into convolutions, gates are computed before the last 1×1 convolution of a block, and
    gate, shortcut, and ReLU are applied in one sweep or in the epilogue of that convolution (docs/zero-tax.md). Outputs
    agree up to float32 rounding (1e-5 relative in a trained ResNet); feature maps are returned in channels_last. In
    training mode, a gate that follows a norm is computed in the sweeps of that norm. This covers gates of any library
    whose function is known (docs/accelerate.md). Everything else runs unchanged; ``fast.acceleration`` lists both.

    The copy keeps the class, the parameters, and the keys. ``state_dict`` loads both ways, and ``train()`` and
    ``eval()`` switch forms. Changes of weights, modules, and modes take effect, except for writes through
    ``tensor.data``, and, in a compiled copy, changes before the next ``eval()``. In eval mode, parameters do not
    require gradients unless you request them. Gradients of parameters and inputs are computed with ordinary operations.
    So is everything that inspects operations: torch.func, forward-mode differentiation, ``torch.jit.trace``, torch.fx,
    and fake tensors. Hooks that are added to inner modules later are called in training, but not in the inference form.

    Args:
        model: a network that torch.fx can trace: all networks of this package and torchvision, and most of timm.
        backend: the inference backend. ``"native"``: oneDNN and C++ on the CPU; ``"triton"``: on a CUDA device;
            ``"reference"``: folded norms and early gates in plain PyTorch; ``"auto"``: the first of these that is
            available. ``senet.use_backend`` selects the training backend.

    Raises:
        InputError: the backend is unknown or not available (the message gives the reason), or the network cannot be
            traced, has hooks on its modules, or is wrapped for several devices, compiled, or TorchScript.
    """
    if backend != "auto" and backend not in early_gate.BACKENDS:
        raise InputError(f"accelerate: {backend!r} is not a backend; use one of auto, {', '.join(early_gate.BACKENDS)}")
    _check(model)
    fast = _accelerated(_copy(model, {}), backend, {})
    if model.training:
        fast._inference_form(_in_mode(fast._ordinary(), False))  # what is refused is refused now
    else:
        fast._hold_gradients()
        fast._form()
    return fast


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"accelerate: expected a network, got {type(model).__name__}; pass an nn.Module")
    if isinstance(model, Accelerated):
        raise InputError("accelerate: the network is already accelerated; use it as it is")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise InputError(f"accelerate: the network is wrapped in {type(model).__name__}; accelerate model.module")
    if "_orig_mod" in model._modules:  # asking for the class would load the compiler
        raise InputError("accelerate: the network is compiled; accelerate the ordinary one, then compile it")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("accelerate: the network is TorchScript, which cannot be inspected; pass the ordinary one")
    gates = [gate.module for gate in find_gates(model)]
    called = {part for gate in gates for part in gate.modules()}  # where somebody listens, the gate is called
    for name, module in model.named_modules():
        if module in called:
            continue
        if "forward" in vars(module):
            raise InputError(
                f"accelerate: the forward of {name or 'the network'!r} was replaced, and the fast form would not call "
                "the new one; move it into a subclass"
            )
        if name and hooks_of(module):
            raise InputError(f"accelerate: {name!r} has a hook, which the fast form would not call; remove it first")


class _Form:
    """The inference form of a network. Not a module: it has no keys.

    Args:
        model: what is traced, in eval mode.
        watched: where it is looked for changes: the network that it was made for.
        backend: one of ``early_gate.BACKENDS``.
    """

    def __init__(self, model: nn.Module, watched: nn.Module, backend: str) -> None:
        self.structure, self.contents = Structure(watched), Contents(watched)
        self.listeners = Listeners(part for gate in find_gates(watched) for part in gate.module.modules())
        self.forms: dict[str, str] = {}
        self.graph: Any
        devices = _devices(watched)
        if len(devices) > 1:
            self.graph, self.left = None, {"the network": f"its tensors are on {' and '.join(devices)}"}
            return
        network, names = in_line(model), own_names(model)
        known, left = known_gates(network)
        excitations = {name: gate.fully_connected() for name, gate in known.items()}
        self.graph, forms = folded(network, backend, excitations)
        self.forms = {names.get(name, name): form for name, form in forms.items()}
        self.left = products(self.graph.graph) | {names.get(name, name): reason for name, reason in left.items()}
        # What is in training mode, as dropout may be, looks at the batch as a whole or draws numbers for it.
        in_parts = backend == "native" and not any(module.training for module in model.modules())
        self.run: Any = InCache(self.graph) if in_parts else self.graph

    def is_stale(self) -> bool:
        """Whether the network has changed since."""
        return not (self.contents.is_same() and self.structure.is_same() and self.listeners.is_same())

    def __call__(self, *inputs: Any) -> Any:
        in_plain_operations = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
        return (self.graph if in_plain_operations else self.run)(*inputs)


class Accelerated:
    """The methods that ``accelerate`` adds to the class of a network."""

    # It is mixed into the network's own class, whose methods mypy cannot see: hence the ignores below.

    __prepare_scriptable__ = refuse_to_script

    training: bool
    _requested: str
    _trainable: dict[str, bool]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the form for the current mode, or the ordinary network for gradients in eval mode and unusual calls."""
        inputs = _required(type(self), args, kwargs)
        if inputs is not None and not _looks_at_operations(inputs):
            if self.training:
                graph = self._swept()
                if graph is not None:
                    return graph(*inputs)
            else:
                form = self._form()
                if form is not None and form.graph is not None and not _wants_gradient(inputs, form):
                    with torch.no_grad():
                        if torch.compiler.is_compiling():
                            return form(*map(_channels_last, inputs))
                        # What the form was not made for, the ordinary network takes, or says what is wrong with it.
                        with contextlib.suppress(UnsuitedMapError):
                            return form(*map(_channels_last, inputs))
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def train(self, mode: bool = True) -> Any:
        """Switch to the training form, whose parameters require gradients. ``eval()`` switches back to inference."""
        super().train(mode)  # type: ignore[misc]
        if mode:
            for name, parameter in self.named_parameters():  # type: ignore[attr-defined]
                parameter.requires_grad_(parameter.requires_grad or self._trainable.get(name, False))
            self._trainable.clear()
            self.__dict__.pop("_fast", None)
            self._swept()
        else:
            self._hold_gradients()
            self._renew()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """See ``nn.Module.requires_grad_``. In eval mode, it also takes effect for later training."""
        if not self.training:
            self._trainable = dict.fromkeys(dict(self.named_parameters()), requires_grad)  # type: ignore[attr-defined]
        return super().requires_grad_(requires_grad)  # type: ignore[misc]

    def _hold_gradients(self) -> None:
        """Parameters require no gradients until training, which finds out here whether they did."""
        for name, parameter in self.named_parameters():  # type: ignore[attr-defined]
            self._trainable.setdefault(name, parameter.requires_grad)
            parameter.requires_grad_(False)

    def _form(self) -> Any:
        """The inference form, made anew when the network has changed; None where a compiler runs and there is none."""
        form: _Form | None = self.__dict__.get("_fast")
        if not torch.compiler.is_compiling() and (form is None or form.is_stale()):
            form = self.__dict__["_fast"] = self._inference_form(self._ordinary())
        return form

    def _inference_form(self, network: nn.Module) -> _Form:
        weight = next(network.parameters(), torch.empty(0, device="cpu"))
        devices = _devices(network)
        if self._requested != "auto" and len(devices) > 1:
            where = " and ".join(devices)
            raise InputError(
                f"accelerate: backend {self._requested!r} cannot run here: the network is on {where}; move it to one "
                "device"
            )
        watched: Any = self
        return _Form(network, watched, _backend(self._requested, weight))

    def _swept(self) -> Any:
        """The training form, made anew when a module has changed; None where the ordinary network is to run."""
        swept, structure = self.__dict__.get("_tails", (None, None))
        if torch.compiler.is_compiling():
            return None if swept is None else swept.graph
        if swept is None or not structure.is_same():
            swept = Swept(self._ordinary())
            watched: Any = self
            self.__dict__["_tails"] = swept, Structure(watched)
        return None if swept.is_hooked() else swept.graph

    @property
    def acceleration(self) -> Acceleration:
        """What was replaced in both modes, and what was left unchanged and why."""
        ordinary = self._ordinary()
        if self.training:
            form, swept = self._inference_form(_in_mode(ordinary, False)), Swept(ordinary)
        else:
            form, swept = self._form(), Swept(_in_mode(ordinary, True))
        return Acceleration(form.forms, swept.names, form.left, swept.reason)

    def _ordinary(self) -> nn.Module:
        """This network under its own class, sharing all parameters: what is traced."""
        twin: Any = object.__new__(type(self).__bases__[1])
        twin.__dict__ = {k: v for k, v in self.__dict__.items() if k not in _OWN}
        return twin

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, (nn.Module, Tensor)):  # a new head, say
            self._forget()
        super().__setattr__(name, value)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)  # type: ignore[misc]
        self._renew()  # another device or type
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """See ``nn.Module.load_state_dict``. The keys are those of the ordinary network."""
        result = super().load_state_dict(*args, **kwargs)  # type: ignore[misc]
        self._renew()
        return result

    def _renew(self) -> None:
        """Make the inference form now, as a compiler cannot; where it cannot be made, the next call says why."""
        if self.training:
            self._forget()
            return
        try:
            self._form()
        except InputError:
            self._forget()

    def _forget(self) -> None:
        for name in _FORMS:
            self.__dict__.pop(name, None)

    def _replicate_for_data_parallel(self) -> Any:
        return self._ordinary()._replicate_for_data_parallel()  # a form is on one device

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = self._ordinary().__reduce_ex__(protocol)  # the network's own way
        make, args, *rest = reduced
        return _restored, (make, args, self._requested, self._trainable), *rest


def _class_for(ordinary: Any) -> type:
    @functools.wraps(ordinary.forward)  # its signature is looked at by exports and by torch.fx
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return Accelerated.forward(self, *args, **kwargs)

    own: dict[str, Any] = {"__module__": __name__, "forward": forward, "_arguments": required(ordinary.forward)}
    if hasattr(ordinary, "__deepcopy__"):  # as torch.fx's networks have
        own["__deepcopy__"] = _copied
    return type(f"Accelerated{ordinary.__name__}", (Accelerated, ordinary), own)


def _copied(fast: Any, memo: dict[int, Any]) -> nn.Module:
    return _accelerated(_copy(fast._ordinary(), memo), fast._requested, dict(fast._trainable))


def _copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    computed = {key: tensor for key, tensor in tensors_of(model).items() if not tensor.is_leaf}
    memo |= {key: tensor.detach().clone() for key, tensor in computed.items() if key not in memo}
    twin = copy.deepcopy(model, memo)
    # torchvision's feature extractors come out of a copy in training mode.
    return twin if twin.training == model.training else twin.train(model.training)


def _required(kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """What a call gives, in order; None where it gives arguments that the forms do not have."""
    if kind._arguments is None:
        return None if kwargs else args
    names = kind._arguments[1 + len(args) :]
    if 1 + len(args) + len(kwargs) != len(kind._arguments) or any(name not in kwargs for name in names):
        return None
    return args + tuple(kwargs[name] for name in names)


def _channels_last(x: Any) -> Any:
    return x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.ndim == 4 else x


def _looks_at_operations(inputs: tuple[Any, ...]) -> bool:
    """Whether somebody wants to see operations or calls, or has tensors without memory; compilers get own graphs."""
    if torch.compiler.is_compiling():
        return False
    if torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0 or _has_any_global_hook():
        return True
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    dispatch = Tensor.__torch_dispatch__  # of fake and distributed tensors it is their own
    return not tensors or any(type(tensor).__torch_dispatch__ is not dispatch for tensor in tensors)


def _wants_gradient(inputs: tuple[Any, ...], form: _Form) -> bool:
    if not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        return any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
    given = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(inputs))
    return given or form.contents.wants_gradient()


def _backend(requested: str, weight: Tensor) -> str:
    if requested == "auto":
        return next(b for b in ("native", "triton", "reference") if early_gate.why_not(b, weight) is None)
    reason = early_gate.why_not(requested, weight)
    if reason is not None:
        raise InputError(f"accelerate: backend {requested!r} cannot run here: {reason}; use 'auto'")
    return requested


def _devices(model: nn.Module) -> list[str]:
    """Where a network's weights and statistics are."""
    tensors = (*model.parameters(), *model.buffers())
    return sorted({str(t.device) for t in tensors if t.is_floating_point() and t.ndim})


def _in_mode(model: nn.Module, training: bool) -> nn.Module:
    """``model`` in another mode, on the same parameters and statistics."""
    return copy.deepcopy(model, tensors_of(model)).train(training)


def _restored(make: Any, args: tuple[Any, ...], requested: str, trainable: dict[str, bool]) -> Any:
    """An accelerated network from a pickle or a copy, maybe still without its state."""
    return _accelerated(make(*args), requested, trainable)


def _accelerated(model: Any, requested: str, trainable: dict[str, bool]) -> Any:
    model.__class__ = _class_for(type(model))
    model.__dict__ |= {"_requested": requested, "_trainable": trainable}
    return model
