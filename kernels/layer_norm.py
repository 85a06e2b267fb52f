"""Layer norm over the channels of each pixel.

    y_c = (x_c - mean) / sqrt(var + 1e-5) * weight_c + bias_c,  mean and (biased) var over the C channels of the pixel
Arithmetic is float32; the result is written in the operands' type of the convolution that reads it. Only the first
block of a chain needs this launch: the others find their layer norm written by the launch before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.stencil import INTERPRETED, launch_device

PIXELS = 64  # of a program
INTERPRETED_PIXELS = 8192  # the interpreter pays for each operation of a program

_EPS = tl.constexpr(1e-5)  # NORM_EPS of kernels.reference_blocks


@triton.jit
def normalise(x, weight_ptr, bias_ptr, C: tl.constexpr):
    """Layer norm of (pixels, C) float32 values."""
    channel = tl.arange(0, C)
    x -= (tl.sum(x, 1) / C)[:, None]
    x *= tl.rsqrt(tl.sum(x * x, 1) / C + _EPS)[:, None]
    return x * tl.load(weight_ptr + channel)[None, :] + tl.load(bias_ptr + channel)[None, :]


@triton.jit(do_not_specialize=["pixels"])
def layer_norm_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, pixels, C: tl.constexpr, PIXELS: tl.constexpr):
    image = tl.program_id(1).to(tl.int64) * pixels * C
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    offsets = pixel[:, None] * C + tl.arange(0, C)[None, :]
    mask = (pixel < pixels)[:, None]
    x = tl.load(x_ptr + image + offsets, mask=mask, other=0.0).to(tl.float32)
    y = normalise(x, weight_ptr, bias_ptr, C)
    tl.store(y_ptr + image + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, operands: torch.dtype) -> Tensor:
    """x: contiguous (N, H, W, C); weight, bias: (C,) float32. Returns (N, H, W, C) in `operands`."""
    n, height, width, channels = x.shape
    y = torch.empty_like(x, dtype=operands)
    pixels = INTERPRETED_PIXELS if INTERPRETED else PIXELS
    with launch_device(x):
        layer_norm_kernel[(triton.cdiv(height * width, pixels), n)](
            x, weight, bias, y, height * width, C=channels, PIXELS=pixels, num_warps=4, num_stages=1
        )
    return y
