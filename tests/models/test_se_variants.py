"""The SE-ResNet-50s of the ablations, made through ``SEConfig``: each adds the weights of equation 5 (section 4).

What the paper prints of them is held by ``tests/cost/test_published.py``.
"""

import pytest

from senet import SEConfig
from senet.cost.count import model_cost

# Channels at the end of a block, inside it, and blocks of the stages 2 to 5 (Table 1).
STAGES = {2: (256, 64, 3), 3: (512, 128, 4), 4: (1024, 256, 6), 5: (2048, 512, 3)}


def entry_channels(stage):
    """Where the branches of a stage's blocks begin: the first block's at the end of the stage before."""
    end, _, blocks = STAGES[stage]
    return [64 if stage == 2 else STAGES[stage - 1][0]] + [end] * (blocks - 1)


@pytest.fixture(scope="module")
def plain_params():
    return model_cost("resnet50_v1", se=None).params


@pytest.mark.parametrize(
    ("placement", "reduction", "stages"),
    [(placement, 16, None) for placement in ("standard", "pre", "post", "identity", "3x3")]
    + [("standard", reduction, None) for reduction in (2, 4, 8, 32)]
    + [("standard", 16, stages) for stages in ((2,), (3,), (4,), (5,), (2, 3, 4))]
    + [("pre", 8, (3, 5)), ("3x3", 4, (2, 4))],
)
def test_every_variant_adds_the_weights_of_equation_5(placement, reduction, stages, plain_params):
    gated = [
        channels
        for stage in stages or STAGES
        for channels in (
            entry_channels(stage) if placement == "pre" else [STAGES[stage][placement == "3x3"]] * STAGES[stage][2]
        )
    ]
    config = SEConfig(reduction=reduction, placement=placement, stages=stages, bias=False)
    added = model_cost("resnet50_v1", se=config).params - plain_params
    assert added == sum(2 * channels * channels // reduction for channels in gated)
