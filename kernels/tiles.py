"""What the network blocks' kernels share: tiles of an image, and one dense 3x3 convolution on the tensor cores.

Features are contiguous (N, H, W, C), which is an (N, C, H, W) tensor in channels_last: the channels of a pixel are one
row of 16-byte loads and one row of a matrix product. A program works on a tile of HEIGHT x WIDTH pixels of one image;
what hangs over the edge is masked, so every H and W from 1 up goes.

A 1x1 convolution and the depthwise 3x3 one after it, both without bias, are one dense 3x3 convolution
    dense[tap, c, o] = depthwise[o, tap] pointwise[o, c]
whose zero padding is that of the depthwise one. It takes five to nine times the multiplications, but as nine matrix
products on the tensor cores, without an intermediate image and without any exchange between neighbouring pixels.

Operands are float16 or float32, as the folded weights are; sums are float32. float16 is for speed on every type of
features. float32 operands are multiplied exactly, without the tensor cores ("ieee", not TF32): for comparison, not for
speed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import forward_ad

from kernels.stencil import INTERPRETED

TYPES = (torch.float16, torch.bfloat16, torch.float32)
# The features of one image are addressed with 32 bits.
MOST_ELEMENTS = 2**31 - 1


@dataclass(frozen=True)
class Tile:
    """Pixels of a program's tile, and warps of a program."""

    height: int
    width: int
    num_warps: int

    def count(self, height: int, width: int) -> int:
        """Tiles of an image."""
        return triton.cdiv(height, self.height) * triton.cdiv(width, self.width)


# (operation, channels): the tiles for features and operands of two bytes; for float32 features and float16 operands;
# for float32 throughout. Each is the largest tried that spills nothing and leaves room for 12 warps on an SM of sm_87,
# sm_89, sm_90 and sm_120; `python -m kernels.aot` shows what each takes.
TILES = {
    ("gram", 16): (Tile(16, 32, 16), Tile(16, 32, 16), Tile(8, 32, 8)),
    ("gram", 32): (Tile(8, 32, 16), Tile(8, 32, 16), Tile(2, 32, 8)),
    ("fusion_gram", 16): (Tile(8, 32, 16), Tile(2, 32, 4), Tile(8, 32, 16)),
    ("attention", 16): (Tile(16, 32, 16), Tile(16, 32, 16), Tile(4, 32, 16)),
    ("attention", 32): (Tile(8, 32, 16), Tile(8, 32, 16), Tile(4, 32, 16)),
    ("fusion_attention", 16): (Tile(16, 32, 16), Tile(8, 32, 16), Tile(8, 32, 16)),
    ("feed_forward", 16): (Tile(4, 32, 8), Tile(4, 32, 8), Tile(2, 32, 4)),
    ("feed_forward", 32): (Tile(2, 32, 4), Tile(1, 32, 2), Tile(2, 32, 4)),
}
# The interpreter pays for each operation of a program: it gets few, large ones.
INTERPRETED_TILE = Tile(64, 128, 1)
SMALL_INTERPRETED_TILE = Tile(16, 64, 1)
INTERPRETED_PROGRAMS = 3


def compiled_tile(operation: str, channels: int, x: torch.dtype, operands: torch.dtype) -> Tile:
    """The launch table for features of type `x`."""
    half, mixed, exact = TILES[operation, channels]
    if operands == torch.float32:
        return exact
    return mixed if x == torch.float32 else half


def tile_for(operation: str, x: Tensor, operands: torch.dtype) -> Tile:
    """Tile for contiguous (N, H, W, C) features."""
    _, height, width, channels = x.shape
    if INTERPRETED:
        return SMALL_INTERPRETED_TILE if height * width <= 64 * 64 else INTERPRETED_TILE
    return compiled_tile(operation, channels, x.dtype, operands)


def programs_per_image(x: Tensor, tile: Tile, warps: int) -> int:
    """Programs that share the tiles of an image, so that the whole batch's put `warps` on each multiprocessor."""
    n, height, width, _ = x.shape
    programs = INTERPRETED_PROGRAMS
    if x.is_cuda:
        programs = torch.cuda.get_device_properties(x.device).multi_processor_count * warps // tile.num_warps
    return min(tile.count(height, width), triton.cdiv(programs, n))


def features(name: str, x: Tensor, channels: int, operands: torch.dtype, device: torch.device) -> Tensor:
    """Checks (N, C, H, W) features and gives them as contiguous (N, H, W, C): a view where they are channels_last.

    Raises:
        ValueError, TypeError: with what was got and what was expected.
        RuntimeError: the features require a gradient or carry a tangent, which these kernels don't have.
    """
    if x.dim() != 4 or x.shape[1] != channels or 0 in x.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected (N, {channels}, H, W), none of them 0")
    if x.dtype not in TYPES:
        raise TypeError(f"{name} is {x.dtype}; expected float16, bfloat16 or float32")
    if operands == torch.float32 != x.dtype:
        raise TypeError(f"{name} is {x.dtype}, the weights are folded to float32; expected float32, or float16 weights")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}; expected {device}, where the weights are")
    if 2 * x[0].numel() > MOST_ELEMENTS:
        raise ValueError(f"{name} has {x[0].numel()} elements an image; expected at most {MOST_ELEMENTS // 2}: cut it")
    if x.shape[0] > 65535:
        raise ValueError(f"{name} has a batch of {x.shape[0]}; expected at most 65535")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{name} requires a gradient, which the kernel has not: call it under torch.no_grad()")
    if torch._C._functorch.is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(f"{name} carries a tangent or torch.func transform, which would be lost: use the reference")
    return x.detach().permute(0, 2, 3, 1).contiguous()


def fold(pointwise: Tensor, depthwise: Tensor) -> Tensor:
    """(O, C, 1, 1) and (O, 1, 3, 3) weights as one dense convolution (9, C, O) in float32; exact for half types."""
    taps = depthwise.detach().float().reshape(-1, 9)
    return torch.einsum("ot,oc->tco", taps, pointwise.detach().float().flatten(1)).contiguous()


@triton.jit
def tile_pixels(tile, W, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Row and column of each pixel of a tile; tiles are numbered along the rows of the image."""
    pixel = tl.arange(0, HEIGHT * WIDTH)
    across = tl.cdiv(W, WIDTH)
    return tile // across * HEIGHT + pixel // WIDTH, tile % across * WIDTH + pixel % WIDTH


@triton.jit
def conv3x3(x_ptr, w_ptr, row, col, H, W, C: tl.constexpr, OUTPUTS: tl.constexpr):
    """Dense 3x3 convolution at the pixels (row, col) of one image. w_ptr: (9, C, OUTPUTS). (pixels, OUTPUTS) float32.

    Pixels outside the image count as 0. The sum at a pixel that is itself outside is of no use.
    """
    channel = tl.arange(0, C)
    output = tl.arange(0, OUTPUTS)
    total = tl.zeros((row.shape[0], OUTPUTS), tl.float32)
    # H is at least 1, which the compiler doesn't know: it would unroll this loop, load all nine taps at the beginning
    # and run out of registers.
    for dy in range(-1, 1 + tl.minimum(H, 1)):
        y = row + dy
        for step in tl.static_range(3):
            x = col + (step - 1)
            inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
            pixels = tl.load(x_ptr + (y * W + x)[:, None] * C + channel[None, :], mask=inside[:, None], other=0.0)
            tap = 3 * (dy + 1) + step
            weights = tl.load(w_ptr + (tap * C + channel)[:, None] * OUTPUTS + output[None, :])
            total = tl.dot(pixels.to(weights.dtype), weights, total, input_precision="ieee")
    return total
