"""What the weights of the fusion loss do to its derivative along a direction: the meta-gradient at the weight maps.

With T the tangent (the derivative of F along the outer gradient), S = A, B in turn, M = N H W,
g(x) = |Sobel_x x| + |Sobel_y x|, and L_f = intensity + c gradient as in `kernels.fusion_loss`:
    d<dL_f/dF, T> / dw_S = -4/M w_S (S - F) T
    d<dL_f/dF, T> / dv_S = -4/M c v_S (g(S) - g(F)) (sign(Sobel_x F) Sobel_x T + sign(Sobel_y F) Sobel_y T)

One launch; no other image is written. Its own derivatives, which training never asks for, come from plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels import reference
from kernels.aot_entry import AotEntry
from kernels.operation import Operation, Tensors
from kernels.stencil import (
    TRITON_TYPE,
    Strips,
    accumulator,
    contiguous,
    gradient,
    gradient_and_signs,
    launch_device,
    load_pair,
    promoted,
    read_bytes,
    row_limit,
    row_parts,
    strips,
)


@triton.jit(do_not_specialize=["ROWS", "H", "W"])
def _meta_grad_kernel(
    fused_ptr, a_ptr, b_ptr, w_ptr, v_ptr, tangent_ptr, gradient_weight: tl.float64, d_w_ptr, d_v_ptr,
    ROWS, H, W,
    COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    x = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * ROWS
    last = tl.minimum(first + ROWS, H)
    image = tl.program_id(2).to(tl.int64) * H * W
    fused_ptr += image
    a_ptr += image
    b_ptr += image
    tangent_ptr += image
    w_ptr += 2 * image
    v_ptr += 2 * image
    d_w_ptr += 2 * image
    d_v_ptr += 2 * image
    scale = -4.0 / (tl.num_programs(2).to(ACC) * H * W)
    gradient_scale = scale * tl.full((), gradient_weight, ACC)

    zero = tl.zeros((COLUMNS,), ACC)
    f0, f1, a0, a1, b0, b1, t0, t1 = (
        (zero, zero), (zero, zero), (zero, zero), (zero, zero), (zero, zero), (zero, zero), (zero, zero), (zero, zero)
    )  # fmt: skip
    for step in range(ROWS + 2):
        y = first + step - 1
        f2, f = row_parts(fused_ptr, y, x, H, W, ACC)
        a2, a = row_parts(a_ptr, y, x, H, W, ACC)
        b2, b = row_parts(b_ptr, y, x, H, W, ACC)
        t2, t = row_parts(tangent_ptr, y, x, H, W, ACC)

        limit = row_limit(y, first, last, W)
        w = load_pair(w_ptr, y, x, limit, H, W, ACC)
        at = y * W + x
        tl.store(d_w_ptr + at, scale * w[0] * (a - f) * t, mask=x < limit)
        tl.store(d_w_ptr + H * W + at, scale * w[1] * (b - f) * t, mask=x < limit)

        limit = row_limit(y - 1, first, last, W)
        v = load_pair(v_ptr, y - 1, x, limit, H, W, ACC)
        fused, sign_x, sign_y = gradient_and_signs(f0, f1, f2)
        slope = sign_x * (t0[0] + 2.0 * t1[0] + t2[0]) + sign_y * (t2[1] - t0[1])
        slope *= gradient_scale
        at -= W
        tl.store(d_v_ptr + at, v[0] * (gradient(a0, a1, a2) - fused) * slope, mask=x < limit)
        tl.store(d_v_ptr + H * W + at, v[1] * (gradient(b0, b1, b2) - fused) * slope, mask=x < limit)
        f0, f1, a0, a1, b0, b1, t0, t1 = f1, f2, a1, a2, b1, b2, t1, t2


def forward(
    inputs: Tensors, gradient_weight: float | None, wanted: Sequence[bool], cut: Strips | None = None
) -> tuple[Tensors, Tensors]:
    """((dw, dv), ()). `cut`: for tests."""
    fused, a, b, w, v, tangent = inputs = contiguous(inputs)
    _, _, height, width = fused.shape
    cut = cut or strips(fused)
    acc = accumulator(inputs)
    dw = torch.empty_like(w, dtype=promoted((fused, a, b, w, tangent)))
    dv = torch.empty_like(v, dtype=promoted((fused, a, b, v, tangent)))
    with launch_device(fused):
        _meta_grad_kernel[cut.grid](
            fused, a, b, w, v, tangent, gradient_weight, dw, dv, cut.rows, height, width,
            COLUMNS=cut.columns, ACC=TRITON_TYPE[acc], num_warps=cut.num_warps, num_stages=1,
        )  # fmt: skip
    return (dw, dv), ()


def backward(
    cotangents: Tensors, inputs: Tensors, gradient_weight: float | None, needs: Sequence[bool], kept: Tensors
) -> Tensors:
    return OPERATION.derivative(cotangents, inputs, gradient_weight, needs)


OPERATION = Operation("fusion_meta_grad", 2, reference.fusion_meta_grad, forward, backward)


def aot_entries() -> list[AotEntry]:
    """Both shape classes (images up to 64 columns and wider ones), float32 as in training, and float16."""

    def entry(name: str, columns: int, pointer: str) -> AotEntry:
        names = ("fused_ptr", "a_ptr", "b_ptr", "w_ptr", "v_ptr", "tangent_ptr", "d_w_ptr", "d_v_ptr")
        scalars = {"gradient_weight": "fp64", "ROWS": "i32", "H": "i32", "W": "i32"}
        element = {"*fp32": 4, "*fp16": 2}[pointer]
        return AotEntry(
            f"fusion_meta_grad/{name}", _meta_grad_kernel, dict.fromkeys(names, pointer) | scalars,
            {"COLUMNS": columns, "ACC": tl.float32}, columns // 32, names,
            12 * element, 4 * read_bytes(columns, 1, element) + 8 * element, 23, 1, 0.5, 56,
        )  # fmt: skip

    return [entry("fp32", 128, "*fp32"), entry("fp32, narrow", 64, "*fp32"), entry("fp16", 128, "*fp16")]
