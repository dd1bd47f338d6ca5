"""Every complexity that the paper prints, beside ours; and an independent count where a figure cannot be reproduced."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers.messages import assert_said, one_line
from senet import SEConfig
from senet.cost.count import model_cost
from senet.cost.paper import compared, rows_of
from senet.cost.published import ROWS
from senet.errors import InputError

FIGURES = [(row, quantity) for row in ROWS for quantity in row.printed]
NOT_REPRODUCED = {
    ("Table 2", "Inception-ResNet-v2", "gflops"): "common definition",
    ("Table 2", "SE-Inception-ResNet-v2", "gflops"): "common definition",
    ("Table 3", "ShuffleNet", "mflops"): "round figure",
    ("Table 3", "ShuffleNet", "params_m"): "truncated",
    ("Table 3", "SE-ShuffleNet", "mflops"): "round figure",
    ("Table 3", "SE-ShuffleNet", "params_m"): "truncated",
    ("Table 10", "r = 8", "params_m"): "biases",
}


@pytest.fixture(scope="module")
def figures():
    return {(figure.row.table, figure.row.name, figure.quantity): figure for figure in compared()}


@pytest.mark.parametrize(("row", "quantity"), FIGURES, ids=[f"{row.table}-{row.name}-{q}" for row, q in FIGURES])
def test_each_published_figure(row, quantity, figures):
    key = (row.table, row.name, quantity)
    figure, printed = figures[key], row.printed[quantity]
    digits = len(printed.partition(".")[2])
    off = abs(round(figure.ours, digits) - float(printed))
    # GFLOPs within 0.02 and a file within 1 MiB, everything else to the printed digit
    close = off <= {"gflops": 0.02, "file_mib": 1}.get(quantity, 0) + 1e-9
    assert figure.agrees == close
    assert close == (key not in NOT_REPRODUCED), f"{key}: {figure.ours} beside {printed}"
    assert bool(figure.note) == (key in NOT_REPRODUCED)
    assert NOT_REPRODUCED.get(key, "") in figure.note


def test_all_tables_are_here_and_the_list_of_exceptions_is_of_this_paper(figures):
    tables = [row.table for row, _ in FIGURES]
    expected = {"Table 2": 16, "Table 3": 8, "Table 10": 6, "Table 13": 10, "Table 15": 4, "Table 16": 6}
    assert {table: tables.count(table) for table in tables} == expected | {"section 4": 3, "released": 7}
    assert NOT_REPRODUCED.keys() <= figures.keys()
    assert len(figures) == len(FIGURES)
    assert all(0 < top5 < top1 < 40 for row in ROWS if row.errors for top1, top5 in [row.errors])


def test_what_fixes_the_convention_of_multiply_adds():
    """Poolings are counted and scalings are not: only so both SE-VGG-16's and SE-MobileNet's figures come out."""
    vgg, mobile = model_cost("se_vgg16_bn"), model_cost("se_mobilenet_v1")
    assert f"{vgg.mult_adds / 1e9:.2f}" == "15.47"
    assert f"{vgg.paper_mult_adds / 1e9:.2f}" == "15.48"
    assert f"{mobile.mult_adds / 1e6:.0f}" == "569"
    assert f"{mobile.paper_mult_adds / 1e6:.0f}" == "572"
    assert f"{(mobile.paper_mult_adds + mobile.scale_mults) / 1e6:.0f}" == "575"
    # SE-ResNet-50: the poolings are a value for each output of its 16 blocks
    maps = 3 * 256 * 56**2 + 4 * 512 * 28**2 + 6 * 1024 * 14**2 + 3 * 2048 * 7**2
    assert model_cost("se_resnet50_v1").squeeze_adds == maps


def test_what_fixes_the_convention_of_parameters():
    """Running statistics are counted in the ablations, where three figures fit only so."""
    for changes, printed, without in (
        ({"stages": (4,)}, "26.4", "26.3"),
        ({"placement": "3x3"}, "25.8", "25.7"),
        ({"reduction": 32}, "26.9", "26.8"),
    ):
        cost = model_cost("resnet50_v1", se=SEConfig(bias=False, **changes))
        assert (f"{cost.params_with_statistics / 1e6:.1f}", f"{cost.params / 1e6:.1f}") == (printed, without)


def test_inception_resnet_v2_is_counted_as_timm_defines_it(figures):
    with torch.device("meta"):
        theirs, x = timm.create_model("inception_resnet_v2").eval(), torch.zeros(1, 3, 299, 299)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        theirs(x)
    plain = counter.get_total_flops() / 2
    assert figures["Table 2", "Inception-ResNet-v2", "gflops"].ours == pytest.approx(plain / 1e9, rel=1e-12)
    gates = [(320, 35)] * 10 + [(1088, 17)] * 20 + [(2080, 8)] * 10  # channels and sides of the 40 blocks
    added = sum(2 * c * (c // 16) + c * side**2 for c, side in gates)
    ours = figures["Table 2", "SE-Inception-ResNet-v2", "gflops"].ours
    assert ours == pytest.approx((plain + added) / 1e9, rel=1e-12)
    note = figures["Table 2", "SE-Inception-ResNet-v2", "gflops"].note
    assert_said(note, f"{plain / 1e9:.2f} … {ours:.2f}")


def shufflenet(groups, channels, se):
    """(multiply-adds with SE's poolings, parameters) of ShuffleNet at width 1, from Table 1 and Fig. 2 of its paper."""
    pixels, width = 112**2, 24
    madds, params = 3 * 9 * width * pixels, 3 * 9 * width + 2 * width
    pixels //= 4
    for stage, (out, units) in enumerate(zip(channels, (4, 8, 4), strict=True)):
        for unit in range(units):
            branch = out - width if unit == 0 else out
            inside = out // 4
            first = width * inside // (1 if (stage, unit) == (0, 0) else groups)
            after = pixels // 4 if unit == 0 else pixels
            last = inside * branch // groups
            madds += first * pixels + (9 * inside + last) * after
            params += first + 9 * inside + last + 2 * (inside + inside + branch)
            if se:
                hidden = (branch + 8) // 16  # 216 channels: 13.5, rounded up
                madds += 2 * branch * hidden + branch * after
                params += 2 * branch * hidden + branch + hidden
            pixels, width = after, out
    return madds + 1000 * width, params + 1000 * width + 1000


def test_shufflenet_is_counted_by_hand(figures):
    for name, se in (("ShuffleNet", False), ("SE-ShuffleNet", True)):
        madds, params = shufflenet(3, (240, 480, 960), se)
        assert figures["Table 3", name, "mflops"].ours == madds / 1e6
        assert figures["Table 3", name, "params_m"].ours == params / 1e6
        assert f"{params / 1e6:.3f}"[:3] == figures["Table 3", name, "params_m"].printed, "truncated, as the note says"
    rise = [figures["Table 3", name, "mflops"].ours for name in ("SE-ShuffleNet", "ShuffleNet")]
    assert round(rise[0] - rise[1]) == 142 - 140
    note = figures["Table 3", "ShuffleNet", "mflops"].note
    assert_said(note, f"{rise[1]:.1f} … {rise[0]:.1f}")
    widths = {1: (144, 288, 576), 2: (200, 400, 800), 4: (272, 544, 1088), 8: (384, 768, 1536)}
    counts = [round(shufflenet(groups, channels, False)[0] / 1e6) for groups, channels in widths.items()]
    assert_said(note, f"{min(counts)} to {max(counts)}")


def test_reduction_8_fits_with_biases_and_2_without(figures):
    with torch.device("meta"):
        resnet = timm.create_model("resnet50")
    values = [*resnet.parameters(), *(b for key, b in resnet.named_buffers() if "running" in key)]
    plain = sum(value.numel() for value in values)
    stages = [(256, 3), (512, 4), (1024, 6), (2048, 3)]  # channels and blocks

    def printed(r, bias):
        return f"{(plain + sum(n * (2 * c * c // r + (c + c // r) * bias) for c, n in stages)) / 1e6:.2f}"

    assert f"{figures['Table 10', 'r = 8', 'params_m'].ours:.2f}" == printed(8, bias=False)
    note = figures["Table 10", "r = 8", "params_m"].note
    assert_said(note, f"{printed(8, bias=False)} … {printed(8, bias=True)} … fit")
    assert (printed(2, bias=False), printed(2, bias=True)) == ("45.73", "45.75")


def test_rows_of_a_network_its_twin_and_the_papers_stride():
    names = {row.name for row in rows_of("se_resnet50")}
    assert {"ResNet-50", "SE-ResNet-50", "r = 2", "SE_Stage_4", "SE_3×3", "NoSqueeze"} <= names
    assert not {name for name in names if "101" in name or "154" in name}
    assert [row.name for row in rows_of("senet154")] == ["SENet-154"]
    assert rows_of("resnet50_v1") == rows_of("se_resnet50")
    with pytest.raises(InputError, match=one_line("no cost … 'resnet20'")):
        rows_of("resnet20")
    with pytest.raises(InputError, match="there is no model"):
        rows_of("resnet51")
