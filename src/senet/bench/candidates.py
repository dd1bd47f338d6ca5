"""The candidates of the benchmark: a plain network and its SE twin on every engine that runs on this machine."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.nn import functional as F

from senet.acceleration.accelerate import accelerate
from senet.bench import engines as peers
from senet.errors import InputError
from senet.models.registry import model_spec
from senet.ops.dispatch import use_backend
from senet.weights.create import create_model

Mode = Literal["train", "inference"]
Network = Literal["plain", "se"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
BASE = "plain-eager"
_BOTH: tuple[Mode, ...] = ("train", "inference")


@dataclass(frozen=True)
class Candidate:
    """One network on one engine.

    Attributes:
        name: its name for ``--candidates``.
        network: which of the twins it runs.
        twin: the plain network's candidate on the same engine; None for plain candidates.
        home: the engine: ``"torch"``, ``"accelerated"`` (``senet.accelerate``), or a peer.
        backend: the backend of what is accelerated (``senet.use_backend``); ``"reference"`` is plain PyTorch.
        compiled: whether it runs under ``torch.compile``, with Inductor's freezing for inference.
        graphs: whether it runs on CUDA graphs; it is left out elsewhere.
        modes: the modes in which it is measured.
        float32_only: whether it runs only in float32, as exported networks do.
    """

    name: str
    network: Network
    twin: str | None = None
    home: Literal["torch", "accelerated", "timm", "onnxruntime", "openvino"] = "torch"
    backend: str = "reference"
    compiled: bool = False
    graphs: bool = False
    modes: tuple[Mode, ...] = _BOTH
    float32_only: bool = False


_EXPORTED: dict[str, Any] = {"modes": ("inference",), "float32_only": True}
_FAST: dict[str, Any] = {"home": "accelerated", "backend": "auto"}
_GRAPHS: dict[str, Any] = {**_FAST, "modes": ("inference",)}
CANDIDATES = {
    candidate.name: candidate
    for candidate in (
        Candidate(BASE, "plain"),
        Candidate("plain-compiled", "plain", compiled=True),
        Candidate("se-reference", "se", BASE),
        Candidate("se-compiled", "se", "plain-compiled", compiled=True),
        # The fair twin: isolates the cost of SE, as accelerate makes the plain network faster, too.
        Candidate("plain-accelerated", "plain", **_FAST),
        Candidate("se-accelerated", "se", "plain-accelerated", **_FAST),
        # With CUDA graphs, as compiled candidates have at inference.
        Candidate("se-accelerated-graphs", "se", "plain-compiled", graphs=True, **_GRAPHS),
        # Inside a compiled module.
        Candidate("se-accelerated-compiled", "se", "plain-compiled", compiled=True, **_FAST),
        Candidate("timm-plain", "plain", home="timm"),
        Candidate("timm-se", "se", "timm-plain", home="timm"),
        Candidate("timm-plain-compiled", "plain", home="timm", compiled=True),
        Candidate("timm-se-compiled", "se", "timm-plain-compiled", home="timm", compiled=True),
        Candidate("onnxruntime-plain", "plain", home="onnxruntime", **_EXPORTED),
        Candidate("onnxruntime-se", "se", "onnxruntime-plain", home="onnxruntime", **_EXPORTED),
        Candidate("openvino-plain", "plain", home="openvino", **_EXPORTED),
        Candidate("openvino-se", "se", "openvino-plain", home="openvino", **_EXPORTED),
    )
}


def choose(patterns: Sequence[str]) -> tuple[str, ...]:
    """The candidates that match shell patterns, in the order of ``CANDIDATES``, with their twins and plain eager.

    Raises:
        InputError: a pattern matches no candidate.
    """
    chosen = {BASE}
    for pattern in patterns:
        found = fnmatch.filter(CANDIDATES, pattern)
        if not found:
            raise InputError(f"--candidates: nothing matches {pattern!r}; there are {', '.join(CANDIDATES)}")
        chosen.update(found)
    chosen |= {CANDIDATES[name].twin or BASE for name in chosen}
    return tuple(name for name in CANDIDATES if name in chosen)


@dataclass(frozen=True)
class Setting:
    """One configuration; all its candidates are timed in one interleaved run.

    Attributes:
        model: the SE network's registered name.
        mode: ``"train"`` (a full step of SGD with momentum) or ``"inference"``.
        batch, size: number of images, and their side in pixels.
        dtype: the dtype of the feature maps. Training uses mixed precision (autocast, float32 parameters), inference
            casts the network.
        layout: ``"channels_last"`` or ``"contiguous"``.
        device: ``"cpu"`` or ``"cuda"``.
        rounds, candidates: the number of timing rounds, and the names of the candidates.
    """

    model: str
    mode: Mode
    batch: int
    size: int
    dtype: str = "float32"
    layout: str = "channels_last"
    device: str = "cpu"
    rounds: int = 15
    candidates: tuple[str, ...] = tuple(CANDIDATES)


@dataclass(frozen=True)
class Twins:
    """The plain network and its SE twin in float32, with the same initial values, and one batch."""

    networks: dict[Network, nn.Module]
    names: dict[Network, str]
    x: Tensor
    y: Tensor
    _onnx: dict[Network, bytes] = field(default_factory=dict)

    def onnx(self, network: Network) -> bytes:
        """A network in evaluation mode as ONNX, exported only once."""
        if network not in self._onnx:
            self._onnx[network] = peers.onnx_bytes(self.networks[network].eval(), self.x)
        return self._onnx[network]


@dataclass(frozen=True)
class Runner:
    """A candidate ready to run: ``run`` performs one timed step and returns the logits of the batch, (N, classes)."""

    run: Callable[[], Tensor]
    model: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None


def make_twins(setting: Setting) -> Twins:
    """Both networks from the same seed, with settled batch statistics; without them, rounding errors explode."""
    spec = model_spec(setting.model)
    if spec.se is None:
        raise InputError(f"{setting.model!r} is a plain network; choose its SE twin {spec.twin!r}")
    names: dict[Network, str] = {"plain": spec.twin, "se": spec.name}
    classes = 10 if spec.input_size == 32 else 1000
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(setting.batch, 3, setting.size, setting.size, generator=generator)
    y = torch.randint(classes, (setting.batch,), generator=generator)
    x = x.to(setting.device, memory_format=LAYOUTS[setting.layout])
    networks = {}
    for network, name in names.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = create_model(name, classes).to(setting.device)
        model = model.to(memory_format=LAYOUTS[setting.layout])
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # random outputs cannot be compared
        settle(model, x)
        networks[network] = model
    return Twins(networks, names, x, y.to(setting.device))


def settle(model: nn.Module, x: Tensor) -> None:
    """Set all running statistics to those of a batch like ``x`` (2 to 8 images)."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad(), use_backend("reference"):
        model.train()(x[:8] if len(x) > 1 else torch.cat((x, x.flip(3))))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def precision(setting: Setting) -> AbstractContextManager[object]:
    """Autocast for training in a 16-bit dtype, otherwise no context."""
    if setting.mode == "train" and setting.dtype != "float32":
        return torch.autocast(setting.device, DTYPES[setting.dtype])
    return nullcontext()


