"""What the loss kernels share: strips of an image, Sobel parts of a row, sums over programs.

A program walks down a strip of COLUMNS columns, one column a thread, and keeps the last rows in registers; every image
row is loaded once a strip. With h = x[+1] - x[-1] and m = x[-1] + 2 x + x[+1] along a row,
    Sobel_x = h[y-1] + 2 h[y] + h[y+1]        Sobel_y = m[y+1] - m[y-1]
The adjoint has the same two forms with the signs turned, which is why it can be built from the last three rows as well.
Images are contiguous; all arithmetic is in ACC, float32 (float64 for float64 images). Nothing outside an image is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import interpreted

TRITON_TYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@dataclass(frozen=True)
class Strips:
    """How an (N, 1, H, W) image is cut: grid is (strips a row, strips a column, N)."""

    columns: int
    rows: int
    num_warps: int
    grid: tuple[int, int, int]

    @property
    def programs(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


# Rows of a strip for images of up to so many pixels in the batch. Short strips read more halo rows, but these images are
# in the second-level cache as a whole, and more programs are needed to fill the GPU.
ROWS = ((2**17, 8), (2**20, 16))
MOST_ROWS = 32


def strips(image: Tensor) -> Strips:
    """The explicit launch table. The interpreter pays for each operation of a program, so it gets one an image."""
    n, _, height, width = image.shape
    if interpreted():
        columns, rows, num_warps = triton.next_power_of_2(width), height, 1
    else:
        columns, num_warps = (64, 2) if width <= 64 else (128, 4)
        rows = next((rows for pixels, rows in ROWS if image.numel() <= pixels), MOST_ROWS)
    return cut(image, columns, rows, num_warps)


def cut(image: Tensor, columns: int, rows: int, num_warps: int) -> Strips:
    n, _, height, width = image.shape
    return Strips(columns, rows, num_warps, (triton.cdiv(width, columns), triton.cdiv(height, rows), n))


def accumulator(tensors: Sequence[Tensor]) -> torch.dtype:
    """Type of all arithmetic: float64 where an input is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


@triton.jit
def sign(x):
    """-1, 0 or 1, and 0 at 0, as in PyTorch."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)).to(x.dtype)


@triton.jit
def row_limit(y, first, last, W):
    """W where first <= y < last, else 0: the bound of a row's column mask."""
    return tl.where((y >= first) & (y < last), W, 0)


@triton.jit
def load(ptr, y, x, shift: tl.constexpr, limit, W, ACC: tl.constexpr):
    """Row y at the columns x + shift; 0 outside [0, limit)."""
    columns = x + shift
    return tl.load(ptr + y * W + columns, mask=(columns >= 0) & (columns < limit), other=0.0).to(ACC)


@triton.jit
def row_parts(ptr, y, x, H, W, ACC: tl.constexpr):
    """(h, m) of row y at the columns x, and the row itself there."""
    limit = row_limit(y, 0, H, W)
    left = load(ptr, y, x, -1, limit, W, ACC)
    center = load(ptr, y, x, 0, limit, W, ACC)
    right = load(ptr, y, x, 1, limit, W, ACC)
    return (right - left, left + 2.0 * center + right), center


@triton.jit
def wide_row_parts(ptr, y, x, H, W, ACC: tl.constexpr):
    """(h, m) of row y at x - 1, at x and at x + 1, and the row itself at x."""
    limit = row_limit(y, 0, H, W)
    left2 = load(ptr, y, x, -2, limit, W, ACC)
    left = load(ptr, y, x, -1, limit, W, ACC)
    center = load(ptr, y, x, 0, limit, W, ACC)
    right = load(ptr, y, x, 1, limit, W, ACC)
    right2 = load(ptr, y, x, 2, limit, W, ACC)
    parts = (
        (center - left2, left2 + 2.0 * left + center),
        (right - left, left + 2.0 * center + right),
        (right2 - center, center + 2.0 * right + right2),
    )
    return parts, center


@triton.jit
def sobel(above, row, below):
    """Sobel_x and Sobel_y of a row from the (h, m) of three rows."""
    return above[0] + 2.0 * row[0] + below[0], below[1] - above[1]


@triton.jit
def gradient(above, row, below):
    """|Sobel_x| + |Sobel_y|."""
    x, y = sobel(above, row, below)
    return tl.abs(x) + tl.abs(y)


@triton.jit
def total(ptr, programs, BLOCK: tl.constexpr):
    """Sum of the programs' partial sums, always in the same order."""
    sums = tl.zeros((BLOCK,), ptr.dtype.element_ty)
    for start in range(0, programs, BLOCK):
        index = start + tl.arange(0, BLOCK)
        sums += tl.load(ptr + index, mask=index < programs, other=0.0)
    return tl.sum(sums)
