"""Shake-Shake: the mix and its gradient, the blocks against a forward pass written out, the published sizes."""

import pytest
import torch
import torch.nn.functional as F

import senet
from helpers.networks import assert_same_outputs, randomized
from senet import SEConfig, SqueezeExcite
from senet.cost.count import model_cost
from senet.models.shake import BasicBranch, Mix, NextBranch, ShakeBlock, TwoPathShortcut, shake

NAMES = ["shake26_2x96d", "shake29_2x4x64d"]


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_the_gradient_is_that_of_the_forward_mix_where_both_have_the_same_weights():
    weights = torch.rand(3, 1, 1, 1, dtype=torch.float64)
    inputs = (leaf(3, 2, 4, 3), leaf(3, 2, 4, 3), weights, weights)
    assert torch.autograd.gradcheck(Mix.apply, inputs)
    assert torch.autograd.gradgradcheck(Mix.apply, inputs)


def test_forward_takes_alpha_and_the_gradient_takes_beta():
    a, b, grad = leaf(3, 2, 4, 5), leaf(3, 2, 4, 5), torch.randn(3, 2, 4, 5, dtype=torch.float64)
    alpha, beta = torch.rand(2, 3, 1, 1, 1, dtype=torch.float64)
    out = Mix.apply(a, b, alpha, beta)
    torch.testing.assert_close(out, alpha * a + (1 - alpha) * b)
    out.backward(grad)
    torch.testing.assert_close(a.grad, beta * grad)
    torch.testing.assert_close(b.grad, (1 - beta) * grad)


@pytest.mark.parametrize("random_backward", [True, False])
def test_each_image_has_its_own_weights(random_backward):
    a, b = torch.ones(64, 3, 2, 2, requires_grad=True), torch.zeros(64, 3, 2, 2, requires_grad=True)
    out = shake(a, b, random_backward)
    out.sum().backward()
    alpha, beta = out.detach()[:, 0, 0, 0], a.grad[:, 0, 0, 0]
    assert torch.equal(out, alpha.view(-1, 1, 1, 1).expand_as(out)), "one weight for the whole image"
    torch.testing.assert_close(a.grad + b.grad, torch.ones_like(a))
    assert alpha.unique().numel() > 60
    assert alpha.min() < 0.1
    assert alpha.max() > 0.9
    if random_backward:
        assert beta.unique().numel() > 60
        assert not torch.isclose(alpha, beta).any()
    else:
        assert torch.equal(beta, torch.full_like(beta, 0.5))


def test_the_expected_mix_is_the_mean():
    a, b = torch.ones(20_000, 1, 1, 1), torch.zeros(20_000, 1, 1, 1)
    assert abs(shake(a, b, True).mean() - 0.5) < 5 * (1 / 12 / 20_000) ** 0.5


def test_the_seed_decides_and_the_type_does_not():
    a, b = torch.ones(8, 1, 2, 2), torch.zeros(8, 1, 2, 2)
    torch.manual_seed(4)
    first, second = shake(a, b, True), shake(a, b, True)
    torch.manual_seed(4)
    assert torch.equal(shake(a, b, True), first)
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    torch.testing.assert_close(shake(a.bfloat16(), b.bfloat16(), True), first.bfloat16())


def test_the_second_path_sees_the_pixels_up_and_left():
    shortcut = randomized(TwoPathShortcut(3, 8, 2).double())
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    moved = torch.zeros_like(x)
    moved[:, :, 1:, 1:] = x[:, :, :-1, :-1]
    paths = [
        torch.einsum("nchw,oc->nohw", pixels[:, :, ::2, ::2], conv.weight[:, :, 0, 0])
        for pixels, conv in ((x, shortcut.conv1), (moved, shortcut.conv2))
    ]
    with torch.no_grad():
        assert_same_outputs(shortcut(x), norm(torch.cat(paths, 1), shortcut.bn))


def norm(x, bn):
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)


def gated(x, gate):
    w1, w2 = gate.fc1.weight[:, :, 0, 0], gate.fc2.weight[:, :, 0, 0]
    hidden = F.relu(x.mean((2, 3)) @ w1.T + gate.fc1.bias)
    return x * torch.sigmoid(hidden @ w2.T + gate.fc2.bias)[:, :, None, None]


def basic_branch(x, branch, stride):
    """ReLU, 3×3, norm, ReLU, 3×3, norm, SE."""
    h = F.relu(norm(F.conv2d(F.relu(x), branch.conv1.weight, None, stride, 1), branch.bn1))
    return gated(norm(F.conv2d(h, branch.conv2.weight, None, 1, 1), branch.bn2), branch.se)


def next_branch(x, branch, stride):
    """1×1, norm, ReLU, 3×3 in four groups, norm, ReLU, 1×1, norm, SE."""
    h = F.relu(norm(F.conv2d(x, branch.conv1.weight), branch.bn1))
    h = F.relu(norm(F.conv2d(h, branch.conv2.weight, None, stride, 1, 1, 4), branch.bn2))
    return gated(norm(F.conv2d(h, branch.conv3.weight), branch.bn3), branch.se)


