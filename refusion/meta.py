"""One meta step: how the loss-proposal network P (phi) learns from what its loss did to the fusion network F (theta).

    inner:  theta' = theta - lr * grad_theta L_f(F_theta(A, B); w, v),  (w, v) = P_phi(A, B)
            psi'   = psi   - lr * grad_psi   L_o(F_theta(A, B))         (outer loss's own network, F detached)
    outer:  grad_phi L_o(F_theta'(A2, B2); psi') on a second batch, through theta'

Pure functions over dictionaries of parameters: nothing here changes a network in place.

The meta-gradient needs no double backward. With u = grad_theta' L_o, one ordinary backward of the outer loss,
    grad_phi L_o = -lr * grad_phi <grad_theta L_f, u> = -lr * grad_phi <dL_f/dF, Fdot>,
Fdot = the derivative of F_theta(A, B) along u, one forward-mode JVP. L_f is in closed form in F, w and v, so the
derivative of that inner product in w and v is analytic (kernels.fusion_meta_grad); what remains is one backward of P.
It is exact. `double` keeps the double backward for comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import Module

import kernels
from refusion.losses import OuterLoss, fusion_loss

Parameters = dict[str, Tensor]
Mean = Callable[[Sequence[Tensor]], list[Tensor]]  # average over the processes of a distributed run


class Batch(NamedTuple):
    """A batch of pairs, and the same pairs in the order that the reconstruction is held against."""

    a: Tensor  # (N, 1, H, W) in [0, 1], what the fusion network gets
    b: Tensor
    target_a: Tensor  # (N, 1, H, W): the sources in their own order
    target_b: Tensor
    target: Tensor | None = None  # (N, ...): what a downstream loss is held against


def exchange(a: Tensor, b: Tensor, target: Tensor | None = None) -> Batch:
    """The batch doubled with the sources swapped, (A, B) and (B, A); what it is held against keeps its order."""
    doubled = None if target is None else torch.cat((target, target))
    return Batch(torch.cat((a, b)), torch.cat((b, a)), torch.cat((a, a)), torch.cat((b, b)), doubled)


def plain(a: Tensor, b: Tensor, target: Tensor | None = None) -> Batch:
    """The batch without exchange."""
    return Batch(a, b, a, b, target)


@dataclass
class MetaStep:
    """What one inner and outer update gave."""

    gradients: Parameters  # of the outer loss in phi
    inner_loss: Tensor  # L_f before the inner update
    outer_loss: Tensor  # L_o after it


def same_process(tensors: Sequence[Tensor]) -> list[Tensor]:
    return list(tensors)


def _leaves(module: Module) -> Parameters:
    return {name: p.detach().requires_grad_() for name, p in module.named_parameters()}


def _descend(parameters: Parameters, gradients: Sequence[Tensor], lr: float) -> Parameters:
    return {
        name: (p.detach() - lr * g.detach()).requires_grad_()
        for (name, p), g in zip(parameters.items(), gradients, strict=True)
    }


def _outer(outer: OuterLoss, psi: Parameters, fused: Tensor, batch: Batch) -> Tensor:
    return functional_call(outer, psi, (fused, batch.target_a, batch.target_b, batch.target))


def _inner_update_of_outer(outer: OuterLoss, fused: Tensor, batch: Batch, lr: float, mean: Mean) -> Parameters:
    """psi' = psi - lr * grad_psi L_o(F detached)."""
    psi = _leaves(outer)
    if not psi:
        return psi
    loss = _outer(outer, psi, fused.detach(), batch)
    return _descend(psi, mean(torch.autograd.grad(loss, list(psi.values()))), lr)


def _outer_gradient(
    fusion: Module, outer: OuterLoss, theta: Parameters, psi: Parameters, batch: Batch, mean: Mean
) -> tuple[list[Tensor], Tensor]:
    """u = grad_theta' L_o(F_theta'(A2, B2); psi') and the loss."""
    loss = _outer(outer, psi, functional_call(fusion, theta, (batch.a, batch.b)), batch)
    return mean(torch.autograd.grad(loss, list(theta.values()))), loss.detach()


