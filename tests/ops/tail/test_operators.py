"""``torch.library.opcheck`` on every custom operator: schema, fake tensors, autograd, AOT tracing."""

import pytest
import torch

from senet.ops.reference import table_dtype
from senet.ops.tail import autograd, native  # noqa: F401 - registers the operators

# opcheck itself reads the gradients of inner tensors while it traces.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
OPERATORS = torch.ops.senet
BACKENDS = ["reference", pytest.param("native", marks=pytest.mark.skipif(native.why_not() is not None, reason=""))]


def made(shape, last, dtype=torch.float32, learns=True):
    """Maps and tables, which require gradients."""

    def a_map():
        x = torch.randn(shape).to(dtype)
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
        return x.requires_grad_(learns)

    def a_table():
        return torch.randn(shape[:2], dtype=table_dtype(dtype)).requires_grad_(learns)

    return a_map, a_table


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_operators_that_have_a_derivative(backend, last):
    a_map, a_table = made((2, 4, 3, 5), last)
    for variance in (True, False):
        torch.library.opcheck(OPERATORS.moments.default, (a_map(), variance, backend))
    for shortcut, relu in ((a_map(), True), (None, False)):
        u, m, a, b = a_map(), a_table(), a_table(), a_table()
        torch.library.opcheck(OPERATORS.affine.default, (u, m, a, b, shortcut, relu, None, None, backend))
        handles = a_map(), a_table()
        torch.library.opcheck(OPERATORS.affine.default, (u.detach(), m, a, b, shortcut, relu, *handles, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_operators_of_the_backward_pass(backend, last):
    a_map, a_table = made((2, 4, 3, 5), last, learns=False)
    g, u, m, a, dm, dv = a_map(), a_map(), a_table(), a_table(), a_table(), a_table()
    torch.library.opcheck(OPERATORS.moments_backward.default, (g, u, m, a, dm, dv, backend))
    torch.library.opcheck(OPERATORS.affine_backward.default, (g, a_map(), u, m, backend))
    torch.library.opcheck(OPERATORS.product_sums.default, (g, u, m, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_maps_of_other_layouts_have_the_promised_ones(backend):
    a_map, a_table = made((2, 4, 3, 5), False, learns=False)
    u, m, a, dm, dv = a_map().transpose(2, 3), a_table(), a_table(), a_table(), a_table()
    for x in (u, a_map().transpose(2, 3)[..., ::2]):
        g = torch.randn(x.shape)
        torch.library.opcheck(OPERATORS.moments.default, (x, True, backend))
        torch.library.opcheck(OPERATORS.affine.default, (x, m, a, dm, g, True, None, None, backend))
        torch.library.opcheck(OPERATORS.affine_backward.default, (g, g, x, m, backend))
        torch.library.opcheck(OPERATORS.moments_backward.default, (g, x, m, a, dm, dv, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_of_half_maps_and_mixed_layouts(backend):
    a_map, a_table = made((2, 4, 3, 5), True, torch.bfloat16)
    other, _ = made((2, 4, 3, 5), False, torch.bfloat16)
    torch.library.opcheck(OPERATORS.moments.default, (a_map(), True, backend))
    torch.library.opcheck(
        OPERATORS.affine.default, (a_map(), a_table(), a_table(), a_table(), other(), True, None, None, backend)
    )
    g, out, u = other().detach(), other().detach(), a_map().detach()
    m, a, dm, dv = (a_table().detach() for _ in range(4))
    torch.library.opcheck(OPERATORS.affine_backward.default, (g, out, u, m, backend))
    torch.library.opcheck(OPERATORS.product_sums.default, (g, u, m, backend))
    torch.library.opcheck(OPERATORS.moments_backward.default, (g, u, m, a, dm, dv, backend))


def test_every_operator_is_checked():
    own = {name.removeprefix("senet::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("senet::")}
    assert own == {"moments", "moments_backward", "affine", "affine_backward", "product_sums"}
