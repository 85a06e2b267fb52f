"""The kernels' operations in plain PyTorch: what the tests compare with, and what runs on a CPU.

Shapes: images are (N, 1, H, W), weight maps (N, 2, H, W) with channel 0 for source A and channel 1 for source B.
Every function is differentiable as often as PyTorch allows, in forward and in reverse mode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def sobel(x: Tensor) -> Tensor:
    """Horizontal and vertical Sobel derivative with zero padding 1. (N, 1, H, W) -> (N, 2, H, W).

    Differences of shifted images, not a convolution: on a CPU the backward is up to 25 times faster, and on a GPU
    neither TF32 nor autocast makes it less exact than its input.
    """
    padded = F.pad(x, (1, 1, 1, 1))
    left, center, right = padded[..., :-2], padded[..., 1:-1], padded[..., 2:]
    difference = right - left
    smooth = left + 2.0 * center + right
    horizontal = difference[..., :-2, :] + 2.0 * difference[..., 1:-1, :] + difference[..., 2:, :]
    return torch.cat((horizontal, smooth[..., 2:, :] - smooth[..., :-2, :]), -3)


def gradient(x: Tensor) -> Tensor:
    """g(x) = |Sobel_x * x| + |Sobel_y * x| (ReFusion, gradient term of the losses). (N, 1, H, W) -> (N, 1, H, W)."""
    return sobel(x).abs().sum(1, keepdim=True)


def fusion_loss(
    fused: Tensor, a: Tensor, b: Tensor, w: Tensor, v: Tensor, gradient_weight: float | None = None
) -> tuple[Tensor, Tensor]:
    """Intensity and gradient term of the fusion loss, two scalars.

    intensity = mean((w_A (A - F))^2) + mean((w_B (B - F))^2)
    gradient  = mean((v_A (g(A) - g(F)))^2) + mean((v_B (g(B) - g(F)))^2)

    fused, a, b: (N, 1, H, W) in [0, 1]; w, v: (N, 2, H, W), the weights of A and B. gradient_weight, which the caller
    multiplies the gradient term with, is a hint for the kernel; nothing here depends on it.
    """
    sources = torch.cat((a, b), 1)
    source_gradients = torch.cat((gradient(a), gradient(b)), 1)
    intensity = (w * (sources - fused)).square().sum(1).mean()
    grad = (v * (source_gradients - gradient(fused))).square().sum(1).mean()
    return intensity, grad


def fusion_meta_grad(
    fused: Tensor, a: Tensor, b: Tensor, w: Tensor, v: Tensor, tangent: Tensor, gradient_weight: float
) -> tuple[Tensor, Tensor]:
    """Derivative of <dL_f/dF, tangent> in w and v, where L_f = intensity + gradient_weight * gradient.

    With T the tangent, M = N H W, s_x = sign(Sobel_x F), and g' = s_x Sobel_x T + s_y Sobel_y T:
        d/dw_A = -(4 / M) w_A (A - F) T          d/dv_A = -(4 / M) gradient_weight v_A (g(A) - g(F)) g'
    and B alike. fused, a, b, tangent: (N, 1, H, W); w, v: (N, 2, H, W). Returns (dw, dv), both (N, 2, H, W).
    """
    scale = -4.0 / fused.numel()
    derivative = sobel(fused)
    gradient_tangent = (derivative.sign() * sobel(tangent)).sum(1, keepdim=True)
    source_gradients = torch.cat((gradient(a), gradient(b)), 1)
    dw = scale * w * (torch.cat((a, b), 1) - fused) * tangent
    dv = scale * gradient_weight * v * (source_gradients - derivative.abs().sum(1, keepdim=True)) * gradient_tangent
    return dw, dv


def reconstruction_loss(a: Tensor, b: Tensor, a_hat: Tensor, b_hat: Tensor) -> Tensor:
    """L_r = mean(max(|A - A^|, |B - B^|)^2) + mean(max(|g(A) - g(A^)|, |g(B) - g(B^)|)^2), a scalar.

    All images (N, 1, H, W). Where both arguments of a maximum are equal each takes half of the derivative, as in
    torch.maximum.
    """
    intensity = torch.maximum((a - a_hat).abs(), (b - b_hat).abs())
    grad = torch.maximum((gradient(a) - gradient(a_hat)).abs(), (gradient(b) - gradient(b_hat)).abs())
    return intensity.square().mean() + grad.square().mean()


@torch.no_grad()
def max_normalized_update(parameters: Sequence[Tensor], gradients: Sequence[Tensor], lr: float) -> Tensor:
    """Gradient weighting, in place: p -= lr * g / max|g|, the maximum over ALL the tensors (ReFusion, outer update).

    Returns max|g|, a 0-d tensor. Where it is 0 nothing changes; where it is not finite nothing is applied, and the
    caller sees so from the value returned.
    """
    largest = torch.stack([g.abs().max() for g in gradients]).max()
    scale = torch.where(torch.isfinite(largest) & (largest > 0), lr / largest, torch.zeros_like(largest))
    for parameter, grad in zip(parameters, gradients, strict=True):
        parameter.sub_(torch.where(scale > 0, grad, torch.zeros_like(grad)) * scale.to(grad.dtype))
    return largest
