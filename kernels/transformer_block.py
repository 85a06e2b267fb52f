"""A transformer block without gradients, three launches; one more for the first layer norm of a chain.

    x += attention(norm(x)); x += feed_forward(norm(x))

| launch | reads | writes |
|---|---|---|
| layer_norm, once a chain | x | a = norm1(x) |
| gram | a | partial sums of the products of queries and keys |
| attention | a, x, partial sums | x + attention, a = norm2 of it |
| gated_feed_forward | a, x | x + feed-forward, a = norm1 of it for the next block, if any |

Bytes a pixel at 16 channels in float16, where one activation (x or a) is 32: 32 + 128 + 128 = 288 for a block within a
chain, 1.5 times what three launches would take to read and write x once each; 320 for a block that stands alone, 1.25
times for its four launches. Writing and reading a costs 64 of each launch's 128; computing the layer norm anew at each
of the nine taps would cost more instructions than these bytes are worth. Plain PyTorch (`kernels.reference_blocks`)
takes 29 launches and 2570 bytes.

Warp instructions a pixel in the code for sm_87, at 16 channels in float16: layer_norm 8, gram 23, attention 18 (and 763
a program), gated_feed_forward 55; at 32 channels 13, 55, 44 and 137.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.aot_entry import AotEntry
from kernels.channel_attention import attention, attention_kernel, gram, gram_kernel
from kernels.gated_feed_forward import (
    CHUNK,
    FeedForward,
    feed_forward_kernel,
    fold_feed_forward,
    gated_feed_forward,
)
from kernels.layer_norm import PIXELS, layer_norm, layer_norm_kernel
from kernels.reference_blocks import TransformerBlockWeights
from kernels.tiles import Tile, compiled_tile, features, fold

HEADS = 8
CHANNELS = (16, 32)


@dataclass(frozen=True)
class FoldedTransformerBlock:
    """Weights of a block as the kernels read them: made by `fold_transformer_block`, valid until the weights change.

    Attributes:
        norm1, norm2: Weight and bias, (C,) float32.
        query_key: Dense convolution to [q | k], (9, C, 2C) in the operands' type.
        value: Dense convolution to v, (9, C, C) in the operands' type.
        temperature: (heads,) float32.
        projection: (C inputs, C outputs) float32.
        feed_forward: In the operands' type.
    """

    norm1: tuple[Tensor, Tensor]
    query_key: Tensor
    value: Tensor
    temperature: Tensor
    projection: Tensor
    norm2: tuple[Tensor, Tensor]
    feed_forward: FeedForward

    @property
    def channels(self) -> int:
        return self.value.shape[2]

    @property
    def operands(self) -> torch.dtype:
        return self.value.dtype


def fold_transformer_block(
    weights: TransformerBlockWeights, operands: torch.dtype = torch.float16
) -> FoldedTransformerBlock:
    """Folds each pair of 1x1 and depthwise convolution of a block into a dense one.

    Args:
        weights: Of 16 or 32 channels with 8 heads, any floating type, on the device of the features to come.
        operands: float16, for features of every type; or float32, slow and exact, for comparison.

    Raises:
        ValueError: other channels or heads.
        TypeError: other operands.
    """
    w = weights
    channels, heads = w.norm1_weight.numel(), w.temperature.numel()
    check_channels(channels, heads, CHANNELS)
    q_k, v = fold(w.qkv, w.qkv_depthwise).split((2 * channels, channels), 2)
    gate, value = fold(w.expand, w.depthwise).chunk(2, 2)
    return FoldedTransformerBlock(
        norm1=(float32(w.norm1_weight), float32(w.norm1_bias)),
        query_key=q_k.to(check_operands(operands)).contiguous(),
        value=v.to(operands).contiguous(),
        temperature=float32(w.temperature.flatten()),
        projection=float32(w.projection.flatten(1).T),
        norm2=(float32(w.norm2_weight), float32(w.norm2_bias)),
        feed_forward=fold_feed_forward(gate, value, w.output, operands),
    )


def float32(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()


def check_channels(channels: int, heads: int, allowed: Sequence[int]) -> None:
    if channels not in allowed or heads != HEADS:
        expected = f"{' or '.join(map(str, allowed))} channels with {HEADS} heads"
        raise ValueError(f"the weights have {channels} channels with {heads} heads; expected {expected}")


def check_operands(operands: torch.dtype) -> torch.dtype:
    if operands not in (torch.float16, torch.float32):
        raise TypeError(f"operands is {operands}; expected torch.float16 or torch.float32")
    return operands


def transformer_block(x: Tensor, weights: FoldedTransformerBlock) -> Tensor:
    """One block: see `kernels.reference_blocks.transformer_block`. Four launches.

    x: (N, C, H, W), float16, bfloat16 or float32, with C and the device of the weights; copied first unless
    channels_last. float16 operands hold what is in the range of float16. Returns x's shape and type, channels_last.

    Raises:
        ValueError, TypeError: x does not fit the weights, with what was got and what was expected.
        RuntimeError: x requires a gradient and gradients are recorded; or x is neither on a GPU nor interpreted.
    """
    return transformer_blocks(x, (weights,))


def transformer_blocks(x: Tensor, blocks: Sequence[FoldedTransformerBlock]) -> Tensor:
    """Several blocks one after the other: one launch, and three for each. Arguments and errors as transformer_block."""
    if not blocks or any((b.channels, b.operands) != (blocks[0].channels, blocks[0].operands) for b in blocks):
        got = [f"{b.channels} channels in {b.operands}" for b in blocks]
        raise ValueError(f"got blocks of {got}; expected at least one, all with the same channels and operands")
    first = blocks[0]
    x = features("x", x, first.channels, first.operands, first.value.device)
    a: Tensor | None = layer_norm(x, *first.norm1, first.operands)
    for block, following in zip(blocks, (*blocks[1:], None), strict=True):
        assert a is not None
        partials = gram(a, block.query_key, HEADS)
        x, a = attention(a, x, block.value, partials, block.temperature, block.projection, block.norm2)
        x, a = gated_feed_forward(a, x, block.feed_forward, following.norm1 if following else None)
    return x.permute(0, 3, 1, 2)


# --- ahead-of-time compilation ---

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
# (features, operands)
ENTRY_TYPES = (
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float16),
    (torch.float32, torch.float16),
    (torch.float32, torch.float32),
)
MIN_OCCUPANCY = 0.25
LAUNCHES = 4  # of a block that stands alone
_NAME = "transformer_block"


def max_registers(num_warps: int) -> int:
    """The most a thread may take so that a quarter of 48 warps fits an SM."""
    return 168 if num_warps <= 4 else 128


def entry_name(operation: str, channels: int, x: torch.dtype, operands: torch.dtype) -> str:
    names = [POINTERS[dtype].removeprefix("*") for dtype in (x, operands)]
    return f"{operation}/c{channels}/{names[0]}" + (f"-by-{names[1]}" if names[0] != names[1] else "")


def entry_bytes(channels: int, x: torch.dtype, operands: torch.dtype, xs: int, normalised: int) -> float:
    """Bytes a pixel of so many accesses to features and to normalised features."""
    return channels * (xs * x.itemsize + normalised * operands.itemsize)


def eager_launches(x: torch.dtype) -> int:
    """Of a block in `kernels.reference_blocks`; narrow types take three conversions more."""
    return 26 if x == torch.float32 else 29


def aot_entries() -> list[AotEntry]:
    """All launches of a transformer block. Bytes: each address counts once a launch, as halos meet in the L2 cache."""
    entries = []
    for channels in CHANNELS:
        entries += [_gram_entry(channels, operands) for operands in (torch.float16, torch.float32)]
        for types in ENTRY_TYPES:
            launches = (eager_launches(types[0]), LAUNCHES)
            entries += [
                _layer_norm_entry(channels, *types),
                _attention_entry(channels, *types),
                feed_forward_entry(f"{_NAME}/feed_forward", channels, *types, (True, True), launches),
                feed_forward_entry(f"{_NAME}/last_feed_forward", channels, *types, (True, False), launches),
            ]
    return entries


def _layer_norm_entry(channels: int, x: torch.dtype, operands: torch.dtype) -> AotEntry:
    signature = {"x_ptr": POINTERS[x], "weight_ptr": "*fp32", "bias_ptr": "*fp32", "y_ptr": POINTERS[operands]}
    moved = entry_bytes(channels, x, operands, 1, 1)
    return AotEntry(
        name=entry_name(f"{_NAME}/layer_norm", channels, x, operands),
        kernel=layer_norm_kernel,
        signature=signature | {"pixels": "i32"},
        constexprs={"C": channels, "PIXELS": PIXELS},
        num_warps=4,
        divisible_by_16=tuple(signature),
        bytes_algorithm=moved,
        bytes_kernel=moved,
        eager_launches=eager_launches(x),
        launches=LAUNCHES,
        min_occupancy=0.4,
        max_registers=64,
    )


def tile_entry(
    name: str,
    kernel: Any,
    pointers: dict[str, str],
    integers: Sequence[str],
    constexprs: dict[str, Any],
    tile: Tile,
    moved: float,
    launches: tuple[int, int],
) -> AotEntry:
    """Entry of a kernel that works on tiles. launches: of plain PyTorch, and ours."""
    return AotEntry(
        name=name,
        kernel=kernel,
        signature=pointers | dict.fromkeys(integers, "i32"),
        constexprs=constexprs | {"HEIGHT": tile.height, "WIDTH": tile.width},
        num_warps=tile.num_warps,
        divisible_by_16=tuple(pointers),
        bytes_algorithm=moved,
        bytes_kernel=moved,
        eager_launches=launches[0],
        launches=launches[1],
        min_occupancy=MIN_OCCUPANCY,
        max_registers=max_registers(tile.num_warps),
    )


def _gram_entry(channels: int, operands: torch.dtype) -> AotEntry:
    return tile_entry(
        entry_name(f"{_NAME}/gram", channels, operands, operands),
        gram_kernel,
        {"a_ptr": POINTERS[operands], "qk_ptr": POINTERS[operands], "partial_ptr": "*fp32"},
        ("H", "W", "tiles"),
        {"C": channels, "HEADS": HEADS},
        compiled_tile("gram", channels, operands, operands),
        entry_bytes(channels, operands, operands, 0, 1),
        (eager_launches(operands), LAUNCHES),
    )


def _attention_entry(channels: int, x: torch.dtype, operands: torch.dtype) -> AotEntry:
    wide = ("partial_ptr", "temperature_ptr", "projection_ptr", "norm_weight_ptr", "norm_bias_ptr")
    pointers = dict.fromkeys(("a_ptr", "v_ptr", "normalised_ptr"), POINTERS[operands])
    return tile_entry(
        entry_name(f"{_NAME}/attention", channels, x, operands),
        attention_kernel,
        pointers | dict.fromkeys(("x_ptr", "y_ptr"), POINTERS[x]) | dict.fromkeys(wide, "*fp32"),
        ("H", "W", "tiles", "partials"),
        {"C": channels, "HEADS": HEADS},
        compiled_tile("attention", channels, x, operands),
        entry_bytes(channels, x, operands, 2, 2),
        (eager_launches(x), LAUNCHES),
    )


def feed_forward_entry(
    operation: str,
    channels: int,
    x: torch.dtype,
    operands: torch.dtype,
    normalised: tuple[bool, bool],
    launches: tuple[int, int],
) -> AotEntry:
    """normalised: whether `a` is a layer norm, and not x itself; and whether the next layer norm is written."""
    of_norm, to_norm = normalised
    pointers = {"a_ptr": POINTERS[operands if of_norm else x], "x_ptr": POINTERS[x], "y_ptr": POINTERS[x]}
    pointers |= dict.fromkeys(("expand_ptr", "output_ptr"), POINTERS[operands])
    norm = ("norm_weight_ptr", "norm_bias_ptr", "normalised_ptr")
    if to_norm:
        pointers |= dict(zip(norm, ("*fp32", "*fp32", POINTERS[operands]), strict=True))
    return tile_entry(
        entry_name(operation, channels, x, operands),
        feed_forward_kernel,
        pointers,
        ("H", "W", "chunks"),
        {"C": channels, "CHUNK": CHUNK} | ({} if to_norm else dict.fromkeys(norm)),
        compiled_tile("feed_forward", channels, x, operands),
        entry_bytes(channels, x, operands, 2, of_norm + to_norm),
        launches,
    )
