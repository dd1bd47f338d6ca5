"""``senet.accelerate``: the inference form of a network, with the network's own keys and the way back to training."""

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from senet.errors import InputError
from senet.gates.acceleration import Acceleration, known_gates, own_names, products
from senet.gates.folding import folded
from senet.gates.microbatch import InCache
from senet.gates.swept import Swept, hooks_of
from senet.nn.attachment import in_line
from senet.ops import early_gate

_version = operator.attrgetter("_version")
_FORMS = ("_fast", "_tails")  # what is made from the network, and made anew when it changes
_OWN = ("_requested", "_trainable", *_FORMS)


def accelerate(model: nn.Module, backend: str = "auto") -> nn.Module:
    """A copy of ``model`` that computes the same function faster; ``model`` is not changed.

    In eval mode norms are folded into convolutions, gates are computed before the last 1×1 convolution of a block, and
    gate, shortcut and ReLU are applied in one sweep or in that convolution's epilogue (docs/zero-tax.md). Outputs
    agree to float32's rounding (1e-5 of their size in a trained ResNet); maps come out channels_last. In training mode
    gates that stand behind a norm are computed in the norm's own sweeps. This holds for gates of any library whose
    function is known (docs/accelerate.md); all else runs as it did, and ``fast.acceleration`` lists both.

    The copy keeps the class, the parameters and the keys: ``state_dict`` loads both ways, ``train()`` and ``eval()``
    switch, and weights that change in between are seen. While it is in eval mode its parameters do not require
    gradients; an input that does gets them through the ordinary operations. Hooks that are put on modules inside later
    are called in training, not by the inference form.

    Args:
        model: a network that torch.fx can trace: every network of this package, torchvision's, most of timm's.
        backend: of inference: ``"native"``: oneDNN and C++ on the CPU; ``"triton"``: on a CUDA device; ``"reference"``:
            folded and early-gated in plain PyTorch; ``"auto"``: the first of them that can run. That of training is
            chosen by ``senet.use_backend``.

    Raises:
        InputError: an unknown backend, one that cannot run here (the message says why), an untraceable network, or one
            with hooks on its modules.
    """
    if backend != "auto" and backend not in early_gate.BACKENDS:
        raise InputError(f"accelerate: {backend!r} is not a backend; there are auto, {', '.join(early_gate.BACKENDS)}")
    if isinstance(model, Accelerated):
        raise InputError("accelerate: the network is accelerated already")
    hooked = next((name for name, module in model.named_modules() if name and hooks_of(module)), None)
    if hooked is not None:
        raise InputError(f"accelerate: {hooked!r} has a hook, which the fast form would not call; remove it first")
    fast: Any = copy.deepcopy(model)
    fast.__class__ = _class_for(type(model))
    fast.__dict__["_requested"] = backend
    fast.__dict__["_trainable"] = {}
    fast.train(model.training)
    if not model.training:
        fast._form()
    return fast


class _Form:
    """The inference form, what it was made from, and the state of the parameters then. Not a module: it has no keys."""

    def __init__(self, model: nn.Module, backend: str) -> None:
        self.tensors = [t for t in (*model.parameters(), *model.buffers()) if not t.is_inference()]
        self.versions = list(map(_version, self.tensors))
        network, names = in_line(model), own_names(model)
        known, left = known_gates(network)
        self.graph, forms = folded(network, backend, {name: gate.fully_connected() for name, gate in known.items()})
        self.forms = {names.get(name, name): form for name, form in forms.items()}
        self.left = products(self.graph.graph) | {names.get(name, name): reason for name, reason in left.items()}
        self.run: Any = InCache(self.graph) if backend == "native" else self.graph

    def is_stale(self) -> bool:
        """Whether a parameter or a statistic has been written to since."""
        return list(map(_version, self.tensors)) != self.versions

    def __call__(self, x: Tensor) -> Any:
        return (self.graph if torch.compiler.is_compiling() else self.run)(x)


