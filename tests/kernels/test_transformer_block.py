"""The transformer block's launches against plain PyTorch, in Triton's interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

pytest.importorskip("triton", reason="Triton is not installed")
import triton
import triton.language as tl

from kernels import reference_blocks, tiles, transformer_block
from kernels.cost import measure
from kernels.gated_feed_forward import gelu
from kernels.reference_blocks import TransformerBlockWeights
from kernels.stencil import launch_device
from kernels.tiles import Tile, compiled_tile, fold
from kernels.transformer_block import fold_transformer_block, transformer_blocks
from refusion.model import TransformerBlock

HALF = (torch.float16, torch.bfloat16)


def random_block(channels: int, seed: int, dtype: torch.dtype, device: str) -> TransformerBlock:
    """A block none of whose parameters has a value that would hide it (temperatures 1, biases 0)."""
    torch.manual_seed(seed)
    block = TransformerBlock(channels).requires_grad_(False)
    for name, parameter in block.named_parameters():
        if "norm" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
        if "temperature" in name:
            parameter.copy_(torch.linspace(0.5, 4, parameter.numel()).view_as(parameter))
    return block.to(device, dtype)


def weights_of(block: TransformerBlock) -> TransformerBlockWeights:
    return TransformerBlockWeights(*block.parameters())


def features(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, memory_format: torch.memory_format = torch.channels_last
) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return (1.5 * x + 0.5).to(device, dtype).contiguous(memory_format=memory_format)


def run(x: torch.Tensor, block: TransformerBlock, operands: torch.dtype | None = None) -> torch.Tensor:
    operands = operands or (torch.float32 if x.dtype == torch.float32 else torch.float16)
    return transformer_block.transformer_block(x, fold_transformer_block(weights_of(block), operands))


def exact(x: torch.Tensor, block: TransformerBlock) -> torch.Tensor:
    wide = TransformerBlockWeights(*(parameter.double() for parameter in block.parameters()))
    return reference_blocks.transformer_block(x.double(), wide)


@pytest.mark.parametrize("channels", [16, 32])
@pytest.mark.parametrize("size", [(1, 1), (7, 13)])
def test_the_reference_is_the_network_s_block(channels: int, size: tuple[int, int], device: str) -> None:
    block = random_block(channels, 0, torch.float64, device)
    x = features((2, channels, *size), torch.float64, device)
    torch.testing.assert_close(
        reference_blocks.transformer_block(x, weights_of(block)), block(x), rtol=1e-12, atol=1e-12
    )


def test_weights_are_the_module_s_parameters_in_order() -> None:
    names = [name for name, _ in TransformerBlock(16).named_parameters()]
    expected = [
        "norm1.weight", "norm1.bias", "attention.temperature", "attention.qkv.weight", "attention.qkv_depthwise.weight",
        "attention.projection.weight", "norm2.weight", "norm2.bias", "feed_forward.expand.weight",
        "feed_forward.depthwise.weight", "feed_forward.projection.weight",
    ]  # fmt: skip
    assert names == expected
    assert len(TransformerBlockWeights._fields) == len(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "shape"),
    [
        (16, (1, 1, 1)), (16, (2, 1, 7)), (16, (3, 7, 13)), (16, (1, 33, 47)), (16, (1, 64, 64)),
        (32, (3, 1, 1)), (32, (1, 1, 7)), (32, (2, 7, 13)), (32, (1, 33, 47)), (32, (2, 64, 64)),
    ],
)  # fmt: skip
def test_as_exact_as_eager(
    channels: int, shape: tuple[int, int, int], dtype: torch.dtype, device: str, as_exact_as_eager: Callable[..., None]
) -> None:
    block = random_block(channels, 1, dtype, device)
    n, height, width = shape
    x = features((n, channels, height, width), dtype, device)
    eager = reference_blocks.transformer_block(x, weights_of(block))
    as_exact_as_eager([run(x, block)], [eager], [exact(x, block)])


def test_as_exact_as_eager_on_a_ragged_photograph(device: str, as_exact_as_eager: Callable[..., None]) -> None:
    block = random_block(16, 2, torch.float16, device)
    x = features((1, 16, 331, 585), torch.float16, device)
    eager = reference_blocks.transformer_block(x, weights_of(block))
    as_exact_as_eager([run(x, block)], [eager], [exact(x, block)])


@pytest.mark.parametrize("channels", [16, 32])
def test_float16_operands_for_float32_features(channels: int, device: str) -> None:
    """Their error is at most twice that of a block in float16."""
    block = random_block(channels, 3, torch.float32, device)
    x = features((2, channels, 19, 70), torch.float32, device)
    result = run(x, block, torch.float16)
    assert result.dtype == torch.float32
    eager = reference_blocks.transformer_block(x.half(), weights_of(random_block(channels, 3, torch.float16, device)))
    error, allowed = ((y.double() - exact(x, block)).abs().max() for y in (result, eager))
    assert error <= 2 * allowed


@pytest.mark.parametrize("operands", [torch.float16, torch.float32])
@pytest.mark.parametrize("channels", [16, 32])
def test_tiles_of_every_compiled_shape(
    channels: int, operands: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which tile a pixel is in, and which program works on it, changes nothing but the order of the sums over H*W."""
    block = random_block(channels, 4, torch.float32, device)
    x = features((1, channels, 18, 35), torch.float32, device)
    expected = run(x, block, operands)
    for module in ("channel_attention", "gated_feed_forward"):
        monkeypatch.setattr(
            f"kernels.{module}.tile_for",
            lambda operation, x, operands: compiled_tile(operation, x.shape[3], x.dtype, operands),
        )
    tolerance = 3e-6 if operands == torch.float32 else 2e-3
    torch.testing.assert_close(run(x, block, operands), expected, rtol=0, atol=tolerance)


