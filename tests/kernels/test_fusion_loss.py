"""fusion_loss against plain PyTorch: values, first and second derivatives, kinks, seams of the strips."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels
from kernels import reference

pytestmark = pytest.mark.usefixtures("with_kernels")
WEIGHT = 0.3
SMALL = [(1, 1, 1), (5, 1, 7), (2, 7, 13), (1, 33, 47)]
CASES = [(torch.float32, shape) for shape in SMALL] + [
    (dtype, shape) for dtype in (torch.bfloat16, torch.float16) for shape in ((1, 1, 7), (2, 7, 13), (1, 33, 47))
]


def inputs(n: int, h: int, w: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n * h * w)
    shapes = [(n, 1, h, w)] * 3 + [(n, 2, h, w)] * 2
    return [torch.rand(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]


def run(function: Callable, tensors: list[Tensor], differentiated: tuple[int, ...], hint: float | None) -> list[Tensor]:
    """Both terms, and the gradients of intensity + WEIGHT * gradient in the inputs of these numbers."""
    leaves = [x.clone().requires_grad_(i in differentiated) for i, x in enumerate(tensors)]
    terms = function(*leaves, hint)
    if not differentiated:
        return list(terms)
    gradients = torch.autograd.grad(terms[0] + WEIGHT * terms[1], [leaves[i] for i in differentiated])
    return [*(t.detach() for t in terms), *gradients]


def compare(tensors: list[Tensor], differentiated: tuple[int, ...], hint: float | None, check: Callable) -> None:
    ours = run(kernels.fusion_loss, tensors, differentiated, hint)
    eager = run(reference.fusion_loss, tensors, differentiated, None)
    exact = run(reference.fusion_loss, [x.double() for x in tensors], differentiated, None)
    check(ours, eager, exact)


@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_loss_and_derivative_in_one_launch(
    dtype: torch.dtype, shape: tuple[int, int, int], device: str, as_exact_as_eager: Callable
) -> None:
    compare(inputs(*shape, dtype, device), (0,), WEIGHT, as_exact_as_eager)


@pytest.mark.parametrize("shape", [(1, 64, 64), (1, 331, 585)], ids=str)
def test_larger_images(shape: tuple[int, int, int], device: str, as_exact_as_eager: Callable) -> None:
    compare(inputs(*shape, torch.float32, device), (0,), WEIGHT, as_exact_as_eager)


@pytest.mark.parametrize("shape", SMALL[:3], ids=str)
def test_loss_alone(shape: tuple[int, int, int], device: str, as_exact_as_eager: Callable) -> None:
    compare(inputs(*shape, torch.float32, device), (), WEIGHT, as_exact_as_eager)


@pytest.mark.parametrize("hint", [None, WEIGHT, 0.7], ids=["no hint", "hint", "wrong hint"])
@pytest.mark.parametrize("differentiated", [(0,), (0, 3, 4), (3,), (0, 1, 2, 3, 4), (1,)], ids=str)
def test_every_gradient_in_float64(differentiated: tuple[int, ...], hint: float | None, device: str) -> None:
    tensors = inputs(2, 3, 6, torch.float64, device)
    ours = run(kernels.fusion_loss, tensors, differentiated, hint)
    exact = run(reference.fusion_loss, tensors, differentiated, None)
    torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-16)


def test_mixed_types_give_what_pytorch_gives(device: str, as_exact_as_eager: Callable) -> None:
    tensors = inputs(1, 7, 13, torch.float32, device)
    tensors[0] = tensors[0].half()
    compare(tensors, (0, 3, 4), WEIGHT, as_exact_as_eager)


def test_only_one_term_is_used(device: str) -> None:
    fused, *others = inputs(1, 7, 13, torch.float64, device)
    fused.requires_grad_()
    for term in (0, 1):
        (ours,) = torch.autograd.grad(kernels.fusion_loss(fused, *others, WEIGHT)[term], fused)
        (exact,) = torch.autograd.grad(reference.fusion_loss(fused, *others)[term], fused)
        torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("hint", [None, WEIGHT])
def test_second_derivatives(hint: float | None, device: str) -> None:
    tensors = inputs(1, 5, 6, torch.float64, device)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(x.shape, generator=generator, dtype=x.dtype).to(device) for x in tensors]

    def twice(function: Callable) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        intensity, gradient = function(*leaves, hint)
        first = torch.autograd.grad(intensity + WEIGHT * gradient, leaves, create_graph=True)
        return torch.autograd.grad(first, leaves, directions)

    torch.testing.assert_close(twice(kernels.fusion_loss), twice(reference.fusion_loss), rtol=1e-12, atol=1e-15)


def test_a_second_backward_leaves_the_first_result_alone(device: str) -> None:
    fused, *others = inputs(1, 3, 6, torch.float64, device)
    fused.requires_grad_()
    intensity, gradient = kernels.fusion_loss(fused, *others, WEIGHT)
    cotangents = [torch.full_like(intensity, x) for x in (1.0, WEIGHT, 2.0, 5.0)]
    (first,) = torch.autograd.grad((intensity, gradient), fused, cotangents[:2], retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad((intensity, gradient), fused, cotangents[2:])
    assert torch.equal(first, kept)
    terms = reference.fusion_loss(fused, *others)
    (exact,) = torch.autograd.grad(terms, fused, cotangents[2:])
    torch.testing.assert_close(second, exact, rtol=1e-13, atol=1e-16)


def test_backward_with_the_expected_cotangents_writes_nothing(device: str) -> None:
    from kernels.fusion_loss import backward, forward

    tensors = tuple(inputs(1, 7, 13, torch.float32, device))
    needs = (True, False, False, False, False)
    terms, kept = forward(tensors, WEIGHT, needs)
    derivative = kept[0].clone()
    kept[0].fill_(7.0)
    as_expected = (torch.ones_like(terms[0]), torch.full_like(terms[0], WEIGHT))
    (result,) = backward(as_expected, tensors, WEIGHT, needs, kept)
    assert result is kept[0]
    assert (result == 7.0).all()
    (doubled,) = backward(tuple(2 * x for x in as_expected), tensors, WEIGHT, needs, kept)
    torch.testing.assert_close(doubled, 2 * derivative, rtol=1e-5, atol=1e-8)


def test_strips_have_no_seams_and_sums_no_random_order(device: str) -> None:
    from kernels.fusion_loss import backward, forward
    from kernels.stencil import cut

    tensors = tuple(inputs(1, 5, 9, torch.float64, device))
    exact = run(reference.fusion_loss, list(tensors), (0, 3, 4), None)
    strips = cut(tensors[0], columns=8, rows=3, num_warps=1)
    assert strips.grid == (2, 2, 1)
    wanted = (True, False, False, False, False)
    terms, kept = forward(tensors, WEIGHT, wanted, strips)
    torch.testing.assert_close([*terms, *kept], exact[:3], rtol=1e-13, atol=1e-16)
    terms, _ = forward(tensors, None, wanted, strips)
    torch.testing.assert_close(list(terms), exact[:2], rtol=1e-13, atol=1e-16)
    cotangents = (torch.ones_like(terms[0]), torch.full_like(terms[0], WEIGHT))
    gradients = backward(cotangents, tensors, None, (True, False, False, True, True), (), strips)
    torch.testing.assert_close(list(gradients), exact[2:], rtol=1e-13, atol=1e-16)
    again, _ = forward(tensors, None, wanted, strips)
    assert all(torch.equal(x, y) for x, y in zip(terms, again, strict=True))


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_constant_images_have_no_gradient_inside(value: float, device: str) -> None:
    """Sobel is exactly 0 there, and sign(0) is 0: only the intensity term and the image's border count."""
    fused = torch.full((1, 1, 9, 9), value, device=device, requires_grad=True)
    a, b = torch.rand(1, 1, 9, 9, device=device), torch.full((1, 1, 9, 9), 0.7, device=device)
    w, v = torch.zeros(1, 2, 9, 9, device=device), torch.ones(1, 2, 9, 9, device=device)
    tensors = (a, b, w, v)
    (ours,) = torch.autograd.grad(kernels.fusion_loss(fused, *tensors, 1.0)[1], fused)
    (exact,) = torch.autograd.grad(reference.fusion_loss(fused, *tensors)[1], fused)
    assert (ours[..., 2:-2, 2:-2] == 0).all()
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-8)


