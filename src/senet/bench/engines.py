"""Other people's engines for the same network and the same weights; each is imported only when it is asked for."""

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

# senet → timm where both build the same network with the same parameter names.
TIMM = {
    **{f"resnet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)},
    **{f"se_resnet{depth}": f"seresnet{depth}" for depth in (18, 34, 50, 101, 152)},
    **{f"resnext{depth}_32x4d": f"resnext{depth}_32x4d" for depth in (50, 101)},
    **{f"se_resnext{depth}_32x4d": f"seresnext{depth}_32x4d" for depth in (50, 101)},
    "senet154": "senet154",
}


class NotHere(Exception):  # noqa: N818 - a peer that is absent is no error
    """A peer that cannot take part; the message says why, or what to install."""


def _needed(module: str, *packages: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise NotHere(f"not installed: pip install {' '.join(packages or (module,))}") from error


def timm_network(name: str, ours: nn.Module) -> nn.Module:
    """timm's network of the same architecture, with the weights, device and layout of ``ours``."""
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
    """The network as ONNX, exported for the shape of ``x`` from plain PyTorch operations."""
    _needed("onnxscript", "onnx", "onnxscript")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter's own deprecations: nothing a user can act on
        with torch.no_grad(), use_backend("reference"):
            program = torch.onnx.export(model, (x.contiguous(),), dynamo=True)
    assert program is not None
    return program.model_proto.SerializeToString()


def onnxruntime_run(onnx: Callable[[], bytes], x: Tensor) -> Callable[[], Tensor]:
    """ONNX Runtime on the processor, with as many threads as PyTorch uses."""
    runtime = _needed("onnxruntime", "onnxruntime", "onnx", "onnxscript")
    if x.is_cuda:
        raise NotHere("measured on the processor only")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Its idle threads would otherwise go on spinning and slow whoever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.InferenceSession(onnx(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.contiguous().numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino_run(onnx: Callable[[], bytes], x: Tensor) -> Callable[[], Tensor]:
    """OpenVINO on the processor, float32, with as many threads as PyTorch uses, tuned for latency."""
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
