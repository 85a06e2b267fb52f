"""Attention between the channels of each head (MDTA of Restormer), two launches.

    out = x + projection(softmax(temperature * q^ k^^T) v),  q, k, v = dense 3x3 convolutions of `a`
with q^ and k^ of length 1 over the H*W pixels; a is the layer norm of x.

1. gram: each program walks over its share of an image's tiles, convolves to [q | k], rounds it to the operands' type as
   an image of q and k would be, and adds [q | k]^T [q | k] to a (2C, 2C) float32 sum. Of it the products within a head
   and the squares are written: C (C / heads + 2) numbers a program. q and k never reach memory.
2. attention: each program adds up the partial sums of its image, always in the same order, and folds softmax and
   projection into one (C, C) matrix, which takes less time than a launch for it alone would. For each tile then
   v = the convolution, out = x + v matrix^T, and the layer norm of out for what follows, all in registers.

Partial sums: 256 bytes a program at 16 channels and 768 at 32, one program a multiprocessor. On an H100, 264 programs
read 132 of them each, 9 or 27 MB, from the second-level cache; on an Orin 32 read 16 each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.layer_norm import normalise
from kernels.stencil import launch_device
from kernels.tiles import Tile, conv3x3, programs_per_image, tile_for, tile_pixels

# Warps on each multiprocessor: as many as fit for gram, whose programs each write partial sums.
GRAM_WARPS = 16
ATTENTION_WARPS = 32

_LENGTH_EPS = tl.constexpr(1e-24)  # LENGTH_EPS of kernels.reference_blocks


def partial_length(channels: int, heads: int) -> int:
    """Numbers that a gram program writes: the products within heads, the squares of q, the squares of k."""
    return channels * (channels // heads + 2)


@triton.jit
def store_products(partial_ptr, products, C: tl.constexpr, HEADS: tl.constexpr):
    """Writes q_i k_j within each head, from a (2C, 2C) sum whose first C rows are of q and last C columns of k."""
    D: tl.constexpr = C // HEADS
    i = tl.arange(0, 2 * C)[:, None]
    j = tl.arange(0, 2 * C)[None, :] - C
    same_head = (i < C) & (j >= 0) & (i // D == j // D)
    tl.store(partial_ptr + i * D + j % D, products, mask=same_head)


@triton.jit
def store_squares(q_ptr, k_ptr, squares, C: tl.constexpr):
    """Writes the squares of [q | k]: those of q to q_ptr, those of k to k_ptr."""
    i = tl.arange(0, 2 * C)
    tl.store(q_ptr + i, squares, mask=i < C)
    tl.store(k_ptr + i - C, squares, mask=i >= C)


@triton.jit
def query_key(a_ptr, w_ptr, row, col, H, W, C: tl.constexpr):
    """[q | k] of a tile in the operands' type, 0 outside the image."""
    qk = conv3x3(a_ptr, w_ptr, row, col, H, W, C, 2 * C)
    return tl.where(((row < H) & (col < W))[:, None], qk, 0.0).to(w_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=["H", "W", "tiles"])
