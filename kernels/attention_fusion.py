"""The attention fusion module without gradients, three launches.

    x1 += projection1(softmax(temperature1 q2^ k1^^T) v1), x2 += projection2(softmax(temperature2 q1^ k2^^T) v2)
    x = concat(x1, x2)
    x += output1(GELU(gates1(x)) * values1(x1)) + output2(GELU(gates2(x)) * values2(x2))

1. fusion_gram: as in `kernels.channel_attention`, with [q1 | k1] and [q2 | k2] of a tile at once; reads x1 and x2.
2. fusion_attention: the same for both sources; reads x1 and x2, writes their concatenation.
3. gated_feed_forward on the concatenation: the gates of both sources are its gates; the values, each of which sees one
   source only, are dense convolutions of all 2C channels with zeros for the other source. That is a third more
   multiplications than two separate convolutions would take, for one kernel and one load of each tap.

Bytes a pixel at 2 x 16 channels in float16: 64 + 128 + 128, where the three launches would take 384 to read and write
the 32 channels once each. There is no layer norm in this module, so the features themselves are the operands: with
float16 operands they have to be in the range of float16 (up to 65504).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot_entry import AotEntry
from kernels.channel_attention import (
    ATTENTION_WARPS,
    GRAM_WARPS,
    attend,
    attention_matrix,
    partial_length,
    query_key,
    store_products,
    store_squares,
)
from kernels.gated_feed_forward import FeedForward, fold_feed_forward, gated_feed_forward
from kernels.reference_blocks import AttentionFusionWeights
from kernels.stencil import launch_device
from kernels.tiles import Tile, compiled_tile, features, fold, programs_per_image, tile_for, tile_pixels
from kernels.transformer_block import (
    ENTRY_TYPES,
    HEADS,
    POINTERS,
    check_channels,
    check_operands,
    entry_bytes,
    entry_name,
    feed_forward_entry,
    float32,
    tile_entry,
)

CHANNELS = (16,)


@triton.jit(do_not_specialize=["H", "W", "tiles"])
def fusion_gram_kernel(
    x1_ptr, x2_ptr, qk1_ptr, qk2_ptr, partial_ptr, H, W, tiles,
    C: tl.constexpr, HEADS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = C // HEADS
    LENGTH: tl.constexpr = C * D + 2 * C
    program, programs = tl.program_id(0), tl.num_programs(0)
    image = tl.program_id(1).to(tl.int64) * H * W * C
    products = tl.zeros((2 * C, 2 * C), tl.float32)
    squares1 = tl.zeros((2 * C,), tl.float32)
    squares2 = tl.zeros((2 * C,), tl.float32)
    for tile in tl.range(program, tiles, programs, disable_licm=True):
        row, col = tile_pixels(tile, W, HEIGHT, WIDTH)
        qk1 = query_key(x1_ptr + image, qk1_ptr, row, col, H, W, C)
        squares1 += tl.sum(qk1.to(tl.float32) * qk1.to(tl.float32), 0)
        qk2 = query_key(x2_ptr + image, qk2_ptr, row, col, H, W, C)
        squares2 += tl.sum(qk2.to(tl.float32) * qk2.to(tl.float32), 0)
        products = tl.dot(tl.trans(qk1), qk2, products, input_precision="ieee")
    # The queries are swapped: source 1 is attended to with the queries of source 2.
    first_ptr = partial_ptr + (2 * tl.program_id(1) * programs + program) * LENGTH
    second_ptr = first_ptr + programs * LENGTH
    store_products(first_ptr, tl.trans(products), C, HEADS)
    store_products(second_ptr, products, C, HEADS)
    store_squares(second_ptr + C * D, first_ptr + C * D + C, squares1, C)
    store_squares(first_ptr + C * D, second_ptr + C * D + C, squares2, C)


@triton.jit(do_not_specialize=["H", "W", "tiles", "partials"])
def fusion_attention_kernel(
    x1_ptr, x2_ptr, v1_ptr, v2_ptr, partial_ptr, temperature1_ptr, temperature2_ptr, projection1_ptr, projection2_ptr,
    y_ptr, H, W, tiles, partials,
    C: tl.constexpr, HEADS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    partial_ptr += 2 * tl.program_id(1) * partials * (C * (C // HEADS) + 2 * C)
    matrix1 = attention_matrix(partial_ptr, partials, temperature1_ptr, projection1_ptr, C, HEADS)
    partial_ptr += partials * (C * (C // HEADS) + 2 * C)
    matrix2 = attention_matrix(partial_ptr, partials, temperature2_ptr, projection2_ptr, C, HEADS)
    matrix1, matrix2 = matrix1.to(v1_ptr.dtype.element_ty), matrix2.to(v2_ptr.dtype.element_ty)
    image = tl.program_id(1).to(tl.int64) * H * W * C
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, col = tile_pixels(tile, W, HEIGHT, WIDTH)
        inside = ((row < H) & (col < W))[:, None]
        offsets = 2 * image + (row * W + col)[:, None] * (2 * C) + tl.arange(0, C)[None, :]
        y1 = attend(x1_ptr + image, x1_ptr + image, v1_ptr, matrix1, row, col, H, W, C)
        tl.store(y_ptr + offsets, y1.to(y_ptr.dtype.element_ty), mask=inside)
        y2 = attend(x2_ptr + image, x2_ptr + image, v2_ptr, matrix2, row, col, H, W, C)
        tl.store(y_ptr + offsets + C, y2.to(y_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class FoldedAttentionFusion:
    """Weights of the module as the kernels read them: made once by `fold_attention_fusion`.

    Attributes:
        query_key1, query_key2: Dense convolutions to [q | k], (9, C, 2C) in the operands' type.
        value1, value2: Dense convolutions to v, (9, C, C) in the operands' type.
        temperature1, temperature2: (heads,) float32.
        projection1, projection2: (C inputs, C outputs) float32.
        feed_forward: Of 2C channels, in the operands' type.
    """

    query_key1: Tensor
    query_key2: Tensor
    value1: Tensor
    value2: Tensor
    temperature1: Tensor
    temperature2: Tensor
    projection1: Tensor
    projection2: Tensor
    feed_forward: FeedForward

    @property
    def channels(self) -> int:
        return self.value1.shape[2]

    @property
    def operands(self) -> torch.dtype:
        return self.value1.dtype


def fold_attention_fusion(
    weights: AttentionFusionWeights, operands: torch.dtype = torch.float16
) -> FoldedAttentionFusion:
    """Folds each pair of 1x1 and depthwise convolution into a dense one.

    Args:
        weights: Of two sources of 16 channels with 8 heads, any floating type, on the device of the features to come.
        operands: float16, for features of every type; or float32, slow and exact, for comparison.

    Raises:
        ValueError: other channels or heads.
        TypeError: other operands.
    """
    w = weights
    channels = w.projection1.shape[0]
    check_channels(channels, w.temperature1.numel(), CHANNELS)
    check_operands(operands)
    qk1, v1 = fold(w.qkv1, w.qkv1_depthwise).split((2 * channels, channels), 2)
    qk2, v2 = fold(w.qkv2, w.qkv2_depthwise).split((2 * channels, channels), 2)
    value1, value2 = fold(w.expand1, w.expand1_depthwise), fold(w.expand2, w.expand2_depthwise)
    # Each source's values see the channels of that source alone.
    values = torch.cat((torch.cat((value1, value1 * 0), 1), torch.cat((value2 * 0, value2), 1)), 2)
    output = torch.cat((w.output1, w.output2), 1)
    return FoldedAttentionFusion(
        query_key1=qk1.to(operands).contiguous(),
        query_key2=qk2.to(operands).contiguous(),
        value1=v1.to(operands).contiguous(),
        value2=v2.to(operands).contiguous(),
        temperature1=float32(w.temperature1.flatten()),
        temperature2=float32(w.temperature2.flatten()),
        projection1=float32(w.projection1.flatten(1).T),
        projection2=float32(w.projection2.flatten(1).T),
        feed_forward=fold_feed_forward(fold(w.gate, w.gate_depthwise), values, output, operands),
    )


def attention_fusion(x1: Tensor, x2: Tensor, weights: FoldedAttentionFusion) -> Tensor:
    """Fuses the features of two sources: see `kernels.reference_blocks.attention_fusion`. Three launches.

    x1, x2: (N, C, H, W), both of one shape and type, float16, bfloat16 or float32, on the device of the weights; copied
    first unless channels_last. Returns (N, 2C, H, W) of that type, channels_last.

    Raises:
        ValueError, TypeError: x1 or x2 does not fit, with what was got and what was expected.
        RuntimeError: x1 or x2 requires a gradient and gradients are recorded; or is neither on a GPU nor interpreted.
    """
    if x1.shape != x2.shape or x1.dtype != x2.dtype:
        got = f"x1 {tuple(x1.shape)} {x1.dtype} and x2 {tuple(x2.shape)} {x2.dtype}"
        raise ValueError(f"got {got}; expected one shape and type")
    x1, x2 = (
        features(name, x, weights.channels, weights.operands, weights.value1.device)
        for name, x in (("x1", x1), ("x2", x2))
    )
    partials = fusion_gram(x1, x2, weights)
    x = fusion_attention(x1, x2, partials, weights)
    x, _ = gated_feed_forward(x, x, weights.feed_forward)
    return x.permute(0, 3, 1, 2)


def fusion_gram(x1: Tensor, x2: Tensor, weights: FoldedAttentionFusion, tile: Tile | None = None) -> Tensor:
    """Partial sums of both attentions, (N, 2, programs, C (C / heads + 2)) float32. x1, x2: contiguous (N, H, W, C)."""
    n, height, width, channels = x1.shape
    tile = tile or tile_for("fusion_gram", x1, weights.operands)
    programs = programs_per_image(x1, tile, GRAM_WARPS)
    partials = x1.new_empty((n, 2, programs, partial_length(channels, HEADS)), dtype=torch.float32)
    with launch_device(x1):
        fusion_gram_kernel[(programs, n)](
            x1, x2, weights.query_key1, weights.query_key2, partials, height, width, tile.count(height, width),
            C=channels, HEADS=HEADS, HEIGHT=tile.height, WIDTH=tile.width, num_warps=tile.num_warps,
            num_stages=1,
        )  # fmt: skip
    return partials


def fusion_attention(
    x1: Tensor, x2: Tensor, partials: Tensor, weights: FoldedAttentionFusion, tile: Tile | None = None
) -> Tensor:
    """[x1 | x2] after both attentions, contiguous (N, H, W, 2C)."""
    n, height, width, channels = x1.shape
    tile = tile or tile_for("fusion_attention", x1, weights.operands)
    programs = programs_per_image(x1, tile, ATTENTION_WARPS)
    y = x1.new_empty((n, height, width, 2 * channels))
    w = weights
    with launch_device(x1):
        fusion_attention_kernel[(programs, n)](
            x1, x2, w.value1, w.value2, partials, w.temperature1, w.temperature2, w.projection1, w.projection2,
            y, height, width, tile.count(height, width), partials.shape[2],
            C=channels, HEADS=HEADS, HEIGHT=tile.height, WIDTH=tile.width, num_warps=tile.num_warps,
            num_stages=1,
        )  # fmt: skip
    return y


# --- ahead-of-time compilation ---

LAUNCHES = 3


def eager_launches(x: torch.dtype) -> int:
    """Of the module in `kernels.reference_blocks`; narrow types take six conversions more."""
    return 51 if x == torch.float32 else 57


def aot_entries() -> list[AotEntry]:
    """All launches of the module. Bytes: each address counts once a launch, as halos meet in the L2 cache."""
    return [
        entry(channels, *types)
        for channels in CHANNELS
        for types in ENTRY_TYPES
        for entry in (_gram_entry, _attention_entry, _feed_forward_entry)
    ]


def _gram_entry(channels: int, x: torch.dtype, operands: torch.dtype) -> AotEntry:
    pointers = dict.fromkeys(("x1_ptr", "x2_ptr"), POINTERS[x])
    pointers |= dict.fromkeys(("qk1_ptr", "qk2_ptr"), POINTERS[operands]) | {"partial_ptr": "*fp32"}
    return tile_entry(
        entry_name("attention_fusion/gram", channels, x, operands),
        fusion_gram_kernel,
        pointers,
        ("H", "W", "tiles"),
        {"C": channels, "HEADS": HEADS},
        compiled_tile("fusion_gram", channels, x, operands),
        entry_bytes(channels, x, operands, 2, 0),
        (eager_launches(x), LAUNCHES),
    )


def _attention_entry(channels: int, x: torch.dtype, operands: torch.dtype) -> AotEntry:
    wide = ("partial_ptr", "temperature1_ptr", "temperature2_ptr", "projection1_ptr", "projection2_ptr")
    pointers = dict.fromkeys(("x1_ptr", "x2_ptr", "y_ptr"), POINTERS[x])
    pointers |= dict.fromkeys(("v1_ptr", "v2_ptr"), POINTERS[operands]) | dict.fromkeys(wide, "*fp32")
    return tile_entry(
        entry_name("attention_fusion/attention", channels, x, operands),
        fusion_attention_kernel,
        pointers,
        ("H", "W", "tiles", "partials"),
        {"C": channels, "HEADS": HEADS},
        compiled_tile("fusion_attention", channels, x, operands),
        entry_bytes(channels, x, operands, 4, 0),
        (eager_launches(x), LAUNCHES),
    )


def _feed_forward_entry(channels: int, x: torch.dtype, operands: torch.dtype) -> AotEntry:
    launches = (eager_launches(x), LAUNCHES)
    return feed_forward_entry("attention_fusion/feed_forward", 2 * channels, x, operands, (False, False), launches)
