"""Folded and packed weights follow the network's own, in every way in which people change them."""

import copy

import pytest
import timm.optim
import timm.utils
import torch
from torch import nn
from torch.optim import swa_utils

import senet
from helpers.accelerated import Body, assert_close, assert_same_gradients, image, in_sweeps, outputs, step
from helpers.networks import all_names


def pair(dtype=torch.float32):
    """A network in eval mode, and its accelerated copy, which has already run."""
    torch.manual_seed(0)
    model = Body().to(dtype).eval()
    fast = senet.accelerate(model)
    outputs(fast, image().to(dtype), calls=2)
    return model, fast


def assert_follows(model, fast, change, x=None):
    """The same change of both: the outputs move, and stay the same as each other."""
    x = image() if x is None else x
    (before,) = outputs(model, x)
    change(model)
    change(fast)
    (expected,) = outputs(model, x)
    assert (before - expected).abs().max() > 1e-4 * before.abs().max()
    for _ in range(2):
        assert_close(outputs(fast, x), [expected])


def another_state(net):
    torch.manual_seed(5)
    other = Body().to(next(net.parameters()).dtype)
    return {key: value.clone() for key, value in other.state_dict().items()}


@torch.no_grad()
def in_place(net):
    net.block.conv.weight.mul_(1.5)


@torch.no_grad()
def of_one_element(net):
    net.block.se.expand.bias[3] += 5


@torch.no_grad()
def through_a_view(net):
    net.block.norm.weight[2:5].fill_(3)


@torch.no_grad()
def by_copy(net):
    for p in net.parameters():
        p.copy_(1.2 * p)


@torch.no_grad()
def by_foreach(net):
    torch._foreach_mul_(list(net.parameters()), 1.1)


def through_detach(net):
    net.stem.weight.detach().mul_(2)


@torch.inference_mode()
def in_inference_mode(net):
    net.block.conv.weight.mul_(1.5)


def new_data(net):
    net.block.conv.weight.data = net.block.conv.weight.data * 1.5


def new_parameter(net):
    net.block.se.reduce.weight = nn.Parameter(net.block.se.reduce.weight.detach() * 2)


def another_parameter_tied(net):
    net.block.norm.bias = net.block.norm.weight


def in_place_through_data(net):
    net.block.conv.weight.data.mul_(1.5)


def by_copy_to_data(net):
    for p in net.parameters():
        p.data.copy_(p.data * 1.2)


def by_numpy(net):
    weight = net.block.se.expand.weight.detach().numpy()
    weight *= 2


def statistics_through_data(net):
    net.block.norm.running_mean.data.add_(0.5)


def by_initialization(net):
    torch.manual_seed(9)
    nn.init.normal_(net.block.conv.weight)


def by_reset(net):
    torch.manual_seed(9)
    net.block.se.reduce.reset_parameters()


def as_a_vector(net):
    flat = nn.utils.parameters_to_vector(net.parameters())
    nn.utils.vector_to_parameters(flat * 1.2, net.parameters())


def loaded(net):
    net.load_state_dict(another_state(net))


def loaded_by_assignment(net):
    net.load_state_dict(another_state(net), assign=True)


def loaded_in_part(net):
    net.block.load_state_dict({"se.expand.bias": torch.full((16,), 2.0)}, strict=False)


def of_a_buffer(net):
    net.block.norm.running_var.fill_(4)


def another_buffer(net):
    net.block.norm.running_mean = torch.full((16,), 0.5)


def through_bfloat16(net):
    net.block.bfloat16().float()


def assigned_from_outside(net):
    state = {f"0.{key}": value for key, value in another_state(net).items()}
    nn.Sequential(net).load_state_dict(state, assign=True)


