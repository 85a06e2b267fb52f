"""reconstruction_loss against plain PyTorch: values, first and second derivatives, equal maxima, seams."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels
from kernels import reference

pytestmark = pytest.mark.usefixtures("with_kernels")
SMALL = [(1, 1, 1), (5, 1, 7), (2, 7, 13), (1, 33, 47)]
CASES = [(torch.float32, shape) for shape in SMALL] + [
    (dtype, shape) for dtype in (torch.bfloat16, torch.float16) for shape in ((1, 1, 7), (2, 7, 13), (1, 33, 47))
]


def inputs(n: int, h: int, w: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n * h * w)
    return [torch.rand((n, 1, h, w), generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(4)]


def run(function: Callable, tensors: list[Tensor], differentiated: tuple[int, ...], scale: float = 1.0) -> list[Tensor]:
    """The loss, and the gradients of scale * loss in the inputs of these numbers."""
    leaves = [x.clone().requires_grad_(i in differentiated) for i, x in enumerate(tensors)]
    loss = function(*leaves)
    if not differentiated:
        return [loss]
    gradients = torch.autograd.grad(scale * loss, [leaves[i] for i in differentiated])
    return [loss.detach(), *gradients]


def compare(tensors: list[Tensor], differentiated: tuple[int, ...], check: Callable) -> None:
    ours = run(kernels.reconstruction_loss, tensors, differentiated)
    eager = run(reference.reconstruction_loss, tensors, differentiated)
    check(ours, eager, run(reference.reconstruction_loss, [x.double() for x in tensors], differentiated))


@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_loss_and_derivatives_in_one_launch(
    dtype: torch.dtype, shape: tuple[int, int, int], device: str, as_exact_as_eager: Callable
) -> None:
    compare(inputs(*shape, dtype, device), (2, 3), as_exact_as_eager)


@pytest.mark.parametrize("shape", [(1, 64, 64), (1, 331, 585)], ids=str)
def test_larger_images(shape: tuple[int, int, int], device: str, as_exact_as_eager: Callable) -> None:
    compare(inputs(*shape, torch.float32, device), (2, 3), as_exact_as_eager)


@pytest.mark.parametrize("shape", SMALL[:3], ids=str)
def test_loss_alone(shape: tuple[int, int, int], device: str, as_exact_as_eager: Callable) -> None:
    compare(inputs(*shape, torch.float32, device), (), as_exact_as_eager)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("differentiated", [(2, 3), (2,), (3,), (0, 1, 2, 3), (0,)], ids=str)
def test_every_gradient_in_float64(differentiated: tuple[int, ...], scale: float, device: str) -> None:
    tensors = inputs(2, 3, 6, torch.float64, device)
    ours = run(kernels.reconstruction_loss, tensors, differentiated, scale)
    exact = run(reference.reconstruction_loss, tensors, differentiated, scale)
    torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-16)


def test_second_derivatives(device: str) -> None:
    tensors = inputs(1, 5, 6, torch.float64, device)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(x.shape, generator=generator, dtype=x.dtype).to(device) for x in tensors]

    def twice(function: Callable) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        first = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
        return torch.autograd.grad(first, leaves, directions)

    ours, exact = twice(kernels.reconstruction_loss), twice(reference.reconstruction_loss)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-15)


def test_a_second_backward_leaves_the_first_result_alone(device: str) -> None:
    a, b, a_hat, b_hat = inputs(1, 3, 6, torch.float64, device)
    images = (a_hat.requires_grad_(), b_hat.requires_grad_())
    loss = kernels.reconstruction_loss(a, b, *images)
    first = torch.autograd.grad(loss, images, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(3 * loss, images)
    assert all(torch.equal(x, y) for x, y in zip(first, kept, strict=True))
    torch.testing.assert_close(second, tuple(3 * x for x in first), rtol=1e-13, atol=1e-16)


def test_strips_have_no_seams_and_sums_no_random_order(device: str) -> None:
    from kernels.reconstruction_loss import backward, forward
    from kernels.stencil import cut

    tensors = tuple(inputs(1, 5, 9, torch.float64, device))
    exact = run(reference.reconstruction_loss, list(tensors), (2, 3))
    strips = cut(tensors[0], columns=8, rows=3, num_warps=1)
    assert strips.grid == (2, 2, 1)
    needs = (False, False, True, True)
    (loss,), kept = forward(tensors, None, needs, strips)
    torch.testing.assert_close([loss, *kept], exact, rtol=1e-13, atol=1e-16)
    gradients = backward((torch.ones_like(loss),), tensors, None, needs, (), strips)
    torch.testing.assert_close(list(gradients), exact[1:], rtol=1e-13, atol=1e-16)
    (alone,), _ = forward(tensors, None, [False] * 4, strips)
    (again,), _ = forward(tensors, None, [False] * 4, strips)
    torch.testing.assert_close(alone, exact[0], rtol=1e-13, atol=1e-16)
    assert torch.equal(alone, again)


def test_equal_sides_of_a_maximum_take_half_of_the_derivative_each(device: str) -> None:
    """A - A^ = 1/4 and B - B^ = -1/4 in a single pixel: L = 1/16, and 2 * 1/4 is shared."""
    a, b = torch.full((2, 1, 1, 1, 1), 0.5, device=device).unbind()
    a_hat = (a - 0.25).requires_grad_()
    b_hat = (b + 0.25).requires_grad_()
    loss = kernels.reconstruction_loss(a, b, a_hat, b_hat)
    gradients = torch.autograd.grad(loss, (a_hat, b_hat))
    assert loss.item() == 0.0625
    assert [g.item() for g in gradients] == [-0.25, 0.25]


def test_equal_maxima_of_whole_images(device: str) -> None:
    """Sixteenths, so that all sums are exact: B - B^ = A^ - A everywhere, intensities and gradients alike."""
    a = torch.randint(4, 12, (1, 1, 6, 8), generator=torch.Generator().manual_seed(0)).to(device, torch.float64) / 16
    step = torch.randint(-3, 4, (1, 1, 6, 8), generator=torch.Generator().manual_seed(1)).to(device, torch.float64) / 16
    tensors = [a, a, a + step, a + step]
    ours = run(kernels.reconstruction_loss, tensors, (2, 3))
    exact = run(reference.reconstruction_loss, tensors, (2, 3))
    torch.testing.assert_close(ours, exact, rtol=1e-14, atol=0)
    assert torch.equal(ours[1], ours[2])
    assert (ours[1] != 0).any()


def test_perfect_reconstruction_has_no_loss_and_no_derivative(device: str) -> None:
    a, b, *_ = inputs(1, 7, 13, torch.float32, device)
    loss, *gradients = run(kernels.reconstruction_loss, [a, b, a, b], (2, 3))
    assert loss == 0
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_constant_images(value: float, device: str) -> None:
    tensors = inputs(1, 9, 9, torch.float32, device)
    tensors[2].fill_(value)
    tensors[3].fill_(value)
    ours = run(kernels.reconstruction_loss, tensors, (2, 3))
    torch.testing.assert_close(ours, run(reference.reconstruction_loss, tensors, (2, 3)))


def test_not_a_number_is_seen_in_the_loss(device: str) -> None:
    for position in range(4):
        tensors = inputs(1, 3, 4, torch.float32, device)
        tensors[position][0, 0, 1, 1] = float("nan")
        assert kernels.reconstruction_loss(*tensors).isnan(), position


def test_layouts(device: str) -> None:
    exact = run(reference.reconstruction_loss, inputs(2, 6, 9, torch.float64, device), (2, 3))
    a, b, a_hat, b_hat = (torch.stack((x, -x), -1)[..., 0] for x in inputs(2, 6, 9, torch.float64, device))
    images = (a_hat.requires_grad_(), b_hat.requires_grad_())
    loss = kernels.reconstruction_loss(a, b, *images)
    torch.testing.assert_close([loss, *torch.autograd.grad(loss, images)], exact, rtol=1e-13, atol=1e-16)


def test_reference_is_differentiated_rightly() -> None:
    tensors = [x.requires_grad_() for x in inputs(1, 4, 5, torch.float64, "cpu")]
    assert torch.autograd.gradcheck(reference.reconstruction_loss, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(reference.reconstruction_loss, tensors)
