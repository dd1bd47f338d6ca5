"""The complexity that the paper prints (arXiv 1709.01507 v4), and the network that represents each row.

Figures are stored as printed, because the last digit shows their precision. The errors come from the same tables:
percent of ImageNet's validation images, with one center crop of 224 pixels (299 for Inception-ResNet-v2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from senet.nn.squeeze_excite import SEConfig

Quantity = Literal["gflops", "mflops", "params_m", "added_m", "added_percent", "file_mib"]


@dataclass(frozen=True)
class Row:
    """One row of a published table, or one network of a table with several networks per row.

    Attributes:
        table: where the row is printed.
        name: the network's name in the paper.
        model: the registered network that represents it.
        printed: figures as printed, by quantity. ``gflops`` and ``mflops`` are multiply-adds, ``params_m`` is millions
            of parameters, ``added_m`` and ``added_percent`` are the weights that SE adds, in millions and relative to
            the plain network, and ``file_mib`` is the size of the released file in MiB.
        se: replaces the model's own configuration, unless None.
        counts_statistics: whether ``params_m`` includes batch norm's running statistics, as in the ablations.
        errors: top-1 and top-5 error as printed, in percent.
        notes: why our count differs from the printed figure, by quantity.
    """

    table: str
    name: str
    model: str
    printed: dict[Quantity, str]
    se: SEConfig | None = None
    counts_statistics: bool = True
    errors: tuple[float, float] | None = None
    notes: dict[Quantity, str] = field(default_factory=dict)


_INCEPTION_RESNET = (
    "not reproduced: the common definition (timm and TensorFlow-Slim, whose weights were released) has 13.16, "
    "with SE 13.18; the paper does not say which definition it used"
)
_SHUFFLENET_MFLOPS = (
    "not reproduced: 140 is a round figure for this width, whose networks have 134 to 143 with one to eight groups; "
    "three groups have 137.5, with SE 139.7; the increase of 2 from SE is reproduced"
)
_SHUFFLENET_PARAMS = "not reproduced by rounding: the printed figure is ours, truncated after the first decimal"
_R8 = (
    "not reproduced: 30.64 without FC biases, which is how the paper describes the ablations; 30.66 with them would "
    "fit, but r = 2 fits only without"
)

_V1 = "resnet50_v1"

# Table 2, "re-implementation" and "SENet": GFLOPs, top-1 and top-5 error.
_TABLE_2 = (
    ("ResNet-50", _V1, ("3.86", 24.80, 7.48), ("3.87", 23.29, 6.62)),
    ("ResNet-101", "resnet101_v1", ("7.58", 23.17, 6.52), ("7.60", 22.38, 6.07)),
    ("ResNet-152", "resnet152_v1", ("11.30", 22.42, 6.34), ("11.32", 21.57, 5.73)),
    ("ResNeXt-50", "resnext50_32x4d", ("4.24", 22.11, 5.90), ("4.25", 21.10, 5.49)),
    ("ResNeXt-101", "resnext101_32x4d", ("7.99", 21.18, 5.57), ("8.00", 20.70, 5.01)),
    ("VGG-16", "vgg16_bn", ("15.47", 27.02, 8.81), ("15.48", 25.22, 7.70)),
    ("BN-Inception", "bn_inception", ("2.03", 25.38, 7.89), ("2.04", 24.23, 7.14)),
    ("Inception-ResNet-v2", "inception_resnet_v2", ("11.75", 20.37, 5.21), ("11.76", 19.80, 4.79)),
)


def _table_2() -> list[Row]:
    rows = []
    for name, model, plain, se in _TABLE_2:
        notes: dict[Quantity, str] = {"gflops": _INCEPTION_RESNET} if model == "inception_resnet_v2" else {}
        for prefix, key, (gflops, *errors) in (("", "", plain), ("SE-", "se_", se)):
            top1, top5 = errors
            rows.append(
                Row("Table 2", prefix + name, key + model, {"gflops": gflops}, errors=(top1, top5), notes=notes)
            )
    return rows


# Table 3: MFLOPs, millions of parameters, errors. Running statistics are not counted: MobileNet's 4.2 is the figure of
# its own paper; with them, it would be 4.25, printed as 4.3.
_TABLE_3 = (
    ("MobileNet", "mobilenet_v1", ("569", "4.2"), (28.4, 9.4)),
    ("SE-MobileNet", "se_mobilenet_v1", ("572", "4.7"), (25.3, 7.7)),
    ("ShuffleNet", "shufflenet_v1_g3", ("140", "1.8"), (32.6, 12.5)),
    ("SE-ShuffleNet", "se_shufflenet_v1_g3", ("142", "2.4"), (31.0, 11.1)),
)


def _table_3() -> list[Row]:
    rows = []
    for name, model, (mflops, params), errors in _TABLE_3:
        notes: dict[Quantity, str] = {}
        if "shufflenet" in model:
            notes = {"mflops": _SHUFFLENET_MFLOPS, "params_m": _SHUFFLENET_PARAMS}
        printed: dict[Quantity, str] = {"mflops": mflops, "params_m": params}
        rows.append(Row("Table 3", name, model, printed, counts_statistics=False, errors=errors, notes=notes))
    return rows


def _ablation(
    table: str, name: str, params_m: str, errors: tuple[float, float], gflops: str | None = None, **se: Any
) -> Row:
    """A ResNet-50 of the ablations; ``se`` holds the SE block's arguments, none for the plain network."""
    printed: dict[Quantity, str] = {"params_m": params_m}
    if gflops is not None:
        printed = {"gflops": gflops, "params_m": params_m}
    notes: dict[Quantity, str] = {"params_m": _R8} if se == {"reduction": 8} else {}
    model, config = (f"se_{_V1}", SEConfig(bias=False, **se)) if se else (_V1, None)  # section 6: no biases in the FCs
    return Row(table, name, model, printed, config, errors=errors, notes=notes)