WAYS = [
    assigned_from_outside,
    *(
        in_place_through_data,
        by_copy_to_data,
        pytest.param(by_numpy, marks=pytest.mark.slow, id="by_numpy"),
        statistics_through_data,
    ),
    *(
        in_place,
        of_one_element,
        through_a_view,
        by_copy,
        pytest.param(by_foreach, marks=pytest.mark.slow, id="by_foreach"),
        pytest.param(through_detach, marks=pytest.mark.slow, id="through_detach"),
        in_inference_mode,
        new_data,
    ),
    *(
        new_parameter,
        another_parameter_tied,
        by_initialization,
        pytest.param(by_reset, marks=pytest.mark.slow, id="by_reset"),
        pytest.param(as_a_vector, marks=pytest.mark.slow, id="as_a_vector"),
        loaded,
        loaded_by_assignment,
    ),
    *(
        pytest.param(loaded_in_part, marks=pytest.mark.slow, id="loaded_in_part"),
        of_a_buffer,
        another_buffer,
        through_bfloat16,
    ),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_change_in_eval_mode(way):
    assert_follows(*pair(), way)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "fused sgd": lambda p: torch.optim.SGD(p, 0.05, fused=True),
    "fused momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
    "foreach sgd": lambda p: torch.optim.SGD(p, 0.05, foreach=True),
    "fused adam": lambda p: torch.optim.Adam(p, 0.05, fused=True),
    "fused adamw": lambda p: torch.optim.AdamW(p, 0.05, fused=True),
    "fused adagrad": lambda p: torch.optim.Adagrad(p, 0.05, fused=True),
    "timm lion": lambda p: timm.optim.Lion(p, 0.05),
}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", all_names({"fused sgd", "fused adam", "timm lion"}, OPTIMIZERS))
def test_an_optimizer_steps(name, train):
    def change(net):
        net.train(train)
        net.block.conv.bias.requires_grad_(not train)  # before a norm, its gradient is rounding, which Adam enlarges
        optimizer = OPTIMIZERS[name]([p for p in net.parameters() if p.requires_grad])
        for _ in range(2):
            with in_sweeps():
                step(net, image().double())
            optimizer.step()
        net.eval()

    assert_follows(*pair(torch.float64), change, image().double())


def test_an_optimizer_that_was_made_before_anything_was_accelerated():
    torch.manual_seed(0)
    model = Body().double().eval()
    fast = senet.accelerate(model)
    optimizers = [(net, torch.optim.Adam(net.parameters(), 0.05, fused=True)) for net in (model, fast)]
    for _ in range(3):
        for net, optimizer in optimizers:
            step(net, image().double())
            optimizer.step()
        assert_close(outputs(fast, image().double()), outputs(model, image().double()))


def test_an_epoch_of_training_between_evaluations():
    """Parameters and running statistics: epochs of sweeps, each followed by an evaluation in the folded form."""
    torch.manual_seed(0)
    model = Body().double()
    fast = senet.accelerate(model)
    for _ in range(3):
        for net in (model, fast):
            net.train()
            optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9)
            for seed in range(3):
                step(net, image(seed=seed).double())
                optimizer.step()
            net.eval()
        assert_close(outputs(fast, image().double()), outputs(model, image().double()), 1e-7)


def test_statistics_alone():
    def change(net):
        net.train()
        outputs(net, image(seed=1), calls=3)  # no gradients, no step
        net.eval()

    assert_follows(*pair(), change)


def test_statistics_are_updated_once_a_call():
    torch.manual_seed(0)
    model = Body().train()
    fast, x = senet.accelerate(model), image(16, 3, 96, 96)  # large enough to be run in parts, in eval mode
    (mine,), (expected,) = outputs(fast, x), outputs(model, x)
    assert_close(mine, expected)
    assert_close(dict(fast.named_buffers()), dict(model.named_buffers()))


def test_statistics_that_a_part_updates_by_itself():
    def change(net):
        net.block.norm.train()
        outputs(net.block.norm, image(4, 16, 9, 9))
        net.block.norm.eval()

    assert_follows(*pair(), change)


def test_averages_of_timm():
    torch.manual_seed(0)
    model = Body().eval()
    fast = senet.accelerate(model)
    averages = [timm.utils.ModelEmaV3(net, decay=0.5) for net in (model, fast)]
    assert type(averages[1].module) is Body
    outputs(averages[1], image())
    for factor in (1.5, 2.0):
        for net, average in zip((model, fast), averages, strict=True):
            with torch.no_grad():
                for p in net.parameters():
                    p.mul_(factor)
            average.update(net)
        assert_close(outputs(averages[1], image()), outputs(averages[0], image()))
        assert_close(outputs(fast, image()), outputs(model, image()))


