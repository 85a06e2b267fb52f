"""The fusion network takes the block kernels by itself in the half types, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from refusion.meta import directional_derivative
from refusion.model import FusionNet


@pytest.fixture
def net(device: str) -> FusionNet:
    torch.manual_seed(0)
    return FusionNet().to(device).half().eval()


def images(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.rand(2, 1, 1, 9, 14, generator=generator).to(device, dtype))


def test_kernels_give_the_network_s_output(net: FusionNet, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = images(device, torch.float16)
    with torch.no_grad():
        monkeypatch.setenv("REFUSION_KERNELS", "reference")
        eager = net(a, b)
        exact = FusionNet().to(device).double()
        exact.load_state_dict(net.state_dict())
        truth = exact(a.double(), b.double())
        assert net._folded_weights is None
        monkeypatch.setenv("REFUSION_KERNELS", "triton" if device == "cuda" else "interpret")
        fused = net(a, b)
    assert net._folded_weights is not None
    assert fused.dtype == torch.float16 and fused.shape == eager.shape
    assert (fused.double() - truth).abs().max() <= 2 * (eager.double() - truth).abs().max() + 1e-4


def test_weights_are_folded_once_and_again_after_a_change(
    net: FusionNet, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSION_KERNELS", "triton" if device == "cuda" else "interpret")
    first = net._folded()
    assert net._folded() is first
    with torch.no_grad():
        net.encoder1[0].norm1.weight.mul_(2)
    assert net._folded() is not first


def test_float32_gradients_and_tangents_stay_with_pytorch(
    net: FusionNet, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSION_KERNELS", "triton" if device == "cuda" else "interpret")
    a, b = images(device, torch.float16)
    net(a, b).float().sum().backward()
    assert net.encoder1[0].attention.qkv.weight.grad is not None
    parameters = dict(net.named_parameters())
    tangent = directional_derivative(net, parameters, [torch.ones_like(p) for p in parameters.values()], a, b)
    assert tangent.abs().max() > 0
    with torch.no_grad():
        net.float()(a.float(), b.float())
    assert net._folded_weights is None