@torch.no_grad()
def directional_derivative(
    module: Module, parameters: Parameters, direction: Sequence[Tensor], *inputs: Tensor
) -> Tensor:
    """Derivative of module(inputs) along `direction` in its parameters, by one forward-mode JVP."""
    with forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(p.detach(), t)
            for (name, p), t in zip(parameters.items(), direction, strict=True)
        }
        tangent = forward_ad.unpack_dual(functional_call(module, duals, inputs)).tangent
    if tangent is None:
        raise RuntimeError("the output does not depend on the parameters: its directional derivative is empty")
    return tangent


def meta_step(
    fusion: Module,
    proposal: Module,
    outer: OuterLoss,
    inner_batch: Batch,
    outer_batch: Batch,
    *,
    gradient_weight: float,
    lr: float,
    method: Literal["jvp", "double"] = "jvp",
    mean: Mean = same_process,
) -> MetaStep:
    """Inner and outer update on two batches: the gradient of the outer loss in the loss-proposal network's parameters.

    gradient_weight: weight of the gradient term in L_f; lr: step of the inner update; mean: averages gradients over
    processes (each with a batch of the same size), so that N processes equal one with N times the batch.
    """
    step = _jvp_step if method == "jvp" else _double_backward_step
    return step(fusion, proposal, outer, inner_batch, outer_batch, gradient_weight, lr, mean)


def _jvp_step(
    fusion: Module,
    proposal: Module,
    outer: OuterLoss,
    inner: Batch,
    second: Batch,
    gradient_weight: float,
    lr: float,
    mean: Mean,
) -> MetaStep:
    with torch.no_grad():  # P runs again at the end: its graph and F's are never alive together
        w, v = proposal(inner.a, inner.b)
    theta = _leaves(fusion)
    fused = functional_call(fusion, theta, (inner.a, inner.b))
    loss = fusion_loss(fused, inner.a, inner.b, w, v, gradient_weight)
    theta_new = _descend(theta, mean(torch.autograd.grad(loss, list(theta.values()))), lr)
    fused = fused.detach()
    psi_new = _inner_update_of_outer(outer, fused, inner, lr, mean)
    direction, outer_loss = _outer_gradient(fusion, outer, theta_new, psi_new, second, mean)

    tangent = directional_derivative(fusion, theta, direction, inner.a, inner.b)
    dw, dv = kernels.fusion_meta_grad(fused.to(w.dtype), inner.a, inner.b, w, v, tangent.to(w.dtype), gradient_weight)
    phi = dict(proposal.named_parameters())
    gradients = torch.autograd.grad(proposal(inner.a, inner.b), list(phi.values()), (-lr * dw, -lr * dv))
    return MetaStep(dict(zip(phi, mean(gradients), strict=True)), loss.detach(), outer_loss)


def _double_backward_step(
    fusion: Module,
    proposal: Module,
    outer: OuterLoss,
    inner: Batch,
    second: Batch,
    gradient_weight: float,
    lr: float,
    mean: Mean,
) -> MetaStep:
    theta = _leaves(fusion)
    fused = functional_call(fusion, theta, (inner.a, inner.b))
    w, v = proposal(inner.a, inner.b)
    loss = fusion_loss(fused, inner.a, inner.b, w, v, gradient_weight)
    theta_gradient = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
    theta_new = _descend(theta, mean(theta_gradient), lr)
    psi_new = _inner_update_of_outer(outer, fused, inner, lr, mean)
    direction, outer_loss = _outer_gradient(fusion, outer, theta_new, psi_new, second, mean)
    # d theta' / d phi = -lr d grad_theta L_f / d phi, applied to u: backward through the backward of L_f.
    phi = dict(proposal.named_parameters())
    gradients = torch.autograd.grad(theta_gradient, list(phi.values()), [-lr * u for u in direction])
    return MetaStep(dict(zip(phi, mean(gradients), strict=True)), loss.detach(), outer_loss)