def test_averages_of_torch():
    torch.manual_seed(0)
    model = Body()
    fast = senet.accelerate(model)
    averages = [swa_utils.AveragedModel(net) for net in (model, fast)]
    for factor in (1.5, 2.0):
        for net, average in zip((model, fast), averages, strict=True):
            with torch.no_grad():
                for p in net.parameters():
                    p.mul_(factor)
            average.update_parameters(net)
            swa_utils.update_bn([image(), image(seed=1)], average)
            average.eval()
        assert_close(outputs(averages[1], image()), outputs(averages[0], image()))


def test_weights_that_are_swapped_for_an_evaluation_and_back():
    """As trainers do with averaged weights: stored, replaced through ``data``, restored."""
    model, fast = pair()
    expected = outputs(model, image())
    kept = [p.data for p in fast.parameters()]
    for p in fast.parameters():
        p.data = p.data * 0.5
    moved = outputs(fast, image())
    for p, data in zip(fast.parameters(), kept, strict=True):
        p.data = data
    assert (moved[0] - expected[0]).abs().max() > 1e-3 * expected[0].abs().max()
    assert_close(outputs(fast, image()), expected)


def _actor(net, x, answers, go):
    with torch.no_grad():
        answers.put(net(x).tolist())
        go.wait(60)
        answers.put(net(x).tolist())


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_an_actor_process_sees_what_the_learner_writes(method):
    torch.manual_seed(0)
    fast, x = senet.accelerate(Body().eval()), image()
    fast.share_memory()
    context = torch.multiprocessing.get_context(method)
    answers, go = context.Queue(), context.Event()
    actor = context.Process(target=_actor, args=(fast, x, answers, go), daemon=True)
    actor.start()
    before = torch.tensor(answers.get(timeout=60))
    fast.load_state_dict(another_state(fast))
    expected = Body().eval()
    expected.load_state_dict(another_state(fast))
    go.set()
    after = torch.tensor(answers.get(timeout=60))
    actor.join(60)
    assert (before - after).abs().max() > 1e-3
    assert_close([after], outputs(expected, x))
    assert_close(outputs(fast, x), outputs(expected, x))


def test_weights_that_another_tensor_in_shared_memory_writes():
    """The writer has a tensor of its own over the same memory, whose version nobody else sees."""
    model, fast = pair()
    model.share_memory()
    fast.share_memory()
    outputs(fast, image())
    for net in (model, fast):
        for p in net.parameters():
            torch.from_numpy(p.detach().numpy()).mul_(1.5)
    assert_close(outputs(fast, image()), outputs(model, image()))


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        torch.manual_seed(0)
        model = Body().eval()
        fast = senet.accelerate(model)
        for factor in (1.0, 1.5):
            for net in (model, fast):
                for p in net.parameters():
                    p.mul_(factor)
            assert_close(fast(image()), model(image()))


def test_weights_loaded_by_assignment_in_inference_mode():
    model, fast = pair()
    with torch.inference_mode():
        loaded_by_assignment(model)
        loaded_by_assignment(fast)
        assert_close(fast(image()), model(image()))
        in_place.__wrapped__(model)
        in_place.__wrapped__(fast)
        assert_close(fast(image()), model(image()))


class Classified(Body):
    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.filterwarnings("ignore")  # torch.ao is on its way out
@pytest.mark.parametrize("when", ["before", "after"])
def test_layers_that_are_quantized(when):
    torch.manual_seed(0)
    model = Classified().eval()
    quantize = torch.ao.quantization.quantize_dynamic
    if when == "before":
        model.head = quantize(model.head, {nn.Linear})
    fast = senet.accelerate(model)
    outputs(fast, image())
    if when == "after":
        model.head, fast.head = (quantize(copy.deepcopy(net.head), {nn.Linear}) for net in (model, fast))
    for _ in range(2):
        assert_close(outputs(fast, image()), outputs(model, image()), 0.02)  # a step of the quantized activations
    model.block.conv.weight.data = model.block.conv.weight.data * 2
    fast.block.conv.weight.data = fast.block.conv.weight.data * 2
    assert_close(outputs(fast, image()), outputs(model, image()), 0.02)