@pytest.mark.parametrize("name", NAMES)
def test_at_evaluation_the_network_is_the_authors_with_the_mean_of_the_branches(name):
    model = randomized(senet.create_model(f"se_{name}", num_classes=7).double())
    x = images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    is_next = "29" in name
    with torch.no_grad():
        x = norm(F.conv2d(x, model.conv1.weight, None, 1, 1), model.bn1)
        x = F.relu(x) if is_next else x
        for index, stage in enumerate((model.layer1, model.layer2, model.layer3)):
            assert len(stage) == (3 if is_next else 4)
            for place, block in enumerate(stage):
                stride = 2 if place == 0 and index else 1
                run = next_branch if is_next else basic_branch
                mean = (run(x, block.branch1, stride) + run(x, block.branch2, stride)) / 2
                shortcut = x
                if place == 0 and is_next:
                    shortcut = norm(F.conv2d(x, block.downsample[0].weight, None, stride), block.downsample[1])
                elif place == 0:
                    shortcut = block.downsample(F.relu(x))  # its own test stands above
                x = F.relu(mean + shortcut) if is_next else mean + shortcut
        expected = F.relu(x).mean((2, 3)) @ model.fc.weight.T + model.fc.bias
        assert_same_outputs(model(images), expected)


def make_block(branch, random_backward, se=None, planes=8):
    return ShakeBlock(planes * branch.expansion, planes, 1, 2, branch, random_backward, se).double()


def test_in_training_each_image_of_a_block_gets_its_own_mix_of_its_branches():
    block = make_block(BasicBranch, True)
    x = torch.randn(6, 8, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        mixed = block(x) - x
        a, b = block.branch1(x.relu()), block.branch2(x.relu())
    along = (a - b).flatten(1)
    alpha = ((mixed - b).flatten(1) * along).sum(1) / along.square().sum(1)
    torch.testing.assert_close(b + alpha.view(-1, 1, 1, 1) * (a - b), mixed)
    assert alpha.unique().numel() == 6
    assert ((alpha > 0) & (alpha < 1)).all()


def test_shake_even_has_the_gradient_of_the_mean_of_its_branches():
    """The last norms' biases see the gradient of their own branch only: one half of the sum's."""
    block = make_block(NextBranch, False)
    x = torch.randn(6, 32, 5, 5, dtype=torch.float64)
    out = block(x)
    out.sum().backward()
    half = (out > 0).sum((0, 2, 3)) / 2  # what the ReLU behind the sum lets through
    torch.testing.assert_close(block.branch1.bn3.bias.grad, half.double())
    torch.testing.assert_close(block.branch2.bn3.bias.grad, half.double())


@pytest.mark.parametrize("placement", ["standard", "pre", "3x3", "post", "identity"])
@pytest.mark.parametrize("branch", [BasicBranch, NextBranch])
def test_placements(branch, placement):
    block = make_block(branch, True, SEConfig(reduction=2, placement=placement))
    names = {name for name, module in block.named_modules() if isinstance(module, SqueezeExcite)}
    assert names == ({"se"} if placement in ("post", "identity") else {"branch1.se", "branch2.se"})
    block(torch.randn(2, 8 * branch.expansion, 5, 5, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())


@pytest.mark.parametrize("placement", ["post", "identity"])
def test_the_placements_of_the_whole_block_by_hand(placement):
    block = randomized(make_block(NextBranch, True, SEConfig(reduction=2, placement=placement)))
    x = torch.randn(2, 32, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        mean = (block.branch1(x) + block.branch2(x)) / 2
        expected = gated(F.relu(mean + x), block.se) if placement == "post" else F.relu(mean + gated(x, block.se))
        assert_same_outputs(block(x), expected)


@pytest.mark.parametrize("branch", [BasicBranch, NextBranch])
def test_autocast_trains(branch):
    block = make_block(branch, True, SEConfig()).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = block(torch.randn(4, 8 * branch.expansion, 6, 6))
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.9's own Dynamo looks
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # and torch 2.11's makes one
@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_graph_breaks_and_keeps_the_gradient(training):
    block = make_block(BasicBranch, True, SEConfig()).train(training)
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64)
    gradients = []
    for run in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        block.zero_grad()
        torch.manual_seed(6)
        run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in block.parameters()])
    torch.testing.assert_close(*gradients)


def test_traces_in_training():
    block = make_block(NextBranch, True)
    x = torch.randn(2, 32, 5, 5, dtype=torch.float64)
    traced = torch.fx.symbolic_trace(block)
    torch.manual_seed(8)
    expected = block(x)
    torch.manual_seed(8)
    torch.testing.assert_close(traced(x), expected)


def test_published_sizes():
    assert round(model_cost("shake26_2x96d", 10).params / 1e6, 1) == 26.2
    # The paper gives ResNeXt-29 8x64d's 34.4 M, which is with ten classes; it trains this network on a hundred.
    assert round(model_cost("shake29_2x4x64d", 10).params / 1e6, 1) == 34.4
