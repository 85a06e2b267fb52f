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

SUM_BLOCK = 1024  # partial sums that one step of the last reduction adds
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


# Rows of a strip for batches of up to so many pixels. Short strips read more halo rows, but such a batch is in the
# second-level cache as a whole, and more programs are needed to fill the GPU.
ROWS = ((2**17, 8), (2**20, 16))
MOST_ROWS = 32


def strips(image: Tensor) -> Strips:
    """The explicit launch table. The interpreter pays for each operation of a program, so it gets one an image."""
    height, width = image.shape[2:]
    if INTERPRETED:
        columns, rows, num_warps = triton.next_power_of_2(width), height, 1
    else:
        columns, num_warps = (64, 2) if width <= 64 else (128, 4)
        rows = next((rows for pixels, rows in ROWS if image.numel() <= pixels), MOST_ROWS)
    return cut(image, columns, rows, num_warps)


def read_bytes(columns: int, halo: int, element: int = 4) -> float:
    """Bytes a pixel that the strips read of an image when no program finds another's cache lines in the second-level
    cache: sectors of 32 bytes left and right of a strip, halo rows above and below it. A strip of 64 columns is the
    whole row. Strips of fewer rows than the most are for images that are in that cache as a whole.
    """
    across = 1.0 if columns == 64 else (columns * element + (64 if halo else 0)) / (columns * element)
    return element * across * (MOST_ROWS + 2 * halo) / MOST_ROWS


def launch_device(tensor: Tensor) -> torch.cuda.device_of:
    """Context in which kernels run on the tensor's device.

    Raises:
        RuntimeError: Triton was imported to interpret and the tensor is on a GPU, or the other way round.
    """
    if INTERPRETED and tensor.is_cuda:
        raise RuntimeError(f"TRITON_INTERPRET=1 interprets kernels on CPU tensors; got one on {tensor.device}")
    if not INTERPRETED and not tensor.is_cuda:
        raise RuntimeError(
            f"Triton was imported to compile; got a tensor on {tensor.device}. "
            "To interpret kernels set TRITON_INTERPRET=1 before Python starts"
        )
    return torch.cuda.device_of(tensor)


def cut(image: Tensor, columns: int, rows: int, num_warps: int) -> Strips:
    n, _, height, width = image.shape
    return Strips(columns, rows, num_warps, (triton.cdiv(width, columns), triton.cdiv(height, rows), n))


def accumulator(tensors: Sequence[Tensor]) -> torch.dtype:
    """Type of all arithmetic: float64 where an input is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def contiguous(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in tensors)


def promoted(tensors: Sequence[Tensor]) -> torch.dtype:
    """Type of the result in plain PyTorch."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


# The interpreter takes 0.13 ms to call a helper: few helpers, each of which does much.


@triton.jit
def row_limit(y, first, last, W):
    """W where first <= y < last, else 0: the bound of a row's column mask."""
    return tl.where((y >= first) & (y < last), W, 0)


INTERPRETED = not isinstance(row_limit, triton.JITFunction)


@triton.jit
def load_pair(ptr, y, x, limit, H, W, ACC: tl.constexpr):
    """Both maps of an image in row y at the columns x; 0 from `limit` on."""
    at = y * W + x
    return (
        tl.load(ptr + at, mask=x < limit, other=0.0).to(ACC),
        tl.load(ptr + H * W + at, mask=x < limit, other=0.0).to(ACC),
    )


@triton.jit
def load_wide_pair(ptr, y, x, limit, H, W, ACC: tl.constexpr):
    """Both maps of an image in row y: a pair at x - 1, one at x and one at x + 1; 0 outside [0, limit)."""
    at = y * W + x
    other = at + H * W
    left, right = (x >= 1) & (x <= limit), x < limit - 1
    return (
        (tl.load(ptr + at - 1, mask=left, other=0.0).to(ACC), tl.load(ptr + other - 1, mask=left, other=0.0).to(ACC)),
        (
            tl.load(ptr + at, mask=x < limit, other=0.0).to(ACC),
            tl.load(ptr + other, mask=x < limit, other=0.0).to(ACC),
        ),
        (tl.load(ptr + at + 1, mask=right, other=0.0).to(ACC), tl.load(ptr + other + 1, mask=right, other=0.0).to(ACC)),
    )


@triton.jit
def row_parts(ptr, y, x, H, W, ACC: tl.constexpr):
    """(h, m) of row y at the columns x, and the row itself there."""
    limit = tl.where((y >= 0) & (y < H), W, 0)
    at = ptr + y * W + x
    left = tl.load(at - 1, mask=(x >= 1) & (x <= limit), other=0.0).to(ACC)
    center = tl.load(at, mask=x < limit, other=0.0).to(ACC)
    right = tl.load(at + 1, mask=x < limit - 1, other=0.0).to(ACC)
    return (right - left, left + 2.0 * center + right), center


@triton.jit
def wide_row_parts(ptr, y, x, H, W, ACC: tl.constexpr):
    """(h, m) of row y at x - 1, at x and at x + 1, and the row itself at x."""
    limit = tl.where((y >= 0) & (y < H), W, 0)
    at = ptr + y * W + x
    left2 = tl.load(at - 2, mask=(x >= 2) & (x <= limit + 1), other=0.0).to(ACC)
    left = tl.load(at - 1, mask=(x >= 1) & (x <= limit), other=0.0).to(ACC)
    center = tl.load(at, mask=x < limit, other=0.0).to(ACC)
    right = tl.load(at + 1, mask=x < limit - 1, other=0.0).to(ACC)
    right2 = tl.load(at + 2, mask=x < limit - 2, other=0.0).to(ACC)
    parts = (
        (center - left2, left2 + 2.0 * left + center),
        (right - left, left + 2.0 * center + right),
        (right2 - center, center + 2.0 * right + right2),
    )
    return parts, center


@triton.jit
def zero_parts(zero):
    """`wide_row_parts` of a row outside the image."""
    return (zero, zero), (zero, zero), (zero, zero)


@triton.jit
def gradient(above, row, below):
    """g = |Sobel_x| + |Sobel_y| of a row from the (h, m) of three rows."""
    return tl.abs(above[0] + 2.0 * row[0] + below[0]) + tl.abs(below[1] - above[1])


@triton.jit
def gradient_and_signs(above, row, below):
    """g and the signs of Sobel_x and Sobel_y: -1, 0 or 1, and 0 at 0, as in PyTorch."""
    x = above[0] + 2.0 * row[0] + below[0]
    y = below[1] - above[1]
    sign_x = tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))
    sign_y = tl.where(y > 0.0, 1.0, tl.where(y < 0.0, -1.0, 0.0))
    return tl.abs(x) + tl.abs(y), sign_x, sign_y


@triton.jit
def program_index():
    """Number of this program, and how many there are."""
    index = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    return index, tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)


@triton.jit
def total(ptr, programs, BLOCK: tl.constexpr):
    """Sum of the programs' partial sums, always in the same order."""
    sums = tl.zeros((BLOCK,), ptr.dtype.element_ty)
    for start in range(0, programs, BLOCK):
        index = start + tl.arange(0, BLOCK)
        sums += tl.load(ptr + index, mask=index < programs, other=0.0)
    return tl.sum(sums)