def build(candidate: Candidate, setting: Setting, twins: Twins) -> Runner:
    """Prepare a candidate.

    Raises:
        peers.NotHere: the peer is not installed, or does not support the network.
    """
    if candidate.float32_only:
        if setting.dtype != "float32":
            raise peers.NotHere("measured in float32 only")
        return Runner(peers.ENGINES[candidate.home](lambda: twins.onnx(candidate.network), twins.x))
    model = copy.deepcopy(twins.networks[candidate.network])
    if candidate.home == "timm":
        model = peers.timm_network(twins.names[candidate.network], model)
    model.train(setting.mode == "train")
    if setting.mode == "inference":
        model = model.to(DTYPES[setting.dtype])
    if candidate.home == "accelerated":
        if candidate.graphs and not twins.x.is_cuda:
            raise peers.NotHere("CUDA graphs need a CUDA device")
        mode = "reduce-overhead" if candidate.graphs else None
        model = accelerate(model, backend=candidate.backend, mode=mode)
    if setting.mode == "inference":
        return Runner(_inference(model, candidate, twins.x.to(DTYPES[setting.dtype])), model)
    # A learning rate of 0 takes the same time and keeps the weights of all candidates equal over any number of steps.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    return Runner(_train_step(model, optimizer, candidate, setting, twins), model, optimizer)


def _inference(model: nn.Module, candidate: Candidate, x: Tensor) -> Callable[[], Tensor]:
    graphs = (candidate.compiled or candidate.graphs) and x.is_cuda
    forward: Callable[[Tensor], Tensor] = model

    def run() -> Tensor:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()  # the output of the last call is no longer in use
        with torch.no_grad(), use_backend(candidate.backend):
            return forward(x)

    if candidate.compiled:
        # The best settings: folded constants, and CUDA graphs, because launches dominate the time of small batches.
        # An accelerated network folds its own.
        best: dict[str, Any] = {"freezing": candidate.home != "accelerated", "triton.cudagraphs": graphs}
        forward = torch.compile(model, dynamic=False, options=best)
        # The option reaches only the code generator. The tracer, which must treat parameters as constants, reads the
        # configuration; without the patch, nothing would be folded.
        with inductor_config.patch(freezing=best["freezing"]):
            run()
    return run


def _train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, candidate: Candidate, setting: Setting, twins: Twins
) -> Callable[[], Tensor]:
    forward = torch.compile(model, dynamic=False) if candidate.compiled else model

    def run() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with use_backend(candidate.backend):
            with precision(setting):
                logits = forward(twins.x)
                loss = F.cross_entropy(logits, twins.y)
            loss.backward()
        optimizer.step()
        return logits.detach()

    return run
