"""Gated feed-forward network (GDFN of Restormer), one launch.

    y = x + output(GELU(gate) * value),  [gate | value] = dense 3x3 convolution of `a`
with a the layer norm of x (in the attention fusion module: x itself). The hidden channels, twice or four times C, are
worked on in chunks of 32 and never reach memory. The layer norm that the next block begins with is written with y.

GELU(x) = x Phi(x). For float32 operands Phi is computed from erf. For float16 operands it is
    GELU(x) = max(x, 0) - |x| (1 - Phi(|x|))
    1 - Phi(z) = exp(-z^2 / 2) (b1 t + b2 t^2 + ... + b5 t^5) / sqrt(2 pi),  t = 1 / (1 + 0.2316419 z)
(Abramowitz and Stegun, Handbook of Mathematical Functions, formula 26.2.17), with an error in Phi below 7.5e-8: 14
instructions where erf takes 32, which would be as many as the whole convolution.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.layer_norm import normalise
from kernels.stencil import launch_device
from kernels.tiles import Tile, conv3x3, tile_for, tile_pixels

CHUNK = 32  # hidden channels that a program works on at a time


class FeedForward(NamedTuple):
    """Weights as the kernel reads them."""

    expand: Tensor  # (hidden / 32, 9, C, 64): the gates of 32 hidden channels, then their values
    output: Tensor  # (hidden, C)


def fold_feed_forward(gate: Tensor, value: Tensor, output: Tensor, operands: torch.dtype) -> FeedForward:
    """gate, value: dense convolutions (9, C, hidden); output: (C, hidden, 1, 1) weights of the 1x1 convolution."""
    chunks = torch.stack((gate, value)).unflatten(3, (-1, CHUNK))  # (2, 9, C, hidden / 32, 32)
    expand = chunks.permute(3, 1, 2, 0, 4).flatten(3)
    return FeedForward(expand.to(operands).contiguous(), output.detach().flatten(1).T.to(operands).contiguous())


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    if EXACT:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    z = tl.abs(x)
    t = 1.0 + 0.2316419 * z
    t = tl.rsqrt(t * t)  # one instruction, a division takes five
    # b1 to b5, each divided by sqrt(2 pi)
    tail = 0.127414796 + t * (-0.142248368 + t * (0.710706871 + t * (-0.726576014 + t * 0.530702714)))
    return tl.maximum(x, 0.0) - z * t * tail * tl.exp2(-0.7213475204444817 * x * x)


@triton.jit(do_not_specialize=["H", "W", "chunks"])
def feed_forward_kernel(
    a_ptr, x_ptr, expand_ptr, output_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr, normalised_ptr, H, W, chunks,
    C: tl.constexpr, CHUNK: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = output_ptr.dtype.element_ty == tl.float32
    channel = tl.arange(0, C)
    hidden = tl.arange(0, CHUNK)
    image = tl.program_id(1).to(tl.int64) * H * W * C
    row, col = tile_pixels(tl.program_id(0), W, HEIGHT, WIDTH)
    total = tl.zeros((HEIGHT * WIDTH, C), tl.float32)
    for chunk in tl.range(0, chunks, disable_licm=True):
        both = conv3x3(a_ptr + image, expand_ptr + chunk * (18 * C * CHUNK), row, col, H, W, C, 2 * CHUNK)
        gate, value = both.reshape(HEIGHT * WIDTH, 2, CHUNK).permute(0, 2, 1).split()
        gated = (gelu(gate, EXACT) * value).to(output_ptr.dtype.element_ty)
        output = tl.load(output_ptr + (chunk * CHUNK + hidden)[:, None] * C + channel[None, :])
        total = tl.dot(gated, output, total, input_precision="ieee")
    inside = ((row < H) & (col < W))[:, None]
    offsets = image + (row * W + col)[:, None] * C + channel[None, :]
    y = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) + total
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, y, mask=inside)
    if normalised_ptr is not None:
        normalised = normalise(y.to(tl.float32), norm_weight_ptr, norm_bias_ptr, C)
        tl.store(normalised_ptr + offsets, normalised.to(normalised_ptr.dtype.element_ty), mask=inside)


def gated_feed_forward(
    a: Tensor,
    x: Tensor,
    weights: FeedForward,
    next_norm: tuple[Tensor, Tensor] | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x + the feed-forward of a, and its layer norm in the operands' type where the next one's weights are given.

    a, x: contiguous (N, H, W, C); next_norm: weight and bias (C,) float32.
    """
    n, height, width, channels = x.shape
    operands = weights.output.dtype
    tile = tile or tile_for("feed_forward", x, operands)
    y = torch.empty_like(x)
    normalised = None if next_norm is None else torch.empty_like(x, dtype=operands)
    with launch_device(x):
        feed_forward_kernel[(tile.count(height, width), n)](
            a, x, *weights, *(next_norm or (None, None)), y, normalised,
            height, width, weights.output.shape[0] // CHUNK,
            C=channels, CHUNK=CHUNK, HEIGHT=tile.height, WIDTH=tile.width, num_warps=tile.num_warps,
            num_stages=1,
        )  # fmt: skip
    return y, normalised
