"""The networks' layers and the meta step as the paper's formulas read, to compare ours with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from refusion import model
from refusion.losses import OuterLoss, fusion_loss
from refusion.meta import Batch


def attend(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, projection: nn.Conv2d) -> Tensor:
    """MDTA with q and k normalised first, the heads apart, and the projection as a convolution of its own."""
    n, c, h, w = q.shape
    q, k, v = (x.reshape(n, model.HEADS, c // model.HEADS, h * w) for x in (q, k, v))
    attention = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * temperature).softmax(-1)
    return projection((attention @ v).reshape(n, c, h, w))


def layer_norm(self: model.ChannelLayerNorm, x: Tensor) -> Tensor:
    """Layer norm of (N, H*W, C), written out, as Restormer's code has it."""
    n, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1).reshape(n, h * w, c)
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    x = (x - mean) / torch.sqrt(variance + 1e-5) * self.weight + self.bias
    return x.reshape(n, h, w, c).permute(0, 3, 1, 2).contiguous()


def use_textbook_layers() -> None:
    """Replace the layers of refusion.model in this process."""
    model.attend = attend
    model.ChannelLayerNorm.forward = layer_norm  # type: ignore[method-assign]
    model.FusionNet._stem = model.LossProposalNet._stem = model.ReconstructionNet._stem = (  # type: ignore[method-assign]
        lambda self, conv, x: conv(x)
    )


def meta_step_by_definition(
    fusion: nn.Module,
    proposal: nn.Module,
    outer: OuterLoss,
    inner: Batch,
    second: Batch,
    *,
    gradient_weight: float,
    lr: float,
) -> list[Tensor]:
    """theta' keeps its graph; the outer loss is differentiated through it down to the loss-proposal network."""
    theta = {k: p.detach().requires_grad_() for k, p in fusion.named_parameters()}
    psi = dict(outer.named_parameters())
    fused = functional_call(fusion, theta, (inner.a, inner.b))
    w, v = proposal(inner.a, inner.b)
    loss = fusion_loss(fused, inner.a, inner.b, w, v, gradient_weight)
    slopes = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
    theta = {k: p - lr * g for (k, p), g in zip(theta.items(), slopes, strict=True)}
    rebuilt = outer(fused.detach(), inner.target_a, inner.target_b, inner.target)
    psi_slopes = torch.autograd.grad(rebuilt, list(psi.values()))
    psi = {k: p - lr * g for (k, p), g in zip(psi.items(), psi_slopes, strict=True)}
    fused = functional_call(fusion, theta, (second.a, second.b))
    result = functional_call(outer, psi, (fused, second.target_a, second.target_b, second.target))
    return list(torch.autograd.grad(result, list(proposal.parameters())))
