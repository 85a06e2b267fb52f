"""The lite network: what its output is made of, any size, and its distillation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refusion import FusionNet, LiteNet
from refusion.config import TrainConfig
from refusion.lite import BANDS, LARGEST_GAIN
from refusion.losses import distillation_loss
from refusion.train import train
from refusion.weights import load_network, save_weights
from runtime.errors import InputError


@pytest.fixture
def net() -> LiteNet:
    """Random weights, the head's too, large enough for maps that vary over their whole range."""
    torch.manual_seed(0)
    net = LiteNet().eval()
    nn.init.normal_(net.head.weight, std=2.0)
    return net


def bands(x: Tensor) -> Tensor:
    """The bands of detail of one image, (1, BANDS, H, W), by their definition."""
    blur, found = torch.tensor([1.0, 2.0, 1.0]) / 4, []
    for k in range(BANDS):
        padded = F.pad(x, (2**k,) * 4, mode="replicate")
        blurred = F.conv2d(padded, torch.outer(blur, blur)[None, None], dilation=2**k)
        found.append(x - blurred)
        x = blurred
    return torch.cat(found, 1)


def test_size() -> None:
    assert sum(p.numel() for p in LiteNet().parameters()) < 60_000


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 7), (2, 7, 13), (1, 33, 46)])
def test_any_size(net: LiteNet, shape: tuple[int, int, int]) -> None:
    n, height, width = shape
    a, b = torch.rand(2, n, 1, height, width)
    with torch.inference_mode():
        fused = net(a, b)
    assert fused.shape == a.shape and fused.isfinite().all()
    assert fused.min() >= 0 and fused.max() <= 1


@torch.inference_mode()
def test_output_is_made_of_the_sources(net: LiteNet) -> None:
    a, b = torch.rand(2, 1, 1, 40, 52)
    fused, (w, factors) = net(a, b), net.decide(net.maps(a, b), a, b, net.bands(a, b))
    assert w.std() > 0.1 and factors.std() > 0.1  # or the bounds below say nothing
    assert factors.abs().max() <= LARGEST_GAIN
    detail = sum(factors[:, i::2] * bands(x) for i, x in enumerate((a, b))).sum(1, keepdim=True)
    torch.testing.assert_close(fused, (w * a + (1 - w) * b + detail).clamp(0, 1), rtol=0, atol=1e-6)
    # Between the sources, but for at most LARGEST_GAIN times the detail that is there.
    room = LARGEST_GAIN * (bands(a).abs() + bands(b).abs()).sum(1, keepdim=True) + 1e-6
    assert ((fused >= torch.minimum(a, b) - room) & (fused <= torch.maximum(a, b) + room)).all()


@torch.inference_mode()
def test_invents_nothing_where_the_sources_are_flat(net: LiteNet) -> None:
    part = torch.rand(1, 1, 32, 48)
    flat = torch.full_like(part, 0.4)
    torch.testing.assert_close(net(flat, flat), flat)
    reach = sum(2**k for k in range(BANDS))
    part[..., 10:40] = 0.4
    fused = net(part, flat)
    inside = slice(10 + reach, 40 - reach)
    torch.testing.assert_close(fused[..., inside], flat[..., inside])  # whatever its surroundings
    assert (fused[..., :10] - 0.4).abs().max() > 0.05


def test_starts_as_the_average_with_the_stronger_detail() -> None:
    net = LiteNet()
    a, flat = torch.rand(1, 1, 32, 32) * 0.5 + 0.25, torch.full((1, 1, 32, 32), 0.5)
    with torch.inference_mode():
        fused, swapped = net(a, flat), net(flat, a)
    torch.testing.assert_close(fused, swapped)
    torch.testing.assert_close(bands(fused)[:, :1].std(), bands(a)[:, :1].std(), rtol=0.05, atol=0)
    assert (fused - (a + flat) / 2).mean().abs() < 1e-2


@torch.inference_mode()
def test_detail_comes_from_the_source_that_has_more_of_it(net: LiteNet) -> None:
    texture = torch.rand(1, 1, 32, 64)
    left = torch.arange(64) < 32
    a, b = torch.where(left, texture, 0.5 + 0.05 * texture), torch.where(left, 0.5 + 0.05 * texture, texture)
    shares = net.shares(net.bands(a, b))
    assert shares.shape == (1, 2 * BANDS, 16, 32)
    assert (shares[:, 0::2, :, :12] > 0.99).all() and (shares[:, 1::2, :, 20:] > 0.99).all()
    assert net.shares(net.bands(a * 0 + 0.3, b * 0 + 0.7)).max() < 1e-6


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    net = LiteNet()
    a, b = torch.rand(2, 2, 1, 32, 32)
    nn.init.normal_(net.head.weight, std=0.1)
    for module in net.body:
        if module.context is not None:
            nn.init.normal_(module.context.weight, std=0.1)
    net(a, b).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_distillation_loss() -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 1, 24, 24) * 0.8
    assert distillation_loss(x, x) == 0
    assert distillation_loss(x + 0.1, x).item() == pytest.approx(0.1, abs=1e-5)  # no gradient differs
    blurred = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    same_l1 = x + (blurred - x).abs().mean()
    assert distillation_loss(blurred, x) > 2 * distillation_loss(same_l1, x)


def test_learns_what_the_teacher_does_and_is_saved_as_lite(tmp_path: Path) -> None:
    class Crops:
        def batch(self, epoch: int, stage: int, step: int, batch_size: int, *, rank: int = 0, world: int = 1):
            generator = torch.Generator().manual_seed(step % 4)
            return tuple(torch.rand(2, 1, 1, 32, 32, generator=generator))

        def steps_per_epoch(self, batch_size: int, world: int = 1) -> int:
            return 4

    torch.manual_seed(1)
    teacher = tmp_path / "teacher.safetensors"
    save_weights(teacher, FusionNet().state_dict(), {"task": "mif", "network": "FusionNet"})
    config = TrainConfig(
        task="mif", network="lite", teacher=str(teacher), distill=10.0, out=str(tmp_path / "run"), epochs=1,
        fusion_steps=40, meta_steps=2, lr=1e-2, exchange=False, threads=1, log_every=1,
    )  # fmt: skip
    train(config, Crops())
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    distances = [r["distillation_loss"] for r in map(json.loads, lines) if "distillation_loss" in r]
    assert sum(distances[-4:]) < 0.7 * sum(distances[:4])
    net, metadata = load_network(tmp_path / "run" / "last.safetensors")
    assert isinstance(net, LiteNet) and (metadata["network"], metadata["task"]) == ("LiteNet", "mif")
    with pytest.raises(InputError, match="the weights of a LiteNet, not of a FusionNet"):
        FusionNet.from_pretrained(tmp_path / "run" / "last.safetensors")
    with pytest.raises(InputError, match="the weights of a FusionNet, not of a LiteNet"):
        LiteNet.from_pretrained(teacher)


def test_unknown_network_is_one_line(tmp_path: Path) -> None:
    save_weights(tmp_path / "x.safetensors", LiteNet().state_dict(), {"network": "HugeNet"})
    with pytest.raises(InputError, match="the weights of a 'HugeNet', this release knows FusionNet, LiteNet"):
        load_network(tmp_path / "x.safetensors")
