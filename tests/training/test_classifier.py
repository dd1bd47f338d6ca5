from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from helpers.messages import one_line
from senet.data.transforms import TransformSpec
from senet.errors import InputError
from senet.runs.recipe import ScheduleRecipe, load_recipe
from senet.training.callbacks import WarmAverage, random_state, set_random_state
from senet.training.classifier import Classifier, LrFactor, build_optimizer
from senet.weights.create import create_model


def rates(schedule, epochs, total):
    factor = LrFactor(schedule, epochs, total)
    return [factor(step) for step in range(total)]


def test_step_schedule_is_multistep_lr():
    schedule = ScheduleRecipe(name="step", milestones=(0.3, 0.6, 0.9), gamma=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    oracle = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 60, 90])
    expected = []
    for _ in range(100):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step()
    assert rates(schedule, 100, 100) == pytest.approx(expected)


def test_cosine_after_warmup_is_cosine_annealing_lr():
    schedule = ScheduleRecipe(name="cosine", warmup_epochs=2)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 80)
    expected = []
    for _ in range(80):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step()
    found = rates(schedule, 10, 100)
    assert found[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert found[20:] == pytest.approx(expected, abs=1e-9)


def test_a_short_run_keeps_the_shape():
    schedule = ScheduleRecipe(name="step", milestones=(0.5, 0.75), gamma=0.1)
    assert rates(schedule, 4, 8) == pytest.approx([1] * 4 + [0.1] * 2 + [0.01] * 2)
    assert rates(ScheduleRecipe(name="constant"), 4, 3) == [1, 1, 1]


def test_norms_and_biases_without_decay_if_asked():
    model = create_model("se_resnet8", 3)
    everything = build_optimizer(model, load_recipe("cifar"))
    assert len(everything.param_groups) == 1
    spared = build_optimizer(model, load_recipe("cifar", ["optimizer.decay_norm_and_bias=false"]))
    decayed, kept = spared.param_groups
    assert kept["weight_decay"] == 0
    assert decayed["weight_decay"] == 1e-4
    assert all(p.dim() > 1 for p in decayed["params"])
    assert all(p.dim() == 1 for p in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))
    assert isinstance(build_optimizer(model, load_recipe("cifar", ["optimizer.name=adamw"])), torch.optim.AdamW)


@pytest.mark.parametrize("changes", [["label_smoothing=0.1"], ["channels_last=true"], []])
def test_loss_is_torchs_on_normalised_pixels(changes):
    recipe = load_recipe("cifar", changes)
    spec = TransformSpec(8, (0.5,) * 3, (0.25,) * 3)
    model = create_model("resnet8", 7)
    classifier = Classifier(model, recipe, spec, 7)
    images, targets = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8), torch.tensor([0, 1, 2, 6])
    from senet.data.loaders import Batch

    loss = classifier.training_step(Batch(images, targets, targets), 0)
    oracle = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    torch.testing.assert_close(loss, oracle(model((images / 255 - 0.5) / 0.25), targets))


def test_errors_count_in_percent():
    class Fixed(nn.Module):
        def forward(self, x):
            return torch.eye(8)[:4] if len(x) == 4 else torch.eye(8)[4:6]

    classifier = Classifier(Fixed(), load_recipe("cifar"), TransformSpec(8), 8)
    from senet.data.loaders import Batch

    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    # Ties after the first: torch ranks the equal logits somehow, so the targets are the first class or the true one.
    classifier.validation_step(Batch(images, torch.tensor([0, 1, 2, 0]), torch.arange(4)), 0)
    classifier.validation_step(Batch(images[:2], torch.tensor([4, 4]), torch.arange(2)), 1)
    nothing = Batch(images[:0], torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64))
    classifier.validation_step(nothing, 2)
    values = classifier.take_val_metrics()
    assert values["val_error"] == pytest.approx(100 * 2 / 6, abs=1e-4)
    assert 0 <= values["val_top5_error"] <= values["val_error"]
    classifier.validation_step(nothing, 0)
    with pytest.raises(InputError, match=one_line("none … validation images")):
        classifier.take_val_metrics()  # the counters have started anew


def test_no_top5_below_six_classes():
    assert Classifier(nn.Identity(), load_recipe("cifar"), TransformSpec(8), 5).val_top5 is None
    assert Classifier(nn.Identity(), load_recipe("cifar"), TransformSpec(8), 6).val_top5 is not None


def test_average_forgets_the_start_quickly():
    module, average, steps = pl.LightningModule(), WarmAverage(0.999), 20
    module.weight = nn.Parameter(torch.zeros(1))
    module.register_buffer("count", torch.tensor(3))
    average.setup(None, module, "fit")
    for step in range(1, steps + 2):
        trainer = SimpleNamespace(global_step=step)
        average.on_train_batch_end(trainer, module, None, None, step)  # the first takes the weights as they are
        nn.init.ones_(module.weight)
        module.count.fill_(9)
    average.on_validation_epoch_start(trainer, module)
    constant = 1 - 0.999**steps
    assert 1 > module.weight.item() > 0.999 > 10 * constant
    assert module.count == 9


def test_random_state_comes_back():
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.standard_normal(), torch.rand(1).item()

    np.random.standard_normal()  # leaves a cached second value behind
    state = random_state()
    first = draw()
    set_random_state(state)
    assert draw() == first
