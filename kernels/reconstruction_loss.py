"""Reconstruction loss and its derivatives in the rebuilt images.

With A^, B^ the rebuilt images, M = N H W and g(x) = |Sobel_x x| + |Sobel_y x|:
    L = 1/M sum_pixels max(|A - A^|, |B - B^|)^2 + 1/M sum_pixels max(|g(A) - g(A^)|, |g(B) - g(B^)|)^2
    dL/dA^ = -2/M (h (A - A^) + Sobel_x^T (R sign(Sobel_x A^)) + Sobel_y^T (R sign(Sobel_y A^)))
             with R = k (g(A) - g(A^))
where h and k are 1 if A's side is the larger one of its maximum, 1/2 if both are equal, 0 else; B^ alike.

Launches: the loss and both derivatives in one, the sum over the programs in a second one, which is always in the same
order. The derivatives are those for a cotangent of 1; the launch of the backward pass finds on the device that this is
the cotangent and ends at once, or computes them anew. Gradients in A and B, which training never asks for, come from
plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

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
def _shares(da, db):
    """max(|da|, |db|)^2, and h da and k db: 0 where the other is larger, half where both are equal."""
    a, b = tl.abs(da), tl.abs(db)
    largest = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    a_share = tl.where(a < b, 0.0, tl.where(a == b, 0.5 * da, da))
    b_share = tl.where(b < a, 0.0, tl.where(a == b, 0.5 * db, db))
    return largest * largest, a_share, b_share


@triton.jit
def _residual(a0, a1, a2, b0, b1, b2, p0, p1, p2, q0, q1, q2, inside):
    """R sign(Sobel_x .), R sign(Sobel_y .) of A^ and of B^, and the summand; p, q: (h, m) of the rows of A^ and B^."""
    a_hat, a_sign_x, a_sign_y = gradient_and_signs(p0, p1, p2)
    b_hat, b_sign_x, b_sign_y = gradient_and_signs(q0, q1, q2)
    da = tl.where(inside, gradient(a0, a1, a2) - a_hat, 0.0)
    db = tl.where(inside, gradient(b0, b1, b2) - b_hat, 0.0)
    summand, da, db = _shares(da, db)
    return da * a_sign_x, da * a_sign_y, db * b_sign_x, db * b_sign_y, summand


@triton.jit(do_not_specialize=["kept", "ROWS", "H", "W"])
def _derivative_kernel(
    a_ptr, b_ptr, a_hat_ptr, b_hat_ptr, cotangent_ptr, kept, partial_ptr, d_a_hat_ptr, d_b_hat_ptr,
    ROWS, H, W,
    COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dL/dA^ and dL/dB^, and the partial sums where partial_ptr is given (the forward pass, without cotangent).

    kept: 1 where both images are there already for the cotangent 1.
    """
    x = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * ROWS
    last = tl.minimum(first + ROWS, H)
    image = tl.program_id(2).to(tl.int64) * H * W
    a_ptr += image
    b_ptr += image
    a_hat_ptr += image
    b_hat_ptr += image
    d_a_hat_ptr += image
    d_b_hat_ptr += image
    scale = -2.0 / (tl.num_programs(2).to(ACC) * H * W)
    steps = ROWS + 4
    if partial_ptr is None:
        cotangent = tl.load(cotangent_ptr).to(ACC)
        steps = tl.where((cotangent == 1.0) & (kept != 0), 0, steps)
        scale *= cotangent

    zero = tl.zeros((COLUMNS,), ACC)
    loss = zero
    # Rows y - 2 and y - 1 of everything that a later row needs; row y is loaded. p and q are A^ and B^.
    a0, a1 = zero_parts(zero), zero_parts(zero)
    b0, b1 = zero_parts(zero), zero_parts(zero)
    p0, p1 = zero_parts(zero), zero_parts(zero)
    q0, q1 = zero_parts(zero), zero_parts(zero)
    dp0, dp1, sp0, sp1, pp0, pp1 = zero, zero, zero, zero, zero, zero  # differences, smoothed, pointwise
    dq0, dq1, sq0, sq1, pq0, pq1 = zero, zero, zero, zero, zero, zero
    for step in range(steps):
        y = first + step - 2
        a2, a = wide_row_parts(a_ptr, y, x, H, W, ACC)
        b2, b = wide_row_parts(b_ptr, y, x, H, W, ACC)
        p2, p = wide_row_parts(a_hat_ptr, y, x, H, W, ACC)
        q2, q = wide_row_parts(b_hat_ptr, y, x, H, W, ACC)
        summand, pp2, pq2 = _shares(a - p, b - q)
        loss += tl.where((y >= first) & (y < last), summand, 0.0)

        limit = row_limit(y - 1, 0, H, W)
        px_left, py_left, qx_left, qy_left, _ = _residual(
            a0[0], a1[0], a2[0], b0[0], b1[0], b2[0], p0[0], p1[0], p2[0], q0[0], q1[0], q2[0], (x >= 1) & (x <= limit)
        )
        _, py, _, qy, summand = _residual(
            a0[1], a1[1], a2[1], b0[1], b1[1], b2[1], p0[1], p1[1], p2[1], q0[1], q1[1], q2[1], x < limit
        )
        px_right, py_right, qx_right, qy_right, _ = _residual(
            a0[2], a1[2], a2[2], b0[2], b1[2], b2[2], p0[2], p1[2], p2[2], q0[2], q1[2], q2[2], x < limit - 1
        )
        loss += tl.where((y > first) & (y <= last), summand, 0.0)

        limit = row_limit(y - 2, first, last, W)
        at = (y - 2) * W + x
        dp2, sp2 = px_left - px_right, py_left + 2.0 * py + py_right
        tl.store(d_a_hat_ptr + at, scale * (pp0 + (dp0 + 2.0 * dp1 + dp2) + (sp0 - sp2)), mask=x < limit)
        dq2, sq2 = qx_left - qx_right, qy_left + 2.0 * qy + qy_right
        tl.store(d_b_hat_ptr + at, scale * (pq0 + (dq0 + 2.0 * dq1 + dq2) + (sq0 - sq2)), mask=x < limit)

        a0, a1, b0, b1, p0, p1, q0, q1 = a1, a2, b1, b2, p1, p2, q1, q2
        dp0, dp1, sp0, sp1, pp0, pp1 = dp1, dp2, sp1, sp2, pp1, pp2
        dq0, dq1, sq0, sq1, pq0, pq1 = dq1, dq2, sq1, sq2, pq1, pq2

    if partial_ptr is not None:
        program, _ = program_index()
        tl.store(partial_ptr + program, tl.sum(loss))


