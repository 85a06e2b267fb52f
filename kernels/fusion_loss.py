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

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.aot_entry import AotEntry
from kernels.operation import Operation, Tensors
from kernels.stencil import (
    Strips,
    accumulator,
    gradient,
    load,
    on_device,
    row_limit,
    row_parts,
    sign,
    sobel,
    strips,
    total,
    wide_row_parts,
    zero_parts,
)


@triton.jit
def _residual(f0, f1, f2, a0, a1, a2, b0, b1, b2, va, vb):
    """R sign(Sobel_x F), R sign(Sobel_y F) and the gradient term's summand, from the (h, m) of three rows."""
    sx, sy = sobel(f0, f1, f2)
    fused = tl.abs(sx) + tl.abs(sy)
    ra = va * (gradient(a0, a1, a2) - fused)
    rb = vb * (gradient(b0, b1, b2) - fused)
    residual = va * ra + vb * rb
    return residual * sign(sx), residual * sign(sy), ra * ra + rb * rb


@triton.jit(do_not_specialize=["ROWS", "H", "W"])
def _derivative_kernel(
    fused_ptr, a_ptr, b_ptr, w_ptr, v_ptr,
    intensity_cotangent_ptr, gradient_cotangent_ptr, expected_weight,
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
    steps = ROWS + 4
    if partial_ptr is None:
        intensity_cotangent = tl.load(intensity_cotangent_ptr).to(ACC)
        gradient_cotangent = tl.load(gradient_cotangent_ptr).to(ACC)
        written = (intensity_cotangent == 1.0) & (gradient_cotangent == expected_weight)
        steps = tl.where(written, 0, steps)
        intensity_scale = scale * intensity_cotangent
        gradient_scale = scale * gradient_cotangent
    else:
        intensity_scale = scale
        gradient_scale = scale * expected_weight

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

        limit = row_limit(y, first, last, W)
        wa = load(w_ptr, y, x, 0, limit, W, ACC)
        wb = load(w_ptr + H * W, y, x, 0, limit, W, ACC)
        ra, rb = wa * (a - f), wb * (b - f)
        intensity += ra * ra + rb * rb
        pointwise2 = wa * ra + wb * rb

        # Weights are 0 outside the image, where there is no residual.
        limit = row_limit(y - 1, 0, H, W)
        vb_ptr = v_ptr + H * W
        va_left, vb_left = load(v_ptr, y - 1, x, -1, limit, W, ACC), load(vb_ptr, y - 1, x, -1, limit, W, ACC)
        va, vb = load(v_ptr, y - 1, x, 0, limit, W, ACC), load(vb_ptr, y - 1, x, 0, limit, W, ACC)
        va_right, vb_right = load(v_ptr, y - 1, x, 1, limit, W, ACC), load(vb_ptr, y - 1, x, 1, limit, W, ACC)
        x_left, y_left, _ = _residual(
            f0[0], f1[0], f2[0], a0[0], a1[0], a2[0], b0[0], b1[0], b2[0], va_left, vb_left
        )
        _, y_center, summand = _residual(f0[1], f1[1], f2[1], a0[1], a1[1], a2[1], b0[1], b1[1], b2[1], va, vb)
        x_right, y_right, _ = _residual(
            f0[2], f1[2], f2[2], a0[2], a1[2], a2[2], b0[2], b1[2], b2[2], va_right, vb_right
        )
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
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
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

        limit = row_limit(y, first, last, W)
        wa = load(w_ptr, y, x, 0, limit, W, ACC)
        wb = load(w_ptr + H * W, y, x, 0, limit, W, ACC)
        above_limit = row_limit(y - 1, first, last, W)
        va = load(v_ptr, y - 1, x, 0, above_limit, W, ACC)
        vb = load(v_ptr + H * W, y - 1, x, 0, above_limit, W, ACC)
        fused = gradient(f0, f1, f2)
        a_gradient = gradient(a0, a1, a2) - fused
        b_gradient = gradient(b0, b1, b2) - fused
        if partial_ptr is not None:
            ra, rb = wa * (a - f), wb * (b - f)
            intensity += ra * ra + rb * rb
            ra, rb = va * a_gradient, vb * b_gradient
            grad += ra * ra + rb * rb
        else:
            at = y * W + x
            tl.store(d_w_ptr + at, intensity_scale * wa * (a - f) * (a - f), mask=x < limit)
            tl.store(d_w_ptr + H * W + at, intensity_scale * wb * (b - f) * (b - f), mask=x < limit)
            at -= W
            tl.store(d_v_ptr + at, gradient_scale * va * a_gradient * a_gradient, mask=x < above_limit)
            tl.store(d_v_ptr + H * W + at, gradient_scale * vb * b_gradient * b_gradient, mask=x < above_limit)
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
