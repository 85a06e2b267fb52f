"""The attention fusion module's launches against plain PyTorch, in Triton's interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from kernels import attention_fusion, reference_blocks
from kernels.attention_fusion import fold_attention_fusion
from kernels.cost import measure
from kernels.reference_blocks import AttentionFusionWeights, TransformerBlockWeights
from kernels.tiles import compiled_tile
from kernels.transformer_block import fold_transformer_block, transformer_blocks
from refusion.model import AttentionFusion, FusionNet


def random_module(seed: int, dtype: torch.dtype, device: str) -> AttentionFusion:
    torch.manual_seed(seed)
    module = AttentionFusion(16).requires_grad_(False)
    for temperature in (module.temperature1, module.temperature2):
        temperature.copy_(5 * torch.rand_like(temperature))
    return module.to(device, dtype)


def weights_of(module: AttentionFusion) -> AttentionFusionWeights:
    return AttentionFusionWeights(*module.parameters())


def features(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    n, height, width = shape
    x = scale * torch.randn((2, n, 16, height, width), generator=torch.Generator().manual_seed(sum(shape)))
    x1, x2 = (y.to(device, dtype).contiguous(memory_format=torch.channels_last) for y in x)
    return x1, x2


def run(
    x1: torch.Tensor, x2: torch.Tensor, module: AttentionFusion, operands: torch.dtype | None = None
) -> torch.Tensor:
    operands = operands or (torch.float32 if x1.dtype == torch.float32 else torch.float16)
    return attention_fusion.attention_fusion(x1, x2, fold_attention_fusion(weights_of(module), operands))


def eager(x1: torch.Tensor, x2: torch.Tensor, module: AttentionFusion) -> torch.Tensor:
    return reference_blocks.attention_fusion(x1, x2, weights_of(module))


def exact(x1: torch.Tensor, x2: torch.Tensor, module: AttentionFusion) -> torch.Tensor:
    wide = AttentionFusionWeights(*(parameter.double() for parameter in module.parameters()))
    return reference_blocks.attention_fusion(x1.double(), x2.double(), wide)


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 7, 13)])
def test_the_reference_is_the_network_s_module(shape: tuple[int, int, int], device: str) -> None:
    module = random_module(0, torch.float64, device)
    x1, x2 = features(shape, torch.float64, device)
    torch.testing.assert_close(eager(x1, x2, module), module(x1, x2), rtol=1e-12, atol=1e-12)


def test_weights_are_the_module_s_parameters_in_order() -> None:
    names = [name.removesuffix(".weight") for name, _ in AttentionFusion(16).named_parameters()]
    assert tuple(names) == AttentionFusionWeights._fields


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 1, 7), (2, 7, 13), (1, 33, 47), (1, 64, 64)])
def test_as_exact_as_eager(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, as_exact_as_eager: Callable[..., None]
) -> None:
    module = random_module(1, dtype, device)
    x1, x2 = features(shape, dtype, device)
    as_exact_as_eager([run(x1, x2, module)], [eager(x1, x2, module)], [exact(x1, x2, module)])


@pytest.mark.slow
def test_as_exact_as_eager_on_a_ragged_photograph(device: str, as_exact_as_eager: Callable[..., None]) -> None:
    module = random_module(2, torch.float16, device)
    x1, x2 = features((1, 331, 585), torch.float16, device)
    as_exact_as_eager([run(x1, x2, module)], [eager(x1, x2, module)], [exact(x1, x2, module)])


def test_float16_operands_for_float32_features(device: str) -> None:
    """Their error is at most twice that of the module in float16."""
    module = random_module(3, torch.float32, device)
    x1, x2 = features((2, 17, 65), torch.float32, device)
    result = run(x1, x2, module, torch.float16)
    assert result.dtype == torch.float32
    low = eager(x1.half(), x2.half(), random_module(3, torch.float16, device))
    error, allowed = ((y.double() - exact(x1, x2, module)).abs().max() for y in (result, low))
    assert error <= 2 * allowed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_over_the_pixels_are_float32(
    dtype: torch.dtype, device: str, as_exact_as_eager: Callable[..., None]
) -> None:
    """Queries and keys of about 100 over 4,096 pixels: the sums of their squares are far beyond float16."""
    module = random_module(4, dtype, device)
    for qkv in (module.qkv1, module.qkv2):
        qkv.weight[:32] *= 150
    x1, x2 = features((1, 64, 64), dtype, device)
    as_exact_as_eager([run(x1, x2, module)], [eager(x1, x2, module)], [exact(x1, x2, module)])


@pytest.mark.parametrize("operands", [torch.float16, torch.float32])
def test_tiles_of_every_compiled_shape(operands: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = random_module(5, torch.float32, device)
    x1, x2 = features((1, 9, 35), torch.float32, device)
    expected = run(x1, x2, module, operands)
    for name in ("attention_fusion", "gated_feed_forward"):
        monkeypatch.setattr(
            f"kernels.{name}.tile_for",
            lambda operation, x, operands: compiled_tile(operation, x.shape[3], x.dtype, operands),
        )
    tolerance = 3e-6 if operands == torch.float32 else 2e-3
    torch.testing.assert_close(run(x1, x2, module, operands), expected, rtol=0, atol=tolerance)


def test_the_whole_network_through_the_kernels(device: str) -> None:
    torch.manual_seed(11)
    network = FusionNet().requires_grad_(False).to(device)
    a, b = torch.rand(2, 1, 1, 20, 35, generator=torch.Generator().manual_seed(11)).to(device)

    def blocks(x: torch.Tensor, encoder: torch.nn.Sequential) -> torch.Tensor:
        weights = [TransformerBlockWeights(*block.parameters()) for block in encoder]
        return transformer_blocks(x, [fold_transformer_block(w, torch.float32) for w in weights])

    x1, x2 = blocks(network.stem1(a), network.encoder1), blocks(network.stem2(b), network.encoder2)
    x = blocks(run(x1, x2, network.fusion), network.decoder)
    fused = network.output(F.leaky_relu(network.reduce(x), 0.01)).sigmoid()
    torch.testing.assert_close(fused, network(a, b), rtol=0, atol=1e-6)


def test_features_of_zero(device: str) -> None:
    module = random_module(6, torch.float32, device)
    x1, x2 = features((1, 5, 6), torch.float32, device)
    zero = torch.zeros_like(x1)
    for pair in ((zero, zero), (x1, zero), (zero, x2)):
        torch.testing.assert_close(run(*pair, module).double(), exact(*pair, module), rtol=0, atol=3e-6)


def test_the_sources_are_not_interchangeable(device: str) -> None:
    module = random_module(7, torch.float32, device)
    x1, x2 = features((1, 8, 9), torch.float32, device)
    assert (run(x1, x2, module) - run(x2, x1, module)).abs().max() > 0.1


def test_memory_layouts(device: str) -> None:
    module = random_module(8, torch.float32, device)
    x1, x2 = features((2, 9, 14), torch.float32, device)
    expected = run(x1, x2, module)
    assert expected.shape == (2, 32, 9, 14)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    both = torch.cat((x1, x2), 1)
    assert torch.equal(run(x1.contiguous(), x2, module), expected)
    assert torch.equal(run(both[:, :16], both[:, 16:], module), expected)


def test_bad_inputs_are_named(device: str) -> None:
    module = random_module(9, torch.float32, device)
    x1, x2 = features((1, 4, 5), torch.float32, device)
    with pytest.raises(ValueError, match=r"x1 \(1, 16, 4, 5\) .* and x2 \(1, 16, 4, 4\) .*; expected one"):
        run(x1, x2[..., :4], module)
    with pytest.raises(ValueError, match=r"x1 .* torch.float32 and x2 .* torch.float16; expected one shape and type"):
        run(x1, x2.half(), module)
    with pytest.raises(ValueError, match=r"x1 has shape \(1, 8, 4, 5\); expected \(N, 16, H, W\)"):
        run(x1[:, :8], x2[:, :8], module)
    with pytest.raises(TypeError, match=r"x1 is torch.bfloat16, the weights are folded to float32"):
        run(x1.bfloat16(), x2.bfloat16(), module, torch.float32)
    with pytest.raises(RuntimeError, match=r"x2 requires a gradient.*torch.no_grad"):
        run(x1, x2.requires_grad_(), module)
    with pytest.raises(ValueError, match="32 channels with 8 heads; expected 16 channels with 8 heads"):
        fold_attention_fusion(weights_of(AttentionFusion(32)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_launches_and_bytes_are_those_claimed(dtype: torch.dtype, device: str) -> None:
    if device != "cpu":
        pytest.skip("accesses are counted in the interpreter")
    height, width = 128, 128
    module = random_module(10, dtype, device)
    x1, x2 = features((1, height, width), dtype, device)
    folded = fold_attention_fusion(weights_of(module), torch.float32 if dtype == torch.float32 else torch.float16)
    ours = measure(lambda: attention_fusion.attention_fusion(x1, x2, folded))
    assert ours.launches == attention_fusion.LAUNCHES == 3
    claimed = [
        entry.bytes_kernel
        for entry in attention_fusion.aot_entries()
        if entry.name.endswith(f"/fp{8 * dtype.itemsize}")
    ]
    weights = sum(x.numel() * x.element_size() for x in (*folded.feed_forward, folded.query_key1, folded.query_key2))
    assert (ours.bytes - weights) / (height * width) == pytest.approx(sum(claimed), rel=0.02)
    # Less than three launches take that read and write the 32 channels once each.
    assert sum(claimed) < 3 * 2 * 32 * dtype.itemsize

    plain = measure(lambda: eager(x1, x2, module))
    assert plain.launches == attention_fusion.eager_launches(dtype)
    assert plain.bytes > 15 * ours.bytes