class Offloaded:
    """Weights are elsewhere between calls, as offloading libraries do: hooks move them in and out."""

    def __init__(self, module):
        self.elsewhere = {name: p.detach().clone() for name, p in module.named_parameters(recurse=False)}
        module.register_forward_pre_hook(self.move_in)
        module.register_forward_hook(self.move_out)
        self.move_out(module)

    def move_in(self, module, args):
        for name, value in self.elsewhere.items():
            setattr(module, name, nn.Parameter(value.clone(), requires_grad=False))

    def move_out(self, module, *args):
        for name, value in self.elsewhere.items():
            setattr(module, name, nn.Parameter(value.to("meta"), requires_grad=False))


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_that_are_moved_in_for_a_call(when):
    torch.manual_seed(0)
    model = Classified().eval()
    fast = senet.accelerate(model)
    expected = outputs(model, image())
    if when == "after":
        outputs(fast, image())
    offloaded = [Offloaded(m) for m in (fast.block.conv, fast.block.se.expand, fast.head[0])]
    for _ in range(2):
        assert_close(outputs(fast, image()), expected)
    for each in offloaded:
        each.elsewhere["weight"].mul_(2)
    with torch.no_grad():
        for module in (model.block.conv, model.block.se.expand, model.head[0]):
            module.weight.mul_(2)
    assert_close(outputs(fast, image()), outputs(model, image()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_type_of_numbers(dtype):
    model, fast = pair()
    wide = copy.deepcopy(model).double()
    exact = outputs(wide, image().double())[0]
    own_error = (outputs(model.to(dtype), image().to(dtype))[0].double() - exact).abs().max()
    (mine,) = outputs(fast.to(dtype), image().to(dtype))
    assert mine.dtype == dtype
    assert (mine.double() - exact).abs().max() <= 4 * own_error + 1e-9
    model.float()
    assert_close(outputs(fast.float(), image()), outputs(model, image()))


def test_parameters_that_are_frozen_and_set_free():
    model, fast = pair(torch.float64)
    x = image().double()
    for free in (False, True, False):
        for net in (model, fast):
            net.block.requires_grad_(free)
        assert_close(outputs(fast, x), outputs(model, x))
        (mine, gradients, _), (expected, wanted, _) = step(fast, x), step(model, x)
        assert_close(mine, expected)
        assert_same_gradients(gradients, wanted, 1e-9)
    assert [p.requires_grad for p in fast.parameters()] == [p.requires_grad for p in model.parameters()]


def test_two_networks_do_not_mix_their_weights():
    """A copy shares what was captured from the first network, but none of its weights."""
    model, fast = pair()
    twin, other = copy.deepcopy(fast), copy.deepcopy(model)
    in_place(twin)
    in_place(other)
    for _ in range(2):
        assert_close(outputs(fast, image()), outputs(model, image()))
        assert_close(outputs(twin, image()), outputs(other, image()))


def test_weights_that_are_given_for_a_call():
    model, fast = pair()
    weights = {name: p.detach() * 1.5 for name, p in model.named_parameters()}
    for _ in range(2):
        with torch.no_grad():
            mine, expected = (torch.func.functional_call(net, weights, (image(),)) for net in (fast, model))
        assert_close(mine, expected)
        assert_close(outputs(fast, image()), outputs(model, image()))


@pytest.mark.parametrize("where", ["shared memory", "inference mode"])
def test_the_report_says_that_such_weights_are_not_folded(where):
    torch.manual_seed(0)
    with torch.inference_mode(where == "inference mode"):
        model = senet.create_model("se_resnet8", num_classes=10).eval()
        fast = senet.accelerate(model)  # a copy of shared weights would not be shared
    if where == "shared memory":
        fast.share_memory()
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(fast(x), model(x))  # the captured operations, to the bit
    gates = [gate.name for gate in senet.find_gates(model)]
    assert all(where in fast.acceleration.left[gate] for gate in gates)
