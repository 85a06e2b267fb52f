"""The networks: sizes, shapes, types, and the attention against the textbook form."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refusion.model import PRIORS, FusionNet, LossProposalNet, ReconstructionNet, attend, conv1x1


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_parameter_counts() -> None:
    assert count(FusionNet()) == 59_856
    assert count(ReconstructionNet()) == 14_992
    assert all(module.bias is None for module in FusionNet().modules() if isinstance(module, nn.Conv2d))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (7, 13), (33, 47)])
def test_any_size(size: tuple[int, int]) -> None:
    a, b = torch.rand(2, 3, 1, *size)
    fused = FusionNet()(a, b)
    assert fused.shape == (3, 1, *size)
    assert fused.min() > 0 and fused.max() < 1
    w, v = LossProposalNet()(a, b)
    assert w.shape == v.shape == (3, 2, *size)
    torch.testing.assert_close(w.sum(1), torch.ones(3, *size))
    torch.testing.assert_close(v.sum(1), torch.ones(3, *size))
    assert [x.shape for x in ReconstructionNet()(a)] == [a.shape, a.shape]


def textbook_attention(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, projection: nn.Conv2d) -> Tensor:
    """MDTA as Restormer writes it: normalise, multiply, softmax, multiply, project."""
    n, c, h, w = q.shape
    q, k, v = (x.reshape(n, 8, c // 8, h * w) for x in (q, k, v))
    attention = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * temperature).softmax(-1)
    return projection((attention @ v).reshape(n, c, h, w))


@pytest.mark.parametrize("channels", [16, 32])
def test_attention_is_the_textbook_one(channels: int) -> None:
    q, k, v = torch.randn(3, 2, channels, 9, 11, dtype=torch.float64).unbind()
    q[0, 3] = 0  # a silent channel: F.normalize gives 0, not NaN
    temperature = torch.rand(8, 1, 1, dtype=torch.float64) * 3
    projection = conv1x1(channels, channels).double()
    ours = attend(q, k, v, temperature, projection)
    torch.testing.assert_close(ours, textbook_attention(q, k, v, temperature, projection), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_stay_near_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = FusionNet().eval()
    a, b = torch.rand(2, 1, 1, 40, 56)
    with torch.inference_mode():
        exact = net(a, b)
        half = copy.deepcopy(net).to(dtype)(a.to(dtype), b.to(dtype))
    assert half.dtype == dtype
    assert (half.float() - exact).abs().max() < (0.02 if dtype == torch.bfloat16 else 0.003)


def test_large_image_does_not_overflow_float16() -> None:
    net = FusionNet().half()
    a, b = torch.ones(2, 1, 1, 300, 300, dtype=torch.float16)  # 90,000 pixels: sums pass float16's 65,504
    with torch.inference_mode():
        assert torch.isfinite(net(a, b)).all()


def test_channels_last_input_gives_the_same() -> None:
    net = FusionNet()
    a, b = torch.rand(2, 2, 1, 12, 17)
    expected = net(a, b)
    net = net.to(memory_format=torch.channels_last)
    a, b = (x.contiguous(memory_format=torch.channels_last) for x in (a, b))
    torch.testing.assert_close(net(a, b), expected, rtol=1e-5, atol=1e-6)


def test_precision_of_float32_against_float64() -> None:
    torch.manual_seed(1)
    net = FusionNet()
    a, b = torch.rand(2, 1, 1, 64, 64)
    with torch.inference_mode():
        single = net(a, b)
        double = net.double()(a.double(), b.double())
    assert (single - double).abs().max() < 1e-6


@pytest.mark.parametrize("net", [FusionNet, LossProposalNet])
def test_recomputation_gives_the_same_gradients_with_other_parameters(net: type[nn.Module]) -> None:
    """Blocks are recomputed with the parameters of the call, not with those that the module holds by then."""
    torch.manual_seed(2)
    module = net().double()
    parameters = {name: torch.randn_like(p) * 0.2 for name, p in module.named_parameters()}
    a, b = torch.rand(2, 1, 1, 6, 5, dtype=torch.float64)
    gradients = []
    for recompute in (False, True):
        module.recompute = recompute
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        output = torch.func.functional_call(module, leaves, (a, b))
        total = sum(o.square().sum() for o in output) if isinstance(output, tuple) else output.square().sum()
        gradients.append(torch.autograd.grad(total, list(leaves.values())))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-10, atol=1e-12)


def test_symmetric_proposal_follows_a_swap_and_starts_at_one_half() -> None:
    torch.manual_seed(3)
    net = LossProposalNet(symmetric=True)
    a, b = torch.rand(2, 2, 1, 10, 12)
    for weights in net(a, b):
        assert torch.equal(weights, torch.full_like(weights, 0.5))
    nn.init.normal_(net.output.weight, std=0.1)
    for weights, swapped in zip(net(a, b), net(b, a), strict=True):
        torch.testing.assert_close(weights, swapped.flip(1))
        assert weights.std() > 1e-3


@pytest.mark.parametrize("prior", PRIORS)
def test_prior_prefers_the_better_source(prior: str) -> None:
    stripes = (torch.arange(24) // 2 % 2).float()[None, None, :, None].expand(1, 1, 24, 24)
    flat = torch.ones(1, 1, 24, 24)
    better = {"intensity": 0.8 * flat, "sharpness": stripes, "exposure": 0.5 * flat}
    worse = 0.1 * flat
    net = LossProposalNet(symmetric=True, prior=prior, prior_w=5.0, prior_v=2.0)
    w, _ = net(better[prior], worse)
    assert w[:, 0, 8:16, 8:16].min() > 0.5
    _, v = net(stripes, worse)
    assert v[:, 0, 8:16, 8:16].min() > 0.9
