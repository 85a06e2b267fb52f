"""An operation made of kernel launches that keeps every transform of PyTorch.

| | first derivatives | second derivatives, forward mode |
|---|---|---|
| eager | the launches, through autograd.Function | exact, from the operation's twin in plain PyTorch |
| torch.compile | the launches, as custom operators in one graph | the twin, traced into the graph |

torch.compile can't trace an autograd.Function with a jvp, and a custom operator has no forward mode: its tangent would
silently be zero. So the eager path takes the one, the compiled path the other, and where a compiled function is
differentiated in forward mode the twin itself is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Tensors = tuple[Tensor, ...]


class Operation:
    """A function (*inputs, option) -> outputs on tensors, with launches for itself and for its first derivatives.

    Attributes:
        name: Name of the custom operator, refusion::name.
        outputs: Number of outputs.
        reference: The twin in plain PyTorch, (*inputs, option) -> outputs.
        forward: (inputs, option, wanted) -> (outputs, kept). wanted: for each input, whether a gradient will be asked
            for; kept: derivatives that it wrote on the way, which `backward` gets.
        backward: (cotangents, inputs, option, needs, kept) -> the gradients of the inputs where needs is true. It may
            overwrite and return what was kept; kept is empty where nothing was, or where it is used up.
    """

    def __init__(
        self,
        name: str,
        outputs: int,
        reference: Callable[..., Tensors],
        forward: Callable[[Tensors, float | None, Sequence[bool]], tuple[Tensors, Tensors]],
        backward: Callable[[Tensors, Tensors, float | None, Sequence[bool], Tensors], Tensors],
    ):
        self.name = name
        self.outputs = outputs
        self.reference = reference
        self.forward = forward
        self.backward = backward
        self._compiled = _custom_operator(self)

    def __call__(self, inputs: Tensors, option: float | None = None) -> Tensors:
        if torch.compiler.is_compiling():
            if forward_ad._current_level >= 0:
                return self.reference(*inputs, option)
            return tuple(self._compiled(list(inputs), option))
        wanted = tuple(x.requires_grad and torch.is_grad_enabled() for x in inputs)
        return _Forward.apply(self, option, wanted, *inputs)[: self.outputs]

    def derivative(self, cotangents: Tensors, inputs: Tensors, option: float | None, needs: Sequence[bool]) -> Tensors:
        """Gradients of the inputs where needs is true, from the twin; differentiable in cotangents and inputs."""
        _, pull_back = _vjp(lambda *x: self.reference(*x, option), inputs)
        return tuple(g for g, needed in zip(pull_back(cotangents), needs, strict=True) if needed)


def _vjp(function: Callable[..., Tensors], inputs: Tensors) -> tuple[Tensors, Callable[[Tensors], Tensors]]:
    outputs, pull_back = torch.func.vjp(function, *inputs)[:2]
    return outputs, pull_back


def tangent(function: Callable[..., Tensors], inputs: Tensors, directions: Sequence[Tensor | None]) -> Tensors:
    """Derivative of function(*inputs) along directions (None: zero), by reverse mode alone.

    The pull-back is linear in the cotangents, and its own pull-back is the derivative. So this works inside any other
    transform, where forward mode would have to be nested.
    """
    outputs, pull_back = _vjp(function, inputs)
    _, push_forward = _vjp(lambda *cotangents: pull_back(cotangents), tuple(torch.zeros_like(x) for x in outputs))
    filled = (torch.zeros_like(x) if d is None else d for x, d in zip(inputs, directions, strict=True))
    return push_forward(tuple(filled))


class _Forward(torch.autograd.Function):
    """(operation, option, wanted, *inputs) -> (*outputs, *kept)."""

    @staticmethod
    def forward(operation: Operation, option: float | None, wanted: Sequence[bool], *inputs: Tensor) -> Tensors:
        outputs, kept = operation.forward(inputs, option, wanted)
        return (*outputs, *kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.operation, ctx.option, _, *tensors = inputs
        kept = output[ctx.operation.outputs :]
        ctx.set_materialize_grads(False)  # no image of zeros for what was kept
        ctx.shapes = [(x.shape, x.dtype) for x in output[: ctx.operation.outputs]]
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(*tensors, *kept)
        ctx.save_for_forward(*tensors)
        ctx.kept = len(kept)
        ctx.used_up = False

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[3:]
        inputs, kept = ctx.saved_tensors[: len(needs)], ctx.saved_tensors[len(needs) :]
        if ctx.used_up:  # a second backward through the same graph: the first one's result belongs to its caller
            kept = ()
        ctx.used_up = True
        filled = (
            inputs[0].new_zeros(shape, dtype=dtype) if cotangent is None else cotangent
            for cotangent, (shape, dtype) in zip(cotangents, ctx.shapes, strict=False)
        )
        gradients = iter(_Backward.apply(ctx.operation, ctx.option, needs, *filled, *inputs, *kept))
        return (None, None, None, *(next(gradients) if needed else None for needed in needs))

    @staticmethod
    def jvp(ctx: Any, *directions: Any) -> tuple[Tensor | None, ...]:
        operation, option = ctx.operation, ctx.option
        inputs = ctx.saved_tensors[: len(directions) - 3]
        tangents = tangent(lambda *x: operation.reference(*x, option), inputs, directions[3:])
        return (*tangents, *[None] * ctx.kept)


class _Backward(torch.autograd.Function):
    """(operation, option, needs, *cotangents, *inputs, *kept) -> gradients of the inputs where needs is true."""

    @staticmethod
    def forward(operation: Operation, option: float | None, needs: Sequence[bool], *tensors: Tensor) -> Tensors:
        last = operation.outputs + len(needs)
        cotangents, inputs, kept = tensors[: operation.outputs], tensors[operation.outputs : last], tensors[last:]
        return operation.backward(cotangents, inputs, option, needs, kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.operation, ctx.option, ctx.needs, *tensors = inputs
        ctx.kept = len(tensors) - ctx.operation.outputs - len(ctx.needs)
        tensors = tensors[: ctx.operation.outputs + len(ctx.needs)]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor) -> tuple[Tensor | None, ...]:
        _, pull_back = _vjp(_first_derivative(ctx.operation, ctx.option, ctx.needs), ctx.saved_tensors)
        return (None, None, None, *pull_back(directions), *[None] * ctx.kept)

    @staticmethod
    def jvp(ctx: Any, *directions: Any) -> Tensors:
        tensors = ctx.saved_tensors
        function = _first_derivative(ctx.operation, ctx.option, ctx.needs)
        return tangent(function, tensors, directions[3 : 3 + len(tensors)])


def _first_derivative(operation: Operation, option: float | None, needs: Sequence[bool]) -> Callable[..., Tensors]:
    """(*cotangents, *inputs) -> gradients, in plain PyTorch."""

    def function(*tensors: Tensor) -> Tensors:
        return operation.derivative(tensors[: operation.outputs], tensors[operation.outputs :], option, needs)

    return function


def _custom_operator(operation: Operation) -> Callable[[list[Tensor], float | None], list[Tensor]]:
    """Registers refusion::NAME and refusion::NAME_backward for torch.compile."""

    def forward(inputs: Sequence[Tensor], option: float | None) -> list[Tensor]:
        return list(operation.forward(tuple(inputs), option, [False] * len(inputs))[0])

    def backward(
        cotangents: Sequence[Tensor], inputs: Sequence[Tensor], option: float | None, needs: Sequence[bool]
    ) -> list[Tensor]:
        return list(operation.backward(tuple(cotangents), tuple(inputs), option, needs, ()))

    def fake_forward(inputs: Sequence[Tensor], option: float | None) -> list[Tensor]:
        return list(operation.reference(*inputs, option))

    def fake_backward(
        cotangents: Sequence[Tensor], inputs: Sequence[Tensor], option: float | None, needs: Sequence[bool]
    ) -> list[Tensor]:
        return [
            torch.empty_like(x, memory_format=torch.contiguous_format) for x, n in zip(inputs, needs, strict=True) if n
        ]

    def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, ctx.option = inputs
        ctx.needs = [x.requires_grad for x in tensors]
        ctx.save_for_backward(*tensors)

    def differentiate(ctx: Any, cotangents: list[Tensor]) -> tuple[list[Tensor | None], None]:
        gradients = iter(backward_operator(cotangents, list(ctx.saved_tensors), ctx.option, ctx.needs))
        return [next(gradients) if needed else None for needed in ctx.needs], None

    def save_all(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        cotangents, tensors, ctx.option, ctx.needs = inputs
        ctx.save_for_backward(*cotangents, *tensors)

    def differentiate_again(ctx: Any, directions: list[Tensor]) -> tuple[list[Tensor], list[Tensor], None, None]:
        function = _first_derivative(operation, ctx.option, ctx.needs)
        gradients = _vjp(function, ctx.saved_tensors)[1](tuple(directions))
        return list(gradients[: operation.outputs]), list(gradients[operation.outputs :]), None, None

    forward_operator = torch.library.custom_op(
        f"refusion::{operation.name}", forward, mutates_args=(), schema="(Tensor[] inputs, float? option) -> Tensor[]"
    )
    forward_operator.register_fake(fake_forward)
    forward_operator.register_autograd(differentiate, setup_context=save_inputs)
    backward_operator = torch.library.custom_op(
        f"refusion::{operation.name}_backward",
        backward,
        mutates_args=(),
        schema="(Tensor[] cotangents, Tensor[] inputs, float? option, bool[] needs) -> Tensor[]",
    )
    backward_operator.register_fake(fake_backward)
    backward_operator.register_autograd(differentiate_again, setup_context=save_all)
    return forward_operator
