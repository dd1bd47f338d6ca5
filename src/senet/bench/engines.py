"""Other engines for the same network and weights; each is imported only when needed."""

from __future__ import annotations

import importlib
import io
import logging
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from senet.ops.dispatch import use_backend

# senet → timm, for networks that both libraries build with the same parameter names.
TIMM = {
    **{f"resnet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)},
    **{f"se_resnet{depth}": f"seresnet{depth}" for depth in (18, 34, 50, 101, 152)},
    **{f"resnext{depth}_32x4d": f"resnext{depth}_32x4d" for depth in (50, 101)},
    **{f"se_resnext{depth}_32x4d": f"seresnext{depth}_32x4d" for depth in (50, 101)},
    "senet154": "senet154",
}


class NotHere(Exception):  # noqa: N818 - a missing peer is not an error
    """A peer that cannot run; the message says why, or what to install."""


def _needed(module: str, *packages: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise NotHere(f"not installed: pip install {' '.join(packages or (module,))}") from error


def timm_network(name: str, ours: nn.Module) -> nn.Module:
    """timm's network of the same architecture, with the weights, device, and memory layout of ``ours``."""
    timm = _needed("timm")
    if name not in TIMM:
        raise NotHere(f"timm has no twin of {name}")
    reference = next(p for p in ours.parameters() if p.ndim == 4 and p.shape[2] > 1)
    layout = torch.channels_last if reference.is_contiguous(memory_format=torch.channels_last) else None
    classes = ours.get_parameter("fc.weight").shape[0]
    theirs = timm.create_model(TIMM[name], num_classes=classes).to(reference.device)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs.to(memory_format=layout or torch.contiguous_format)


def onnx_bytes(model: nn.Module, x: Tensor) -> bytes:
    """The network as ONNX, exported from plain PyTorch operations for the shape of ``x``."""
    _needed("onnxscript", "onnx", "onnxscript")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter's own deprecation warnings, which no user can act on
        with torch.no_grad(), use_backend("reference"):
            program = torch.onnx.export(model, (x.contiguous(),), dynamo=True)
    assert program is not None
    return program.model_proto.SerializeToString()


def onnxruntime_run(onnx: Callable[[], bytes], x: Tensor) -> Callable[[], Tensor]:
    """ONNX Runtime on the CPU, with as many threads as PyTorch uses."""
    runtime = _needed("onnxruntime", "onnxruntime", "onnx", "onnxscript")
    if x.is_cuda:
        raise NotHere("measured on the processor only")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Otherwise, its idle threads keep spinning and slow down the next candidate.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.InferenceSession(onnx(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.contiguous().numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino_run(onnx: Callable[[], bytes], x: Tensor) -> Callable[[], Tensor]:
    """OpenVINO on the CPU in float32, tuned for latency, with as many threads as PyTorch uses."""
    openvino = _needed("openvino", "openvino", "onnx", "onnxscript")
    if x.is_cuda:
        raise NotHere("measured on the processor only")
    core = openvino.Core()
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = core.compile_model(core.read_model(onnx()), "CPU", config).create_infer_request()
    feed = [x.contiguous().numpy()]
    return lambda: torch.from_numpy(request.infer(feed, share_inputs=True)[0])


ENGINES: dict[str, Callable[[Callable[[], bytes], Tensor], Callable[[], Tensor]]] = {
    "onnxruntime": onnxruntime_run,
    "openvino": openvino_run,
}
