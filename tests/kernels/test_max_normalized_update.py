"""max_normalized_update against plain PyTorch, in place, over many tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels
from kernels import reference

pytestmark = pytest.mark.usefixtures("with_kernels")
SHAPES = [(3,), (16, 16, 3, 3), (1,), (8, 1, 1), (70001,), (1, 1, 1, 1)]


def tensors(dtype: torch.dtype, device: str, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_exact_as_eager(dtype: torch.dtype, device: str, as_exact_as_eager: Callable) -> None:
    gradients = tensors(dtype, device, 1)
    ours, eager = tensors(dtype, device, 0), tensors(dtype, device, 0)
    exact = [p.to(torch.float64, copy=True) for p in eager]
    largest = kernels.max_normalized_update(ours, gradients, 1e-2)
    expected = reference.max_normalized_update(eager, gradients, 1e-2)
    reference.max_normalized_update(exact, [g.double() for g in gradients], 1e-2)
    assert torch.equal(largest, expected)
    assert largest.dtype == dtype
    as_exact_as_eager(ours, eager, exact)


def test_largest_element_moves_by_the_learning_rate(device: str) -> None:
    parameters, gradients = tensors(torch.float64, device, 0), tensors(torch.float64, device, 1)
    gradients[2][0] = -50.0  # a tensor of one element holds the maximum of all
    before = [p.clone() for p in parameters]
    assert kernels.max_normalized_update(parameters, gradients, 1e-4) == 50.0
    assert (parameters[2] - before[2]).item() == pytest.approx(1e-4, rel=1e-9)
    for p, old, g in zip(parameters, before, gradients, strict=True):
        torch.testing.assert_close(p, old - 1e-4 * g / 50.0, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("function", [kernels.max_normalized_update, reference.max_normalized_update])
def test_zero_gradient_changes_nothing(function: Callable, device: str) -> None:
    parameters = tensors(torch.float32, device, 0)
    before = [p.clone() for p in parameters]
    assert function(parameters, [torch.zeros_like(p) for p in parameters], 1.0) == 0
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("function", [kernels.max_normalized_update, reference.max_normalized_update])
def test_a_gradient_that_is_not_finite_is_reported_and_not_applied(
    function: Callable, value: float, device: str
) -> None:
    parameters, gradients = tensors(torch.float32, device, 0), tensors(torch.float32, device, 1)
    before = [p.clone() for p in parameters]
    gradients[4][777] = value
    gradients[0][0] = math.inf
    largest = function(parameters, gradients, 1e-2)
    assert largest.isnan() if math.isnan(value) else largest == math.inf
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


def test_many_tensors(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(1 + i % 5, generator=generator).to(device) for i in range(100)]
    gradients = [torch.randn(p.shape, generator=generator).to(device) for p in parameters]
    exact = [p.clone() for p in parameters]
    largest = kernels.max_normalized_update(parameters, gradients, 1e-2)
    assert torch.equal(largest, reference.max_normalized_update(exact, gradients, 1e-2))
    torch.testing.assert_close(parameters, exact)


def test_layouts(device: str) -> None:
    """Parameters in channels_last, gradients in another layout, a parameter that is a slice."""
    parameters = [torch.randn(4, 3, 3, 3, device=device), torch.randn(4, 3, 3, 3, device=device)]
    storage = torch.randn(5, 6, device=device)
    gradients = [torch.randn_like(p) for p in (*parameters, storage[:, ::2])]
    exact = [p.clone() for p in (*parameters, storage[:, ::2])]
    untouched = storage[:, 1::2].clone()
    reference.max_normalized_update(exact, gradients, 0.5)
    parameters[0] = parameters[0].contiguous(memory_format=torch.channels_last)
    gradients[1] = gradients[1].contiguous(memory_format=torch.channels_last)
    kernels.max_normalized_update([*parameters, storage[:, ::2]], gradients, 0.5)
    torch.testing.assert_close([*parameters, storage[:, ::2]], exact)
    assert torch.equal(storage[:, 1::2], untouched)


def test_leaves_are_updated_and_a_stale_graph_is_noticed(device: str) -> None:
    x = torch.randn(5, device=device, requires_grad=True)
    y = (x * x).sum()
    kernels.max_normalized_update([x], [torch.ones_like(x)], 0.1)
    assert x.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_parameters_and_gradients_of_two_types(device: str) -> None:
    parameter = torch.randn(9, device=device)
    gradient = torch.randn(9, device=device).half()
    exact = parameter.double() - 0.1 * gradient.double() / gradient.double().abs().max()
    kernels.max_normalized_update([parameter], [gradient], 0.1)
    torch.testing.assert_close(parameter.double(), exact, rtol=1e-6, atol=1e-7)


def test_under_compile(device: str) -> None:
    parameters, gradients = tensors(torch.float32, device, 0), tensors(torch.float32, device, 1)
    exact = [p.clone() for p in parameters]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def update(parameters: list[Tensor], gradients: list[Tensor]) -> Tensor:
        return kernels.max_normalized_update(parameters, gradients, 1e-2) * 2

    assert torch.equal(update(parameters, gradients), 2 * reference.max_normalized_update(exact, gradients, 1e-2))
    torch.testing.assert_close(parameters, exact)


@pytest.mark.parametrize(
    ("parameters", "gradients", "error", "message"),
    [
        ([], [], ValueError, "got 0 parameters and 0 gradients"),
        ([(3,)], [(3,), (3,)], ValueError, "got 1 parameters and 2 gradients"),
        ([(3,), (2, 2)], [(3,), (4,)], ValueError, r"gradient 1 has shape \(4,\); expected \(2, 2\)"),
        ([(3,), (0, 2)], [(3,), (0, 2)], ValueError, "parameter 1 is empty"),
    ],
)
def test_wrong_shapes(parameters: list, gradients: list, error: type, message: str, device: str) -> None:
    lists = [[torch.ones(s, device=device) for s in shapes] for shapes in (parameters, gradients)]
    with pytest.raises(error, match=message):
        kernels.max_normalized_update(*lists, 0.1)


def test_wrong_types(device: str) -> None:
    x = torch.ones(3, device=device)
    with pytest.raises(TypeError, match=r"gradient 0 is torch.int64; expected float16"):
        kernels.max_normalized_update([x], [x.long()], 0.1)
    with pytest.raises(TypeError, match=r"parameter 1 is torch.float64; expected torch.float32, as parameter 0"):
        kernels.max_normalized_update([x, x.double()], [x, x], 0.1)
    with pytest.raises(ValueError, match=f"gradient 0 is on meta; expected {device}"):
        kernels.max_normalized_update([x], [x.to("meta")], 0.1)