@triton.jit(do_not_specialize=["ROWS", "H", "W"])
def _loss_kernel(a_ptr, b_ptr, a_hat_ptr, b_hat_ptr, partial_ptr, ROWS, H, W, COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """The partial sums alone."""
    x = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * ROWS
    last = tl.minimum(first + ROWS, H)
    image = tl.program_id(2).to(tl.int64) * H * W
    zero = tl.zeros((COLUMNS,), ACC)
    loss = zero
    a0, a1, b0, b1 = (zero, zero), (zero, zero), (zero, zero), (zero, zero)
    p0, p1, q0, q1 = (zero, zero), (zero, zero), (zero, zero), (zero, zero)
    for step in range(ROWS + 2):
        y = first + step - 1
        a2, a = row_parts(a_ptr + image, y, x, H, W, ACC)
        b2, b = row_parts(b_ptr + image, y, x, H, W, ACC)
        p2, p = row_parts(a_hat_ptr + image, y, x, H, W, ACC)
        q2, q = row_parts(b_hat_ptr + image, y, x, H, W, ACC)
        summand, _, _ = _shares(a - p, b - q)
        loss += tl.where((y >= first) & (y < last), summand, 0.0)
        _, _, _, _, summand = _residual(
            a0, a1, a2, b0, b1, b2, p0, p1, p2, q0, q1, q2, x < row_limit(y - 1, first, last, W)
        )
        loss += summand
        a0, a1, b0, b1, p0, p1, q0, q1 = a1, a2, b1, b2, p1, p2, q1, q2
    program, _ = program_index()
    tl.store(partial_ptr + program, tl.sum(loss))


@triton.jit(do_not_specialize=["programs", "N", "H", "W"])
def _sum_kernel(partial_ptr, loss_ptr, programs, N, H, W, BLOCK: tl.constexpr):
    """Mean over the pixels from the programs' partial sums; one program."""
    loss = total(partial_ptr, programs, BLOCK)
    tl.store(loss_ptr, loss / (N.to(loss.dtype) * H * W))


def forward(
    inputs: Tensors, option: float | None, wanted: Sequence[bool], cut: Strips | None = None
) -> tuple[Tensors, Tensors]:
    """((loss,), (dL/dA^, dL/dB^) or ()). `cut`: for tests."""
    a, b, a_hat, b_hat = inputs = contiguous(inputs)
    n, _, height, width = a.shape
    cut = cut or strips(a)
    acc = accumulator(inputs)
    partials = a.new_empty((cut.programs,), dtype=acc)
    loss = a.new_empty((), dtype=promoted(inputs))
    kept: Tensors = ()
    with launch_device(a):
        if wanted[2] or wanted[3]:
            kept = torch.empty_like(a_hat), torch.empty_like(b_hat)
            _derivative_kernel[cut.grid](
                a, b, a_hat, b_hat, None, 0, partials, *kept, cut.rows, height, width,
                COLUMNS=cut.columns, ACC=TRITON_TYPE[acc], num_warps=cut.num_warps, num_stages=1,
            )  # fmt: skip
        else:
            _loss_kernel[cut.grid](
                a, b, a_hat, b_hat, partials, cut.rows, height, width,
                COLUMNS=cut.columns, ACC=TRITON_TYPE[acc], num_warps=cut.num_warps, num_stages=1,
            )  # fmt: skip
        _sum_kernel[(1,)](partials, loss, cut.programs, n, height, width, BLOCK=SUM_BLOCK, num_stages=1)
    return (loss,), kept


def backward(
    cotangents: Tensors,
    inputs: Tensors,
    option: float | None,
    needs: Sequence[bool],
    kept: Tensors,
    cut: Strips | None = None,
) -> Tensors:
    """Gradients of the inputs where `needs` is true; those of A^ and B^ in the kept images where there are any."""
    a, b, a_hat, b_hat = contiguous(inputs)
    _, _, height, width = a.shape
    cut = cut or strips(a)
    acc = accumulator(inputs)
    gradients: list[Tensor | None] = [None] * 4
    if needs[2] or needs[3]:
        gradients[2:] = images = kept or (torch.empty_like(a_hat), torch.empty_like(b_hat))
        with launch_device(a):
            _derivative_kernel[cut.grid](
                a, b, a_hat, b_hat, *cotangents, int(bool(kept)), None, *images, cut.rows, height, width,
                COLUMNS=cut.columns, ACC=TRITON_TYPE[acc], num_warps=cut.num_warps, num_stages=1,
            )  # fmt: skip
    if needs[0] or needs[1]:
        gradients[:2] = OPERATION.derivative(cotangents, inputs, option, (True, True, False, False))
    return tuple(g for g, needed in zip(gradients, needs, strict=True) if needed and g is not None)


def _reference(a: Tensor, b: Tensor, a_hat: Tensor, b_hat: Tensor, option: float | None) -> Tensors:
    return (reference.reconstruction_loss(a, b, a_hat, b_hat),)


OPERATION = Operation("reconstruction_loss", 1, _reference, forward, backward)


def aot_entries() -> list[AotEntry]:
    """Both shape classes (images up to 64 columns and wider ones), float32 as in training, and float16."""
    dims = {"ROWS": "i32", "H": "i32", "W": "i32"}

    def images(pointer: str) -> dict[str, str]:
        return dict.fromkeys(("a_ptr", "b_ptr", "a_hat_ptr", "b_hat_ptr"), pointer)

    def derivative(name: str, forward: bool, columns: int, pointer: str) -> AotEntry:
        outputs = {"d_a_hat_ptr": pointer, "d_b_hat_ptr": pointer}
        given, absent = ("partial_ptr", "cotangent_ptr") if forward else ("cotangent_ptr", "partial_ptr")
        element = _BYTES[pointer]
        signature = images(pointer) | {"kept": "i32", given: "*fp32"} | outputs | dims
        return AotEntry(
            f"reconstruction_loss/{name}", _derivative_kernel, signature,
            {absent: None, "COLUMNS": columns, "ACC": tl.float32}, columns // 32, pointers(signature),
            6 * element, 4 * read_bytes(columns, 2, element) + 2 * element, _EAGER_LAUNCHES, 3, 0.4, 96,
        )  # fmt: skip

    loss = images("*fp32") | {"partial_ptr": "*fp32"} | dims
    sums = {"partial_ptr": "*fp32", "loss_ptr": "*fp32", "programs": "i32", "N": "i32", "H": "i32", "W": "i32"}
    return [
        derivative("loss and derivatives/fp32", True, 128, "*fp32"),
        derivative("loss and derivatives/fp32, narrow", True, 64, "*fp32"),
        derivative("loss and derivatives/fp16", True, 128, "*fp16"),
        derivative("derivatives/fp32", False, 128, "*fp32"),
        derivative("derivatives/fp32, narrow", False, 64, "*fp32"),
        AotEntry(
            "reconstruction_loss/loss/fp32", _loss_kernel, loss,
            {"COLUMNS": 128, "ACC": tl.float32}, 4, pointers(loss),
            16, 4 * read_bytes(128, 1), _EAGER_LAUNCHES, 3, 0.8, 48,
        ),
        AotEntry(
            "reconstruction_loss/sum", _sum_kernel, sums,
            {"BLOCK": SUM_BLOCK}, 4, pointers(sums), 0, 0, _EAGER_LAUNCHES, 3, 0.8, 48,
        ),
    ]  # fmt: skip


_BYTES = {"*fp32": 4, "*fp16": 2}
# Loss and both derivatives, counted by kernels.bench; ours: loss and derivatives, sum, end of the backward pass.
_EAGER_LAUNCHES = 75
