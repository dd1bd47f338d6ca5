"""SE networks of other libraries before and after `senet.accelerate`, in one interleaved run per row.

For inference, "before" is the ordinary network in the faster of PyTorch's two layouts, eager or under `torch.compile`
with Inductor's freezing; "after" is the accelerated network on the same engine. Training is a complete step of SGD.
Correctness comes first: the logits must agree, or nothing is timed. The first call, in which the network is captured,
is timed by itself, once `torch.compile` is loaded. `--projections` times both ways to apply a gate
before a 1×1 convolution: to the feature map, or to the weights of the convolution.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
from common import append_row
from torch import Tensor, nn
from torch._inductor import config as inductor_config

import senet
from senet.ops.conv import native_gate as native
from senet.ops.conv.native import PackedConv2d
from senet.system.timing import Timing, interleaved, ratio

MODELS = (
    "timm:seresnet50",
    "timm:seresnext50_32x4d",
    "timm:legacy_seresnet50",
    "timm:legacy_seresnext50_32x4d",
    "timm:senet154",
    "timm:regnety_016",
    "timm:efficientnet_b0",
    "timm:mobilenetv3_large_100",
    "torchvision:efficientnet_b0",
    "torchvision:mobilenet_v3_large",
    "torchvision:regnet_y_1_6gf",
    "attached:resnet50",
)
DISTURBED = 1.25  # rows with a larger upper ÷ lower quartile are discarded: something else was running
AGREE = 1e-4  # for untrained networks in float32, which amplify rounding; the tests require 1e-5 and use float64
Step = Callable[[], object]


def network(name: str) -> nn.Module:
    """``timm:…``, ``torchvision:…``, or ``attached:…``, which is torchvision's with our gates attached."""
    source, _, model = name.partition(":")
    torch.manual_seed(0)
    if source == "timm":
        return timm.create_model(model)
    made = getattr(torchvision.models, model)()
    if source == "attached":
        senet.attach(made, senet.SEConfig(), example_input=torch.randn(1, 3, 64, 64))
    return made


def compiled(model: nn.Module) -> Any:
    inductor_config.freezing = True
    return torch.compile(model)


def inference_steps(model: nn.Module, x: Tensor, engine: str) -> dict[str, Step]:
    fast = senet.accelerate(model.eval())
    last = copy.deepcopy(model).to(memory_format=torch.channels_last).eval()
    x_last = x.contiguous(memory_format=torch.channels_last)
    if engine == "compiled":
        pairs = {"before, channels_last": (compiled(last), x_last), "after": (compiled(fast), x_last)}
    else:
        pairs = {"before, NCHW": (model, x), "before, channels_last": (last, x_last), "after": (fast, x_last)}

    def step(net: Any, images: Tensor) -> Step:
        def run() -> Tensor:
            with torch.no_grad():
                return net(images)  # type: ignore[no-any-return]

        return run

    return {name: step(*pair) for name, pair in pairs.items()}


def train_steps(model: nn.Module, x: Tensor) -> dict[str, Step]:
    model = model.train().to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.arange(len(x))

    def step(net: nn.Module) -> Step:
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)

        def run() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            out = net(x)
            nn.functional.cross_entropy(out, y).backward()
            optimizer.step()
            return out.detach()  # type: ignore[no-any-return]

        return run

    return {"before, channels_last": step(model), "after": step(senet.accelerate(model))}


def first_calls(steps: dict[str, Step]) -> tuple[bool, dict[str, float]]:
    """Whether the outputs agree, and the seconds of each first call, in which networks are captured and compiled."""
    outputs: list[Any] = []
    seconds = {}
    for name, step in steps.items():
        torch.manual_seed(0)  # the same dropout masks in training
        start = time.perf_counter()
        outputs.append(step())
        seconds[name] = time.perf_counter() - start
    agree = all(((out - outputs[0]).abs().max() / outputs[0].abs().max()).item() < AGREE for out in outputs)
    return agree, seconds