def gram_kernel(
    a_ptr, qk_ptr, partial_ptr, H, W, tiles,
    C: tl.constexpr, HEADS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = C // HEADS
    program = tl.program_id(0)
    a_ptr += tl.program_id(1).to(tl.int64) * H * W * C
    products = tl.zeros((2 * C, 2 * C), tl.float32)
    for tile in tl.range(program, tiles, tl.num_programs(0), disable_licm=True):
        row, col = tile_pixels(tile, W, HEIGHT, WIDTH)
        qk = query_key(a_ptr, qk_ptr, row, col, H, W, C)
        products = tl.dot(tl.trans(qk), qk, products, input_precision="ieee")
    partial_ptr += (tl.program_id(1) * tl.num_programs(0) + program) * (C * D + 2 * C)
    store_products(partial_ptr, products, C, HEADS)
    diagonal = tl.arange(0, 2 * C)[:, None] == tl.arange(0, 2 * C)[None, :]
    squares = tl.sum(tl.where(diagonal, products, 0.0), 1)
    store_squares(partial_ptr + C * D, partial_ptr + C * D + C, squares, C)


@triton.jit
def attention_matrix(partial_ptr, partials, temperature_ptr, projection_ptr, C: tl.constexpr, HEADS: tl.constexpr):
    """(projection softmax(temperature q^ k^^T))^T of one image, (C, C) float32. projection_ptr: (inputs, outputs)."""
    D: tl.constexpr = C // HEADS
    BLOCK: tl.constexpr = 4096 // (C * D)
    channel = tl.arange(0, C)
    product = tl.arange(0, C * D)
    products = tl.zeros((C * D,), tl.float32)
    q_squares = tl.zeros((C,), tl.float32)
    k_squares = tl.zeros((C,), tl.float32)
    for first in range(0, partials, BLOCK):
        partial = first + tl.arange(0, BLOCK)
        mask = (partial < partials)[:, None]
        base = partial_ptr + partial[:, None] * (C * D + 2 * C)
        products += tl.sum(tl.load(base + product[None, :], mask=mask, other=0.0), 0)
        q_squares += tl.sum(tl.load(base + C * D + channel[None, :], mask=mask, other=0.0), 0)
        k_squares += tl.sum(tl.load(base + C * D + C + channel[None, :], mask=mask, other=0.0), 0)
    q_length = tl.sqrt(tl.maximum(q_squares, _LENGTH_EPS))
    k_length = tl.sqrt(tl.maximum(k_squares, _LENGTH_EPS))
    # Row i of (C, D): channel i as the query, the D channels of its head as keys.
    k_length = k_length.reshape(HEADS, 1, D).broadcast_to(HEADS, D, D).reshape(C, D)
    scores = products.reshape(C, D) / (q_length[:, None] * k_length)
    scores *= tl.load(temperature_ptr + channel // D)[:, None]
    scores = tl.exp(scores - tl.max(scores, 1)[:, None])
    attention = scores / tl.sum(scores, 1)[:, None]
    attention = attention.reshape(C, 1, D).broadcast_to(C, HEADS, D).reshape(C, C)
    attention = tl.where(channel[:, None] // D == channel[None, :] // D, attention, 0.0)
    projection = tl.load(projection_ptr + channel[:, None] * C + channel[None, :])
    return tl.dot(tl.trans(attention), projection, input_precision="ieee")


@triton.jit
def attend(a_ptr, x_ptr, v_ptr, matrix, row, col, H, W, C: tl.constexpr):
    """x + matrix^T v of a tile, (pixels, C) float32. a_ptr, x_ptr: one image."""
    v = conv3x3(a_ptr, v_ptr, row, col, H, W, C, C)
    inside = ((row < H) & (col < W))[:, None]
    x = tl.load(x_ptr + (row * W + col)[:, None] * C + tl.arange(0, C)[None, :], mask=inside, other=0.0)
    return tl.dot(v.to(matrix.dtype), matrix, x.to(tl.float32), input_precision="ieee")


@triton.jit(do_not_specialize=["H", "W", "tiles", "partials"])
def attention_kernel(
    a_ptr, x_ptr, v_ptr, partial_ptr, temperature_ptr, projection_ptr, norm_weight_ptr, norm_bias_ptr,
    y_ptr, normalised_ptr, H, W, tiles, partials,
    C: tl.constexpr, HEADS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    partial_ptr += tl.program_id(1) * partials * (C * (C // HEADS) + 2 * C)
    matrix = attention_matrix(partial_ptr, partials, temperature_ptr, projection_ptr, C, HEADS)
    matrix = matrix.to(v_ptr.dtype.element_ty)
    image = tl.program_id(1).to(tl.int64) * H * W * C
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, col = tile_pixels(tile, W, HEIGHT, WIDTH)
        inside = ((row < H) & (col < W))[:, None]
        offsets = image + (row * W + col)[:, None] * C + tl.arange(0, C)[None, :]
        y = attend(a_ptr + image, x_ptr + image, v_ptr, matrix, row, col, H, W, C).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offsets, y, mask=inside)
        normalised = normalise(y.to(tl.float32), norm_weight_ptr, norm_bias_ptr, C)
        tl.store(normalised_ptr + offsets, normalised.to(normalised_ptr.dtype.element_ty), mask=inside)


def gram(a: Tensor, qk: Tensor, heads: int, tile: Tile | None = None) -> Tensor:
    """Partial sums of the products of queries and keys and of their squares.

    a: contiguous (N, H, W, C); qk: (9, C, 2C), a's type. Returns (N, programs, C (C / heads + 2)) float32.
    """
    n, height, width, channels = a.shape
    tile = tile or tile_for("gram", a, qk.dtype)
    programs = programs_per_image(a, tile, GRAM_WARPS)
    partials = a.new_empty((n, programs, partial_length(channels, heads)), dtype=torch.float32)
    with launch_device(a):
        gram_kernel[(programs, n)](
            a, qk, partials, height, width, tile.count(height, width),
            C=channels, HEADS=heads, HEIGHT=tile.height, WIDTH=tile.width, num_warps=tile.num_warps,
            num_stages=1,
        )  # fmt: skip
    return partials


def attention(
    a: Tensor,
    x: Tensor,
    v: Tensor,
    partials: Tensor,
    temperature: Tensor,
    projection: Tensor,
    norm: tuple[Tensor, Tensor],
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """x + the attention's output, and its layer norm in a's type.

    a, x: contiguous (N, H, W, C); v: (9, C, C), a's type; partials: from `gram`; temperature: (heads,); projection:
    (C inputs, C outputs); norm: weight and bias (C,). The last three are float32.
    """
    n, height, width, channels = x.shape
    tile = tile or tile_for("attention", x, v.dtype)
    programs = programs_per_image(x, tile, ATTENTION_WARPS)
    y, normalised = torch.empty_like(x), torch.empty_like(a)
    with launch_device(x):
        attention_kernel[(programs, n)](
            a, x, v, partials, temperature, projection, *norm, y, normalised,
            height, width, tile.count(height, width), partials.shape[1],
            C=channels, HEADS=temperature.numel(), HEIGHT=tile.height, WIDTH=tile.width, num_warps=tile.num_warps,
            num_stages=1,
        )  # fmt: skip
    return y, normalised