_PLAIN, _SE = (23.30, 6.55), (22.28, 6.03)

_ABLATIONS = (
    _ablation("Table 10", "r = 2", "45.7", (22.29, 6.00), reduction=2),
    _ablation("Table 10", "r = 4", "35.7", (22.25, 6.09), reduction=4),
    _ablation("Table 10", "r = 8", "30.7", (22.26, 5.99), reduction=8),
    _ablation("Table 10", "r = 16", "28.1", _SE, reduction=16),
    _ablation("Table 10", "r = 32", "26.9", (22.72, 6.20), reduction=32),
    _ablation("Table 10", "original", "25.6", _PLAIN),
    _ablation("Table 13", "ResNet-50", "25.6", _PLAIN, "3.86"),
    _ablation("Table 13", "SE_Stage_2", "25.6", (23.03, 6.48), "3.86", stages=(2,)),
    _ablation("Table 13", "SE_Stage_3", "25.7", (23.04, 6.32), "3.86", stages=(3,)),
    _ablation("Table 13", "SE_Stage_4", "26.4", (22.68, 6.22), "3.86", stages=(4,)),
    _ablation("Table 13", "SE_All", "28.1", _SE, "3.87", stages=(2, 3, 4, 5)),
    _ablation("Table 15", "SE", "28.1", _SE, "3.87", placement="standard"),
    _ablation("Table 15", "SE_3×3", "25.8", (22.48, 6.02), "3.86", placement="3x3"),
    _ablation("Table 16", "ResNet-50", "25.6", _PLAIN, "3.86"),
    _ablation("Table 16", "NoSqueeze", "28.1", (22.93, 6.39), "4.27", squeeze="none"),
    _ablation("Table 16", "SE", "28.1", _SE, "3.87", squeeze="avg"),
)

# Released models (the authors' repository): file size and errors. Neither the paper nor the repository gives the
# parameters or FLOPs of SENet-154.
_RELEASED = (
    ("SE-BN-Inception", "se_bn_inception", "46", (23.62, 7.04)),
    ("SE-ResNet-50", "se_resnet50_v1", "107", (22.37, 6.36)),
    ("SE-ResNet-101", "se_resnet101_v1", "189", (21.75, 5.72)),
    ("SE-ResNet-152", "se_resnet152_v1", "256", (21.34, 5.54)),
    ("SE-ResNeXt-50", "se_resnext50_32x4d", "105", (20.97, 5.54)),
    ("SE-ResNeXt-101", "se_resnext101_32x4d", "187", (19.81, 4.96)),
    ("SENet-154", "senet154", "440", (18.68, 4.47)),
)

ROWS: tuple[Row, ...] = (
    *_table_2(),
    *_table_3(),
    *_ABLATIONS,
    Row("section 4", "SE-ResNet-50", f"se_{_V1}", {"added_m": "2.5", "added_percent": "10"}, SEConfig(bias=False)),
    Row(
        "section 4",
        "SE-ResNet-50, stages 2–4",
        f"se_{_V1}",
        {"added_percent": "4"},
        SEConfig(bias=False, stages=(2, 3, 4)),
    ),
    *(Row("released", name, model, {"file_mib": size}, errors=errors) for name, model, size, errors in _RELEASED),
)