def record(
    name: str, what: str, engine: str, batch: int, times: dict[str, Timing], rounds: int, size: int, first: float
) -> None:
    before = min((n for n in times if n != "after"), key=lambda n: times[n].median)
    r = ratio(times["after"], times[before])
    milliseconds = {n: f"{1e3 * t.median:.2f}" for n, t in times.items()}
    print(f"{name} {what} {engine} batch {batch}: {r.median:.3f} ({r.q25:.3f}–{r.q75:.3f}) {milliseconds}", flush=True)
    if r.q75 / r.q25 > DISTURBED:
        print("too noisy to record; run it again", file=sys.stderr)
        return
    values = {"model": name, "what": what, "engine": engine, "batch": batch, "size": size, "rounds": rounds}
    spread = {"ratio": f"{r.median:.4f}", "q25": f"{r.q25:.4f}", "q75": f"{r.q75:.4f}"}
    taken = {"ms_before": milliseconds[before], "ms_after": milliseconds["after"], "first_call_s": f"{first:.2f}"}
    append_row("accelerate.csv", timm=timm.__version__, **values, denominator=before, **spread, **taken)


def projections(rounds: int) -> None:
    """A gate before a 1×1 convolution C → O: scale the feature map in place, or the weights for each image."""
    shapes = ((32, 16, 112), (96, 24, 56), (144, 40, 28), (480, 112, 14), (784, 784, 7), (1152, 320, 7))
    for batch in (1, 8):
        for c, o, side in shapes:
            x = torch.randn(batch, c, side, side).contiguous(memory_format=torch.channels_last)
            weight, bias, gate = torch.randn(o, c, 1, 1) / c**0.5, torch.randn(o), torch.rand(batch, c)
            conv = PackedConv2d(weight, bias, [1, 1], [0, 0], [1, 1], 1, "none", [])
            times = interleaved(projection_steps(x, weight.flatten(1), bias, gate, conv), rounds, warmup=5)
            r = ratio(times["weights"], times["map"])
            print(
                f"{c} → {o}, {side}², batch {batch}: weights ÷ map {r.median:.2f} ({r.q25:.2f}–{r.q75:.2f})", flush=True
            )
            shape = {"channels": c, "outputs": o, "side": side, "batch": batch, "rounds": rounds}
            spread = {"ratio": f"{r.median:.4f}", "q25": f"{r.q25:.4f}", "q75": f"{r.q75:.4f}"}
            append_row("projections.csv", **shape, **spread)


def projection_steps(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, conv: Any) -> dict[str, Step]:
    own = x.clone()  # scaled repeatedly; only the time matters

    def by_map() -> Tensor:
        return conv(native.gated_sum_(own, gate, None, False))  # type: ignore[no-any-return]

    def by_weights() -> Tensor:
        rows = x.permute(0, 2, 3, 1).flatten(1, 2)
        if len(x) == 1:
            return torch.addmm(bias, rows[0], (weight * gate).t())
        return torch.baddbmm(bias, rows, (weight * gate[:, None]).transpose(1, 2))

    return {"map": by_map, "weights": by_weights}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--what", nargs="*", default=["inference", "train"], choices=["inference", "train"])
    parser.add_argument("--engines", nargs="*", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dry-run", action="store_true", help="run each candidate once, to fill the compiler's cache")
    parser.add_argument("--projections", action="store_true")
    args = parser.parse_args()
    if args.projections:
        projections(args.rounds)
        return 0
    torch.compile(nn.Identity(), backend="eager")(torch.zeros(1))  # loads the compiler, which takes seconds once
    for name in args.models:
        for what in args.what:
            for engine in args.engines if what == "inference" else ["eager"]:
                for batch in args.batch if what == "inference" else [max(args.batch)]:
                    model, x = network(name), torch.randn(batch, 3, args.size, args.size)
                    steps = inference_steps(model, x, engine) if what == "inference" else train_steps(model, x)
                    agree, seconds = first_calls(steps)
                    if not agree:
                        print(f"{name}: the outputs before and after do not agree; nothing is timed", file=sys.stderr)
                        return 1
                    if not args.dry_run:
                        times = interleaved(steps, args.rounds)
                        record(name, what, engine, batch, times, args.rounds, args.size, seconds["after"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