def test_equal_images_have_no_loss(device: str) -> None:
    fused = torch.rand(1, 1, 7, 13, device=device, requires_grad=True)
    w, v = torch.rand(2, 1, 2, 7, 13, device=device).unbind()
    terms = kernels.fusion_loss(fused, fused.detach(), fused.detach(), w, v, 1.0)
    (gradient,) = torch.autograd.grad(sum(terms), fused)
    assert terms[0] == terms[1] == 0
    assert (gradient == 0).all()


def test_not_a_number_is_seen_in_the_loss(device: str) -> None:
    for position in range(5):
        tensors = inputs(1, 3, 4, torch.float32, device)
        tensors[position][0, 0, 1, 1] = float("nan")
        assert torch.stack(kernels.fusion_loss(*tensors)).isnan().any(), position


@pytest.mark.parametrize("layout", ["channels_last", "slices", "expanded"])
def test_layouts(layout: str, device: str) -> None:
    tensors = inputs(2, 6, 9, torch.float64, device)
    if layout == "channels_last":
        tensors = [x.contiguous(memory_format=torch.channels_last) for x in tensors]
    elif layout == "slices":
        tensors = [torch.stack((x, -x), -1)[..., 0] for x in tensors]
    else:
        tensors[3] = tensors[3][:1, :, :1, :1].expand_as(tensors[3])
    assert not tensors[3].is_contiguous()
    exact = run(reference.fusion_loss, tensors, (0, 4), None)
    fused, a, b, w, v = tensors
    fused.requires_grad_()
    v.requires_grad_()
    terms = kernels.fusion_loss(fused, a, b, w, v, WEIGHT)
    gradients = torch.autograd.grad(terms[0] + WEIGHT * terms[1], (fused, v))
    torch.testing.assert_close([*terms, *gradients], exact, rtol=1e-13, atol=1e-16)


def test_reference_is_differentiated_rightly() -> None:
    tensors = [x.requires_grad_() for x in inputs(1, 4, 5, torch.float64, "cpu")]
    assert torch.autograd.gradcheck(reference.fusion_loss, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(reference.fusion_loss, tensors)


def test_sobel_is_the_convolution_with_the_sobel_kernels() -> None:
    x = torch.rand(2, 1, 6, 7, dtype=torch.float64)
    horizontal = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], dtype=torch.float64)
    filters = torch.stack((horizontal, horizontal.T))[:, None]
    torch.testing.assert_close(kernels.sobel(x), torch.nn.functional.conv2d(x, filters, padding=1))
    assert (kernels.sobel(torch.full((1, 1, 5, 5), 0.3))[..., 1:-1, 1:-1] == 0).all()
