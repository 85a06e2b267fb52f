"""Fusion loss, and the outer losses that the loss-proposal network learns from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import kernels
from refusion.model import ReconstructionNet


def fusion_loss(fused: Tensor, a: Tensor, b: Tensor, w: Tensor, v: Tensor, gradient_weight: float) -> Tensor:
    """L_f = intensity term + gradient_weight * gradient term, a scalar (equations of the learnable fusion loss).

    fused, a, b: (N, 1, H, W) in [0, 1]; w, v: (N, 2, H, W) from the loss-proposal network.
    """
    fused, w, v = _wide(fused), _wide(w), _wide(v)
    intensity, grad = kernels.fusion_loss(fused, a, b, w, v, gradient_weight)
    return intensity + gradient_weight * grad


def distillation_loss(fused: Tensor, taught: Tensor) -> Tensor:
    """Distance to a teacher's fused image: mean |difference|, plus that of the signed Sobel gradients. A scalar.

    fused, taught: (N, 1, H, W) in [0, 1]. The gradients count because that is where two networks of the same mean
    brightness differ: an L1 distance alone is met by a picture that is a little blurred.
    """
    difference = _wide(fused) - _wide(taught)
    sobel = difference.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernels_xy = torch.stack((sobel, sobel.t()))[:, None]
    return difference.abs().mean() + nn.functional.conv2d(difference, kernels_xy).abs().mean()


def _wide(x: Tensor) -> Tensor:
    """float32 for what autocast returns: losses are summed in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def gradient_ramp(epoch: int, epochs: int) -> float:
    """Growth of the gradient term's weight in epoch 0 .. epochs - 1: linear, from 1 / epochs to 1."""
    return (epoch + 1) / epochs


class OuterLoss(nn.Module):
    """What the fused image is good for: the loss whose meta-gradient trains the loss-proposal network.

    A subclass is a callable (fused, a, b, target) -> scalar, differentiable in fused. fused, a, b: (N, 1, H, W) in
    [0, 1]; a and b are always in their own order, even where fused came from the exchanged pair (b, a); target is what
    the data set gives beside the pair, (N, ...), or None. Its parameters, if any, learn beside the fusion network.
    """

    def forward(self, fused: Tensor, a: Tensor, b: Tensor, target: Tensor | None = None) -> Tensor:
        raise NotImplementedError


class ReconstructionLoss(OuterLoss):
    """L_r: how well a network rebuilds both sources from the fused image. The paper's outer loss, and the default.

    noise: standard deviation of Gaussian noise added to fused before it is rebuilt, so that contrast counts (ours).
    """

    def __init__(self, channels: int = 16, noise: float = 0.0):
        super().__init__()
        self.network = ReconstructionNet(channels)
        self.noise = noise

    def forward(self, fused: Tensor, a: Tensor, b: Tensor, target: Tensor | None = None) -> Tensor:
        if self.noise:
            fused = fused + self.noise * torch.randn_like(fused)
        a_hat, b_hat = self.network(fused)
        return kernels.reconstruction_loss(a, b, a_hat.to(a.dtype), b_hat.to(b.dtype))
