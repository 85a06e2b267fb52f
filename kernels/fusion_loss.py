"""Fusion loss with learned per-pixel weights, and its derivatives.

With S = A, B in turn, M = N H W and g(x) = |Sobel_x x| + |Sobel_y x|:
    intensity = 1/M sum_pixels sum_S (w_S (S - F))^2
    gradient  = 1/M sum_pixels sum_S (v_S (g(S) - g(F)))^2
    L = gi intensity + gg gradient                        (gi, gg: the cotangents)
    dL/dF   = -2/M (gi sum_S w_S^2 (S - F) + gg [Sobel_x^T (R sign(Sobel_x F)) + Sobel_y^T (R sign(Sobel_y F))])
              with R = sum_S v_S^2 (g(S) - g(F))
    dL/dw_S = 2/M gi w_S (S - F)^2                        dL/dv_S = 2/M gg v_S (g(S) - g(F))^2

Launches: both terms and dL/dF in one, their sums over the programs in a second one, which is always in the same order.
No image is written but dL/dF. It needs gi and gg, which are known only in the backward pass: the forward pass takes
(1, gradient_weight), and the launch of the backward pass finds on the device that these are the cotangents and ends at
once, or computes dL/dF anew with the right ones. Gradients in A and B, which training never asks for, come from plain
PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.aot_entry import AotEntry, pointers
from kernels.operation import Operation, Tensors
from kernels.stencil import (
    SUM_BLOCK,
    TRITON_TYPE,
    Strips,
    accumulator,
    contiguous,
    gradient,
    gradient_and_signs,
    launch_device,
    load_pair,
    load_wide_pair,
    program_index,
    promoted,
    read_bytes,
    row_limit,
    row_parts,
    strips,
    total,
    wide_row_parts,
    zero_parts,
)


@triton.jit
def _residual(f0, f1, f2, a0, a1, a2, b0, b1, b2, v):
    """R sign(Sobel_x F), R sign(Sobel_y F) and the gradient term's summand, from the (h, m) of three rows."""
    fused, sign_x, sign_y = gradient_and_signs(f0, f1, f2)
    ra = v[0] * (gradient(a0, a1, a2) - fused)
    rb = v[1] * (gradient(b0, b1, b2) - fused)
    residual = v[0] * ra + v[1] * rb
    return residual * sign_x, residual * sign_y, ra * ra + rb * rb