def test_the_number_of_programs_changes_only_the_rounding(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = random_block(16, 5, torch.float32, device)
    x = features((2, 16, 15, 37), torch.float32, device)
    monkeypatch.setattr(tiles, "SMALL_INTERPRETED_TILE", Tile(8, 16, 1))
    monkeypatch.setattr(tiles, "INTERPRETED_PROGRAMS", 200)
    many = run(x, block)
    monkeypatch.setattr(tiles, "INTERPRETED_PROGRAMS", 1)
    torch.testing.assert_close(run(x, block), many, rtol=0, atol=3e-6)


def test_the_same_call_gives_the_same_bits(device: str) -> None:
    block = random_block(16, 6, torch.float16, device)
    x = features((2, 16, 17, 65), torch.float16, device)
    assert torch.equal(run(x, block), run(x, block))


@pytest.mark.parametrize("dtype", HALF)
def test_sums_over_the_pixels_are_float32(
    dtype: torch.dtype, device: str, as_exact_as_eager: Callable[..., None]
) -> None:
    """Queries and keys of about 100 over 4,096 pixels: the sums of their squares are far beyond float16."""
    block = random_block(16, 7, dtype, device)
    block.attention.qkv.weight[:32] *= 150
    x = features((1, 16, 64, 64), dtype, device)
    eager = reference_blocks.transformer_block(x, weights_of(block))
    as_exact_as_eager([run(x, block)], [eager], [exact(x, block)])


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_constant_features(value: float, device: str) -> None:
    """Their layer norm is the bias alone; without a bias queries and keys have no length to be divided by."""
    block = random_block(16, 8, torch.float32, device)
    block.norm1.bias.zero_()
    x = torch.full((2, 16, 9, 11), value, device=device)
    torch.testing.assert_close(run(x, block).double(), exact(x, block), rtol=0, atol=2e-6)


def test_several_blocks_are_one_after_the_other(device: str) -> None:
    blocks = [random_block(16, seed, torch.float16, device) for seed in (9, 10)]
    folded = [fold_transformer_block(weights_of(block)) for block in blocks]
    x = features((2, 16, 10, 30), torch.float16, device)
    expected = x
    for block in folded:
        expected = transformer_block.transformer_block(expected, block)
    torch.testing.assert_close(transformer_blocks(x, folded), expected, rtol=0, atol=0)


def test_memory_layouts(device: str) -> None:
    block = random_block(16, 12, torch.float32, device)
    x = features((2, 16, 9, 14), torch.float32, device)
    expected = run(x, block)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    wide = torch.zeros(2, 20, 12, 30, device=device)
    window = wide[:, 2:18, 1:10, ::2][..., :14]
    window.copy_(x)
    for other in (x.contiguous(), window, x.flip(3).contiguous().flip(3)):
        assert torch.equal(run(other, block), expected)
    first = x[:1].expand(3, -1, -1, -1)
    assert torch.equal(run(first, block)[2], run(x[:1], block)[0])


def test_the_input_is_not_changed(device: str) -> None:
    block = random_block(16, 13, torch.float32, device)
    x = features((1, 16, 8, 8), torch.float32, device)
    before = x.clone()
    run(x, block)
    assert torch.equal(x, before)


# --- errors ---


@pytest.mark.parametrize(
    ("x", "operands", "error", "message"),
    [
        (torch.zeros(1, 32, 4, 4), torch.float32, ValueError, r"shape \(1, 32, 4, 4\); expected \(N, 16, H, W\)"),
        (torch.zeros(16, 4, 4), torch.float32, ValueError, r"shape \(16, 4, 4\); expected \(N, 16, H, W\)"),
        (torch.zeros(1, 16, 0, 4), torch.float32, ValueError, r"\(1, 16, 0, 4\); expected .* none of them 0"),
        (torch.zeros(1, 16, 4, 4).double(), torch.float32, TypeError, "torch.float64; expected float16, bfloat16 or"),
        (torch.zeros(1, 16, 4, 4).int(), torch.float16, TypeError, "torch.int32; expected float16, bfloat16 or"),
        (torch.zeros(1, 16, 4, 4).half(), torch.float32, TypeError, "torch.float16, the weights are folded to float32"),
        (torch.zeros(1, 16, 4, 4, device="meta"), torch.float32, ValueError, "on meta; expected"),
        (torch.zeros(1, 16, 1, 1).expand(-1, -1, 2**14, 2**14), torch.float32, ValueError, "elements an image"),
        (torch.zeros(1, 16, 1, 1).expand(2**16, -1, -1, -1), torch.float32, ValueError, "a batch of 65536"),
    ],
)  # fmt: skip
def test_bad_features_are_named(
    x: torch.Tensor, operands: torch.dtype, error: type[Exception], message: str, device: str
) -> None:
    block = random_block(16, 14, torch.float32, device)
    with pytest.raises(error, match=message):
        run(x if x.is_meta else x.to(device), block, operands)


def test_gradients_are_refused_and_not_silently_lost(device: str) -> None:
    block = random_block(16, 15, torch.float32, device)
    x = features((1, 16, 4, 4), torch.float32, device).requires_grad_()
    with pytest.raises(RuntimeError, match=r"x requires a gradient.*torch.no_grad"):
        run(x, block)
    with torch.no_grad():
        assert not run(x, block).requires_grad


def test_tangents_are_refused_and_not_silently_zero(device: str) -> None:
    block = random_block(16, 15, torch.float32, device)
    x = features((1, 16, 4, 4), torch.float32, device)
    with torch.no_grad(), pytest.raises(RuntimeError, match="x carries a tangent"):
        torch.func.jvp(lambda x: run(x, block), (x,), (x,))
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(RuntimeError, match="x carries a tangent"):
        run(forward_ad.make_dual(x, x), block)


def test_bad_weights_are_named() -> None:
    with pytest.raises(ValueError, match="24 channels with 8 heads; expected 16 or 32 channels with 8 heads"):
        fold_transformer_block(weights_of(TransformerBlock(24)))
    with pytest.raises(TypeError, match=r"operands is torch.bfloat16; expected torch.float16 or"):
        fold_transformer_block(weights_of(TransformerBlock(16)), torch.bfloat16)
    with pytest.raises(ValueError, match="expected at least one"):
        transformer_blocks(torch.zeros(1, 16, 4, 4), [])
    mixed = [fold_transformer_block(weights_of(TransformerBlock(channels))) for channels in (16, 32)]
    with pytest.raises(ValueError, match="all with the same channels"):
        transformer_blocks(torch.zeros(1, 16, 4, 4), mixed)


# --- parts ---


def test_a_1x1_and_a_depthwise_convolution_fold_into_one() -> None:
    torch.manual_seed(16)
    pointwise, depthwise = torch.randn(24, 16, 1, 1), torch.randn(24, 1, 3, 3)
    x = torch.randn(2, 16, 5, 6, dtype=torch.float64)
    dense = fold(pointwise, depthwise).double().permute(2, 1, 0).reshape(24, 16, 3, 3)
    expected = reference_blocks.separable_conv(x, pointwise.double(), depthwise.double())
    torch.testing.assert_close(F.conv2d(x, dense, padding=1), expected, rtol=0, atol=1e-5)


@triton.jit
def gelu_kernel(x_ptr, y_ptr, n, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(y_ptr + i, gelu(x, EXACT), mask=i < n)


@pytest.mark.parametrize(("is_exact", "bound"), [(True, 0.0), (False, 7.5e-8)])
def test_gelu(is_exact: bool, bound: float, device: str) -> None:
    """The error stays below the bound of the formula times |x|, and float32 rounding."""
    x = torch.cat((torch.linspace(-12, 12, 20001), torch.tensor([0.0, -0.0, 65504.0, -65504.0, 1e-30]))).to(device)
    y = torch.empty_like(x)
    with launch_device(x):
        gelu_kernel[(triton.cdiv(x.numel(), 4096),)](x, y, x.numel(), EXACT=is_exact, BLOCK=4096)
    error = (y.double() - F.gelu(x.double())).abs()
    assert (error <= (bound + 3e-7) * x.double().abs()).all(), error.max()
    assert y[torch.isclose(x, torch.tensor(-65504.0, device=x.device))] == 0


# --- what a call costs ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_launches_and_bytes_are_those_claimed(dtype: torch.dtype, device: str) -> None:
    """Weights and partial sums are read by every program; an image makes them vanish."""
    if device != "cpu":
        pytest.skip("accesses are counted in the interpreter")
    height, width = 128, 128
    block = random_block(16, 17, dtype, device)
    x = features((1, 16, height, width), dtype, device)
    folded = fold_transformer_block(weights_of(block), torch.float32 if dtype == torch.float32 else torch.float16)

    alone = measure(lambda: transformer_block.transformer_block(x, folded))
    chain = measure(lambda: transformer_blocks(x, [folded, folded]))
    activation = 16 * dtype.itemsize  # bytes a pixel
    assert alone.launches == transformer_block.LAUNCHES == 4
    assert chain.launches == 1 + 2 * 3
    claimed = {
        entry.name.split("/")[1]: entry.bytes_kernel
        for entry in transformer_block.aot_entries()
        if entry.name.endswith(f"c16/fp{8 * dtype.itemsize}")
    }
    last = claimed["layer_norm"] + claimed["gram"] + claimed["attention"] + claimed["last_feed_forward"]
    assert alone.bytes / (height * width) == pytest.approx(last, rel=0.02)
    within = (chain.bytes - alone.bytes) / (height * width)
    assert within == pytest.approx(claimed["gram"] + claimed["attention"] + claimed["feed_forward"], rel=0.02)
    # At most 1.5 times what three launches take that read and write the features once each.
    assert within <= 1.5 * 3 * 2 * activation * 1.02

    eager = measure(lambda: reference_blocks.transformer_block(x, weights_of(block)))
    assert eager.launches == transformer_block.eager_launches(dtype)
    assert eager.bytes > 6 * alone.bytes
