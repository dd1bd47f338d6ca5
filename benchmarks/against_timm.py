"""Our `se_resnet50` against timm's `seresnet50` with the same weights: training step and inference, interleaved.

Both plain `resnet50` networks are timed, too, to show the SE tax of each library. Correctness comes first: the logits
must agree to 1e-5, or nothing is timed. Target: at most 1.03 of timm's time.
"""

import argparse
import sys
from collections.abc import Callable

import timm
import torch
from common import append_row
from torch import nn

import senet
from senet.system.timing import interleaved, ratio

TARGET = 1.03


def train_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def inference(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        with torch.inference_mode():
            model(x)

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--contiguous", action="store_true", help="use NCHW instead of channels_last")
    args = parser.parse_args()
    torch.manual_seed(0)
    layout = torch.contiguous_format if args.contiguous else torch.channels_last
    x = torch.randn(args.batch, 3, args.size, args.size).to(memory_format=layout)
    y = torch.randint(1000, (args.batch,))
    models = {
        "senet se_resnet50": senet.create_model("se_resnet50"),
        "timm seresnet50": timm.create_model("seresnet50"),
        "senet resnet50": senet.create_model("resnet50"),
        "timm resnet50": timm.create_model("resnet50"),
    }
    models = {name: model.to(memory_format=layout) for name, model in models.items()}
    for ours, theirs in (("senet se_resnet50", "timm seresnet50"), ("senet resnet50", "timm resnet50")):
        models[theirs].load_state_dict(models[ours].state_dict(), strict=True)
        with torch.inference_mode():
            a, b = models[ours].eval()(x), models[theirs].eval()(x)
        difference = ((a - b).abs().max() / b.abs().max()).item()
        print(f"{ours}: logits differ from {theirs} by {difference:.1e} relative")
        if not difference < 1e-5:
            print("the networks do not agree; nothing is timed", file=sys.stderr)
            return 1
    for mode in ("inference", "train step"):
        for model in models.values():
            model.train(mode == "train step")
        make = (lambda m: train_step(m, x, y)) if mode == "train step" else (lambda m: inference(m, x))
        times = interleaved({name: make(model) for name, model in models.items()}, rounds=args.rounds)
        for numerator, denominator in (
            ("senet se_resnet50", "timm seresnet50"),
            ("senet se_resnet50", "senet resnet50"),
            ("timm seresnet50", "timm resnet50"),
        ):
            r = ratio(times[numerator], times[denominator])
            target = TARGET if denominator == "timm seresnet50" else ""
            print(f"{mode:10s}  {numerator} ÷ {denominator}: {r.median:.3f} (quartiles {r.q25:.3f}–{r.q75:.3f})")
            append_row(
                "against_timm.csv",
                timm=timm.__version__,
                mode=mode,
                numerator=numerator,
                denominator=denominator,
                batch=args.batch,
                size=args.size,
                dtype="float32",
                layout="NCHW" if args.contiguous else "channels_last",
                rounds=args.rounds,
                ratio=f"{r.median:.4f}",
                q25=f"{r.q25:.4f}",
                q75=f"{r.q75:.4f}",
                target=target,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
