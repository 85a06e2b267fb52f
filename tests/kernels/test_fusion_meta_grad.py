"""fusion_meta_grad against plain PyTorch, and against the double backward that it replaces."""

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
    """fused, a, b, w, v and a tangent with both signs."""
    generator = torch.Generator().manual_seed(n * h * w)
    shapes = [(n, 1, h, w)] * 3 + [(n, 2, h, w)] * 2
    tensors = [torch.rand(s, generator=generator, dtype=torch.float64) for s in shapes]
    tensors.append(torch.randn((n, 1, h, w), generator=generator, dtype=torch.float64))
    return [x.to(device, dtype) for x in tensors]


def compare(tensors: list[Tensor], check: Callable) -> None:
    ours = kernels.fusion_meta_grad(*tensors, WEIGHT)
    eager = reference.fusion_meta_grad(*tensors, WEIGHT)
    check(ours, eager, reference.fusion_meta_grad(*[x.double() for x in tensors], WEIGHT))


@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_as_exact_as_eager(
    dtype: torch.dtype, shape: tuple[int, int, int], device: str, as_exact_as_eager: Callable
) -> None:
    compare(inputs(*shape, dtype, device), as_exact_as_eager)


@pytest.mark.parametrize("shape", [(1, 64, 64), (1, 331, 585)], ids=str)
def test_larger_images(shape: tuple[int, int, int], device: str, as_exact_as_eager: Callable) -> None:
    compare(inputs(*shape, torch.float32, device), as_exact_as_eager)


def test_mixed_types_give_what_pytorch_gives(device: str, as_exact_as_eager: Callable) -> None:
    tensors = inputs(1, 7, 13, torch.float32, device)
    tensors[0], tensors[5] = tensors[0].half(), tensors[5].half()
    compare(tensors, as_exact_as_eager)


@pytest.mark.parametrize("shape", SMALL[:3], ids=str)
def test_equals_the_double_backward_in_float64(shape: tuple[int, int, int], device: str) -> None:
    fused, a, b, w, v, tangent = inputs(*shape, torch.float64, device)
    ours = kernels.fusion_meta_grad(fused, a, b, w, v, tangent, WEIGHT)
    leaves = [x.clone().requires_grad_() for x in (fused, w, v)]
    intensity, gradient = reference.fusion_loss(leaves[0], a, b, leaves[1], leaves[2])
    loss = intensity + WEIGHT * gradient
    (derivative,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    exact = torch.autograd.grad(derivative, leaves[1:], tangent)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-16)


def test_strips_have_no_seams(device: str) -> None:
    from kernels.fusion_meta_grad import forward
    from kernels.stencil import cut

    tensors = tuple(inputs(1, 5, 9, torch.float64, device))
    strips = cut(tensors[0], columns=8, rows=3, num_warps=1)
    assert strips.grid == (2, 2, 1)
    ours, _ = forward(tensors, WEIGHT, [False] * 6, strips)
    torch.testing.assert_close(ours, reference.fusion_meta_grad(*tensors, WEIGHT), rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_constant_image_has_no_slope_inside(value: float, device: str) -> None:
    tensors = inputs(1, 9, 9, torch.float32, device)
    tensors[0].fill_(value)
    _, dv = kernels.fusion_meta_grad(*tensors, WEIGHT)
    assert (dv[..., 1:-1, 1:-1] == 0).all()
    assert (dv[..., 0, :] != 0).any() == (value > 0)  # the border is an edge to the zeros around the image
    torch.testing.assert_close(dv, reference.fusion_meta_grad(*tensors, WEIGHT)[1])


def test_layouts(device: str) -> None:
    tensors = inputs(2, 6, 9, torch.float64, device)
    exact = reference.fusion_meta_grad(*tensors, WEIGHT)
    channels_last = [x.contiguous(memory_format=torch.channels_last) for x in tensors]
    assert not channels_last[3].is_contiguous()
    torch.testing.assert_close(kernels.fusion_meta_grad(*channels_last, WEIGHT), exact, rtol=1e-13, atol=1e-16)
    slices = [torch.stack((x, -x), -1)[..., 0] for x in tensors]
    torch.testing.assert_close(kernels.fusion_meta_grad(*slices, WEIGHT), exact, rtol=1e-13, atol=1e-16)


def test_its_own_derivatives(device: str) -> None:
    tensors = inputs(1, 4, 5, torch.float64, device)

    def gradients(function: Callable) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        dw, dv = function(*leaves, WEIGHT)
        return torch.autograd.grad((dw.square().sum() + dv.square().sum()) * 1e3, leaves)

    ours, exact = gradients(kernels.fusion_meta_grad), gradients(reference.fusion_meta_grad)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-14)


def test_reference_is_differentiated_rightly() -> None:
    tensors = [x.requires_grad_() for x in inputs(1, 3, 4, torch.float64, "cpu")]

    def function(*x: Tensor) -> tuple[Tensor, Tensor]:
        return reference.fusion_meta_grad(*x, WEIGHT)

    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensors)