@triton.jit(do_not_specialize=["ROWS", "H", "W"])
def _derivative_kernel(
    fused_ptr, a_ptr, b_ptr, w_ptr, v_ptr,
    intensity_cotangent_ptr, gradient_cotangent_ptr, expected_weight: tl.float64,
    partial_ptr, d_fused_ptr,
    ROWS, H, W,
    COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dL/dF, and both terms' partial sums where partial_ptr is given (the forward pass, without cotangents)."""
    x = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * ROWS
    last = tl.minimum(first + ROWS, H)
    image = tl.program_id(2).to(tl.int64) * H * W
    fused_ptr += image
    a_ptr += image
    b_ptr += image
    d_fused_ptr += image
    w_ptr += 2 * image
    v_ptr += 2 * image
    scale = -2.0 / (tl.num_programs(2).to(ACC) * H * W)
    weight = tl.full((), expected_weight, ACC)
    steps = ROWS + 4
    if partial_ptr is None:
        intensity_cotangent = tl.load(intensity_cotangent_ptr).to(ACC)
        gradient_cotangent = tl.load(gradient_cotangent_ptr).to(ACC)
        written = (intensity_cotangent == 1.0) & (gradient_cotangent == weight)
        steps = tl.where(written, 0, steps)
        intensity_scale = scale * intensity_cotangent
        gradient_scale = scale * gradient_cotangent
    else:
        intensity_scale = scale
        gradient_scale = scale * weight

    zero = tl.zeros((COLUMNS,), ACC)
    intensity = zero
    grad = zero
    # Rows y - 2 and y - 1 of everything that a later row needs; row y is loaded.
    f0, f1 = zero_parts(zero), zero_parts(zero)
    a0, a1 = zero_parts(zero), zero_parts(zero)
    b0, b1 = zero_parts(zero), zero_parts(zero)
    difference0, difference1, smooth0, smooth1, pointwise0, pointwise1 = zero, zero, zero, zero, zero, zero
    for step in range(steps):
        y = first + step - 2
        f2, f = wide_row_parts(fused_ptr, y, x, H, W, ACC)
        a2, a = wide_row_parts(a_ptr, y, x, H, W, ACC)
        b2, b = wide_row_parts(b_ptr, y, x, H, W, ACC)

        w = load_pair(w_ptr, y, x, row_limit(y, first, last, W), H, W, ACC)
        ra, rb = w[0] * (a - f), w[1] * (b - f)
        intensity += ra * ra + rb * rb
        pointwise2 = w[0] * ra + w[1] * rb

        # The weights outside the image are 0, as is the residual there.
        v = load_wide_pair(v_ptr, y - 1, x, row_limit(y - 1, 0, H, W), H, W, ACC)
        x_left, y_left, _ = _residual(f0[0], f1[0], f2[0], a0[0], a1[0], a2[0], b0[0], b1[0], b2[0], v[0])
        _, y_center, summand = _residual(f0[1], f1[1], f2[1], a0[1], a1[1], a2[1], b0[1], b1[1], b2[1], v[1])
        x_right, y_right, _ = _residual(f0[2], f1[2], f2[2], a0[2], a1[2], a2[2], b0[2], b1[2], b2[2], v[2])
        grad += tl.where((y > first) & (y <= last), summand, 0.0)

        difference2 = x_left - x_right
        smooth2 = y_left + 2.0 * y_center + y_right
        adjoint = difference0 + 2.0 * difference1 + difference2 + smooth0 - smooth2
        d_fused = intensity_scale * pointwise0 + gradient_scale * adjoint
        tl.store(d_fused_ptr + (y - 2) * W + x, d_fused, mask=x < row_limit(y - 2, first, last, W))

        f0, f1, a0, a1, b0, b1 = f1, f2, a1, a2, b1, b2
        difference0, difference1, smooth0, smooth1 = difference1, difference2, smooth1, smooth2
        pointwise0, pointwise1 = pointwise1, pointwise2

    if partial_ptr is not None:
        _store_partials(partial_ptr, intensity, grad)


@triton.jit
def _store_partials(partial_ptr, intensity, grad):
    program, programs = program_index()
    tl.store(partial_ptr + program, tl.sum(intensity))
    tl.store(partial_ptr + programs + program, tl.sum(grad))


@triton.jit(do_not_specialize=["ROWS", "H", "W"])
def _pointwise_kernel(
    fused_ptr, a_ptr, b_ptr, w_ptr, v_ptr,
    intensity_cotangent_ptr, gradient_cotangent_ptr,
    partial_ptr, d_w_ptr, d_v_ptr,
    ROWS, H, W,
    COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Both terms' partial sums where partial_ptr is given; else dL/dw and dL/dv."""
    x = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * ROWS
    last = tl.minimum(first + ROWS, H)
    image = tl.program_id(2).to(tl.int64) * H * W
    fused_ptr += image
    a_ptr += image
    b_ptr += image
    w_ptr += 2 * image
    v_ptr += 2 * image
    if partial_ptr is None:
        d_w_ptr += 2 * image
        d_v_ptr += 2 * image
        scale = 2.0 / (tl.num_programs(2).to(ACC) * H * W)
        intensity_scale = scale * tl.load(intensity_cotangent_ptr).to(ACC)
        gradient_scale = scale * tl.load(gradient_cotangent_ptr).to(ACC)

    zero = tl.zeros((COLUMNS,), ACC)
    intensity = zero
    grad = zero
    f0, f1, a0, a1, b0, b1 = (zero, zero), (zero, zero), (zero, zero), (zero, zero), (zero, zero), (zero, zero)
    for step in range(ROWS + 2):
        y = first + step - 1
        f2, f = row_parts(fused_ptr, y, x, H, W, ACC)
        a2, a = row_parts(a_ptr, y, x, H, W, ACC)
        b2, b = row_parts(b_ptr, y, x, H, W, ACC)

        limit, above_limit = row_limit(y, first, last, W), row_limit(y - 1, first, last, W)
        w = load_pair(w_ptr, y, x, limit, H, W, ACC)
        v = load_pair(v_ptr, y - 1, x, above_limit, H, W, ACC)
        fused = gradient(f0, f1, f2)
        a_gradient = gradient(a0, a1, a2) - fused
        b_gradient = gradient(b0, b1, b2) - fused
        if partial_ptr is not None:
            ra, rb = w[0] * (a - f), w[1] * (b - f)
            intensity += ra * ra + rb * rb
            ra, rb = v[0] * a_gradient, v[1] * b_gradient
            grad += ra * ra + rb * rb
        else:
            at = y * W + x
            tl.store(d_w_ptr + at, intensity_scale * w[0] * (a - f) * (a - f), mask=x < limit)
            tl.store(d_w_ptr + H * W + at, intensity_scale * w[1] * (b - f) * (b - f), mask=x < limit)
            at -= W
            tl.store(d_v_ptr + at, gradient_scale * v[0] * a_gradient * a_gradient, mask=x < above_limit)
            tl.store(d_v_ptr + H * W + at, gradient_scale * v[1] * b_gradient * b_gradient, mask=x < above_limit)
        f0, f1, a0, a1, b0, b1 = f1, f2, a1, a2, b1, b2

    if partial_ptr is not None:
        _store_partials(partial_ptr, intensity, grad)


@triton.jit(do_not_specialize=["programs", "N", "H", "W"])
def _sum_kernel(partial_ptr, intensity_ptr, gradient_ptr, programs, N, H, W, BLOCK: tl.constexpr):
    """Means over the image from the programs' partial sums; one program."""
    intensity = total(partial_ptr, programs, BLOCK)
    grad = total(partial_ptr + programs, programs, BLOCK)
    pixels = N.to(intensity.dtype) * H * W
    tl.store(intensity_ptr, intensity / pixels)
    tl.store(gradient_ptr, grad / pixels)


_NEVER = float("nan")  # a weight that no cotangent equals


def forward(
    inputs: Tensors, gradient_weight: float | None, wanted: Sequence[bool], cut: Strips | None = None
) -> tuple[Tensors, Tensors]:
    """((intensity, gradient), (dL/dF at the cotangents (1, gradient_weight),) or ()). `cut`: for tests."""
    fused, a, b, w, v = inputs = contiguous(inputs)
    n, _, height, width = fused.shape
    cut = cut or strips(fused)
    acc = accumulator(inputs)
    partials = fused.new_empty((2, cut.programs), dtype=acc)
    intensity, grad = (fused.new_empty((), dtype=promoted(inputs)) for _ in range(2))
    kept: Tensors = ()
    with launch_device(fused):
        if wanted[0] and gradient_weight is not None:
            kept = (torch.empty_like(fused),)
            _derivative_kernel[cut.grid](
                fused, a, b, w, v, None, None, gradient_weight, partials, kept[0], cut.rows, height, width,
                COLUMNS=cut.columns, ACC=TRITON_TYPE[acc], num_warps=cut.num_warps, num_stages=1,
            )  # fmt: skip
        else:
            _pointwise_kernel[cut.grid](
                fused, a, b, w, v, None, None, partials, None, None, cut.rows, height, width,
                COLUMNS=cut.columns, ACC=TRITON_TYPE[acc], num_warps=cut.num_warps, num_stages=1,
            )  # fmt: skip
        _sum_kernel[(1,)](partials, intensity, grad, cut.programs, n, height, width, BLOCK=SUM_BLOCK, num_stages=1)
    return (intensity, grad), kept


def backward(
    cotangents: Tensors,
    inputs: Tensors,
    gradient_weight: float | None,
    needs: Sequence[bool],
    kept: Tensors,
    cut: Strips | None = None,
) -> Tensors:
    """Gradients of the inputs where `needs` is true; dL/dF in the kept image where there is one."""
    fused, a, b, w, v = tensors = contiguous(inputs)
    _, _, height, width = fused.shape
    cut = cut or strips(fused)
    acc = accumulator(tensors)
    gradients: list[Tensor | None] = [None] * 5
    with launch_device(fused):
        if needs[0]:
            gradients[0] = kept[0] if kept else torch.empty_like(fused)
            expected = gradient_weight if kept and gradient_weight is not None else _NEVER
            _derivative_kernel[cut.grid](
                fused, a, b, w, v, *cotangents, expected, None, gradients[0], cut.rows, height, width,
                COLUMNS=cut.columns, ACC=TRITON_TYPE[acc], num_warps=cut.num_warps, num_stages=1,
            )  # fmt: skip
        if needs[3] or needs[4]:
            gradients[3:] = torch.empty_like(w), torch.empty_like(v)
            _pointwise_kernel[cut.grid](
                fused, a, b, w, v, *cotangents, None, gradients[3], gradients[4], cut.rows, height, width,
                COLUMNS=cut.columns, ACC=TRITON_TYPE[acc], num_warps=cut.num_warps, num_stages=1,
            )  # fmt: skip
    if needs[1] or needs[2]:
        gradients[1:3] = OPERATION.derivative(cotangents, inputs, gradient_weight, (False, True, True, False, False))
    return tuple(g for g, needed in zip(gradients, needs, strict=True) if needed and g is not None)


OPERATION = Operation("fusion_loss", 2, reference.fusion_loss, forward, backward)


def aot_entries() -> list[AotEntry]:
    """Both shape classes (images up to 64 columns and wider ones), float32 as in training, and float16."""
    dims = {"ROWS": "i32", "H": "i32", "W": "i32"}

    def images(pointer: str) -> dict[str, str]:
        return dict.fromkeys(("fused_ptr", "a_ptr", "b_ptr", "w_ptr", "v_ptr"), pointer)

    def entry(
        name: str, kernel: Any, signature: dict[str, str], columns: int, absent: Sequence[str], least: float,
        moved: float, max_registers: int, min_occupancy: float,
    ) -> AotEntry:  # fmt: skip
        constexprs = {"COLUMNS": columns, "ACC": tl.float32} | dict.fromkeys(absent)
        return AotEntry(
            f"fusion_loss/{name}", kernel, signature | dims, constexprs, columns // 32, pointers(signature),
            least, moved, _EAGER_LAUNCHES, 3, min_occupancy, max_registers,
        )  # fmt: skip

    def derivative(name: str, forward: bool, columns: int, pointer: str) -> AotEntry:
        cotangents = {"intensity_cotangent_ptr": pointer, "gradient_cotangent_ptr": pointer}
        outputs = {"d_fused_ptr": pointer} | ({"partial_ptr": "*fp32"} if forward else cotangents)
        absent = tuple(cotangents) if forward else ("partial_ptr",)
        element = _BYTES[pointer]
        moved = 3 * read_bytes(columns, 2, element) + 2 * read_bytes(columns, 1, element) + 3 * element
        signature = images(pointer) | {"expected_weight": "fp64"} | outputs
        return entry(name, _derivative_kernel, signature, columns, absent, 8 * element, moved, 88, 0.4)

    cotangents = dict.fromkeys(("intensity_cotangent_ptr", "gradient_cotangent_ptr"), "*fp32")
    weights = dict.fromkeys(("d_w_ptr", "d_v_ptr"), "*fp32")
    partial = {"partial_ptr": "*fp32"}
    reads = 3 * read_bytes(128, 1) + 4 * 4.0
    sums = {"partial_ptr": "*fp32", "intensity_ptr": "*fp32", "gradient_ptr": "*fp32"}
    counts = {"programs": "i32", "N": "i32", "H": "i32", "W": "i32"}
    return [
        derivative("loss and derivative/fp32", True, 128, "*fp32"),
        derivative("loss and derivative/fp32, narrow", True, 64, "*fp32"),
        derivative("loss and derivative/fp16", True, 128, "*fp16"),
        derivative("derivative/fp32", False, 128, "*fp32"),
        derivative("derivative/fp32, narrow", False, 64, "*fp32"),
        entry(
            "loss/fp32", _pointwise_kernel, images("*fp32") | partial, 128, (*cotangents, *weights),
            28, reads, 48, 0.8,
        ),
        entry(
            "derivative in the weights/fp32", _pointwise_kernel, images("*fp32") | cotangents | weights, 128,
            tuple(partial), 44, reads + 16, 48, 0.8,
        ),
        AotEntry(
            "fusion_loss/sum", _sum_kernel, sums | counts, {"BLOCK": SUM_BLOCK}, 4, pointers(sums), 0, 0,
            _EAGER_LAUNCHES, 3, 0.8, 48,
        ),
    ]  # fmt: skip


_BYTES = {"*fp32": 4, "*fp16": 2}
# Loss and derivative in F, counted by kernels.bench; ours: loss and derivative, sum, end of the backward pass.
_EAGER_LAUNCHES = 39