class Accelerated:
    """What ``accelerate`` adds to a network's class."""

    # It is mixed into the network's own class, whose methods mypy cannot see: hence the ignores below.

    training: bool
    _requested: str
    _trainable: dict[str, bool]

    def forward(self, x: Tensor) -> Any:
        """The form of the mode; the ordinary network in eval mode where ``x`` needs a gradient."""
        if self.training:
            graph = self._swept()
            return super().forward(x) if graph is None else graph(x)  # type: ignore[misc]
        if x.requires_grad and torch.is_grad_enabled():
            return super().forward(x)  # type: ignore[misc]
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            return self._form()(x)

    def train(self, mode: bool = True) -> Any:
        """Switch to the training form, whose parameters require gradients; ``eval()`` goes back to inference."""
        super().train(mode)  # type: ignore[misc]
        parameters = dict(self.named_parameters())  # type: ignore[attr-defined]
        if mode:
            for name, parameter in parameters.items():
                parameter.requires_grad_(self._trainable.get(name, parameter.requires_grad))
            self._trainable.clear()
            self.__dict__.pop("_fast", None)
            self._swept()
        else:
            for name, parameter in parameters.items():
                self._trainable.setdefault(name, parameter.requires_grad)
                parameter.requires_grad_(False)
        return self

    def _form(self) -> _Form:
        """The inference form; made anew when a parameter or a statistic has changed since."""
        form: _Form | None = self.__dict__.get("_fast")
        if form is None or (not torch.compiler.is_compiling() and form.is_stale()):
            weight = next(iter(self.parameters()), torch.empty(0))  # type: ignore[attr-defined]
            form = self.__dict__["_fast"] = _Form(self._ordinary(), self._backend(weight))
        return form

    def _swept(self) -> fx.GraphModule | None:
        """The training form, made anew when a module has changed; None where the ordinary network is to run."""
        form: Swept | None = self.__dict__.get("_tails")
        if torch.compiler.is_compiling():
            return None if form is None else form.graph
        if form is None or not form.is_of(self):  # type: ignore[arg-type]
            form = self.__dict__["_tails"] = Swept(self._ordinary())
        return None if form.is_hooked() else form.graph

    @property
    def acceleration(self) -> Acceleration:
        """What was replaced in both modes, and what was left and why."""
        ordinary = self._ordinary()
        if self.training:
            weight = next(ordinary.parameters(), torch.empty(0))
            form, swept = _Form(_in_mode(ordinary, False), self._backend(weight)), Swept(ordinary)
        else:
            form, swept = self._form(), Swept(_in_mode(ordinary, True))
        return Acceleration(form.forms, swept.names, form.left, swept.reason)

    def _ordinary(self) -> nn.Module:
        """This network under its own class, sharing all parameters: what is traced."""
        twin = copy.copy(self)
        twin.__dict__ = {k: v for k, v in self.__dict__.items() if k not in _OWN}
        twin.__class__ = type(self).__bases__[1]
        return twin  # type: ignore[return-value]

    def _backend(self, weight: Tensor) -> str:
        if self._requested == "auto":
            return next(b for b in ("native", "triton", "reference") if early_gate.why_not(b, weight) is None)
        reason = early_gate.why_not(self._requested, weight)
        if reason is not None:
            raise InputError(f"accelerate: backend {self._requested!r} cannot run here: {reason}; use 'auto'")
        return self._requested

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, (nn.Module, Tensor)):  # a new head, say
            self._forget()
        super().__setattr__(name, value)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._forget()  # another device or type
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """See ``nn.Module.load_state_dict``; the keys are the ordinary network's."""
        self._forget()  # with assign=True there are new parameters
        return super().load_state_dict(*args, **kwargs)  # type: ignore[misc]

    def _forget(self) -> None:
        for name in _FORMS:
            self.__dict__.pop(name, None)

    def __reduce__(self) -> tuple[Any, ...]:
        state = {k: v for k, v in self.__dict__.items() if k not in _FORMS}
        return _restored, (type(self).__bases__[1], state)


def _class_for(ordinary: type) -> type:
    return type(f"Accelerated{ordinary.__name__}", (Accelerated, ordinary), {"__module__": __name__})


def _in_mode(model: nn.Module, training: bool) -> nn.Module:
    """``model`` in another mode, on the same parameters and statistics."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared).train(training)


def _restored(ordinary: type, state: dict[str, Any]) -> nn.Module:
    """An accelerated network from a pickle or a copy."""
    kind: Any = _class_for(ordinary)
    model = kind.__new__(kind)
    model.__dict__.update(state)
    return model
