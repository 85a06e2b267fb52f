"""The meta-gradient: JVP against double backward, the definition itself, and two processes against one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from refusion.losses import OuterLoss, ReconstructionLoss, fusion_loss
from refusion.meta import Batch, MetaStep, directional_derivative, exchange, meta_step, plain
from refusion.model import FusionNet, LossProposalNet


class TargetBrightness(OuterLoss):
    """A downstream loss with a target and no network of its own."""

    def forward(self, fused: Tensor, a: Tensor, b: Tensor, target: Tensor | None = None) -> Tensor:
        assert target is not None
        return ((fused - target) ** 2 * (1 + a * b)).mean()


def batches(doubled: bool, size: int = 9, pairs: int = 2) -> tuple[Batch, Batch]:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(6, pairs, 1, size, size + 2, generator=generator, dtype=torch.float64)
    make = exchange if doubled else plain
    return make(images[0], images[1], images[2]), make(images[3], images[4], images[5])


def networks(symmetric: bool = False, outer: OuterLoss | None = None) -> tuple[FusionNet, LossProposalNet, OuterLoss]:
    torch.manual_seed(7)
    proposal = LossProposalNet(symmetric=symmetric, prior_w=3.0 * symmetric, prior_v=2.0 * symmetric)
    if symmetric:
        nn.init.normal_(proposal.output.weight, std=0.1)
    return FusionNet().double(), proposal.double(), (outer or ReconstructionLoss()).double()


def relative_difference(x: dict[str, Tensor], y: dict[str, Tensor]) -> float:
    squares = [((x[name] - y[name]).square().sum(), y[name].square().sum()) for name in y]
    return float((sum(d for d, _ in squares) / sum(n for _, n in squares)) ** 0.5)


def by_definition(
    nets: tuple[FusionNet, LossProposalNet, OuterLoss], inner: Batch, second: Batch, gradient_weight: float, lr: float
) -> dict[str, Tensor]:
    """The authors' way, written out: theta' keeps its graph, and the outer loss is differentiated through it."""
    fusion, proposal, outer = nets
    theta = {k: p.detach().requires_grad_() for k, p in fusion.named_parameters()}
    fused = functional_call(fusion, theta, (inner.a, inner.b))
    loss = fusion_loss(fused, inner.a, inner.b, *proposal(inner.a, inner.b), gradient_weight)
    slopes = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
    theta_new = {k: p - lr * g for (k, p), g in zip(theta.items(), slopes, strict=True)}
    psi = dict(outer.named_parameters())
    if psi:
        rebuilt = outer(fused.detach(), inner.target_a, inner.target_b, inner.target)
        psi_slopes = torch.autograd.grad(rebuilt, list(psi.values()))
        psi = {k: p - lr * g for (k, p), g in zip(psi.items(), psi_slopes, strict=True)}
    fused = functional_call(fusion, theta_new, (second.a, second.b))
    result = functional_call(outer, psi, (fused, second.target_a, second.target_b, second.target))
    phi = dict(proposal.named_parameters())
    return dict(zip(phi, torch.autograd.grad(result, list(phi.values())), strict=True))


@pytest.mark.parametrize("method", ["jvp", "double"])
@pytest.mark.parametrize("doubled", [False, True], ids=["plain", "exchange"])
@pytest.mark.parametrize("gradient_weight", [0.0, 0.7], ids=["intensity", "intensity+gradient"])
def test_meta_gradient_is_that_of_the_definition(method: str, doubled: bool, gradient_weight: float) -> None:
    nets = networks()
    inner, second = batches(doubled)
    step = meta_step(*nets, inner, second, gradient_weight=gradient_weight, lr=1e-2, method=method)
    assert relative_difference(step.gradients, by_definition(nets, inner, second, gradient_weight, 1e-2)) < 1e-10


def test_meta_gradient_of_the_gradient_term_alone() -> None:
    nets = networks()
    inner, second = batches(True)
    huge = 1e6  # the intensity term vanishes beside it
    step = meta_step(*nets, inner, second, gradient_weight=huge, lr=1e-8)
    assert relative_difference(step.gradients, by_definition(nets, inner, second, huge, 1e-8)) < 1e-10


@pytest.mark.parametrize("symmetric", [False, True], ids=["paper", "symmetric"])
def test_meta_gradient_with_custom_outer_loss(symmetric: bool) -> None:
    nets = networks(symmetric, TargetBrightness())
    inner, second = batches(True)
    step = meta_step(*nets, inner, second, gradient_weight=0.5, lr=1e-2)
    assert relative_difference(step.gradients, by_definition(nets, inner, second, 0.5, 1e-2)) < 1e-10


def test_meta_gradient_with_recomputation() -> None:
    nets = networks()
    inner, second = batches(True)
    expected = by_definition(nets, inner, second, 0.5, 1e-2)
    for net in nets:
        for module in net.modules():
            if hasattr(module, "recompute"):
                module.recompute = True
    step = meta_step(*nets, inner, second, gradient_weight=0.5, lr=1e-2)
    assert relative_difference(step.gradients, expected) < 1e-10


def test_meta_gradient_changes_no_network() -> None:
    nets = networks()
    before = [p.clone() for net in nets for p in net.parameters()]
    step = meta_step(*nets, *batches(True), gradient_weight=0.5, lr=1e-2)
    assert all(torch.equal(p, q) for p, q in zip(before, (p for net in nets for p in net.parameters()), strict=True))
    assert all(p.grad is None for net in nets for p in net.parameters())
    assert isinstance(step, MetaStep) and step.outer_loss > 0 and not step.outer_loss.requires_grad


def test_exchange_swaps_sources_and_keeps_targets() -> None:
    a, b, target = torch.rand(3, 2, 1, 4, 4).unbind()
    batch = exchange(a, b, target)
    assert torch.equal(batch.a, torch.cat((a, b))) and torch.equal(batch.b, torch.cat((b, a)))
    assert torch.equal(batch.target_a, torch.cat((a, a))) and torch.equal(batch.target_b, torch.cat((b, b)))
    assert batch.target is not None and torch.equal(batch.target, torch.cat((target, target)))


def test_directional_derivative_is_that_of_a_finite_difference() -> None:
    fusion, _, _ = networks()
    inner, _ = batches(False)
    parameters = dict(fusion.named_parameters())
    direction = [torch.randn_like(p) for p in parameters.values()]
    tangent = directional_derivative(fusion, parameters, direction, inner.a, inner.b)
    assert tangent.abs().max() > 1e-3
    outputs = []
    for sign in (1, -1):
        moved = {k: p + sign * 1e-6 * d for (k, p), d in zip(parameters.items(), direction, strict=True)}
        outputs.append(functional_call(fusion, moved, (inner.a, inner.b)))
    torch.testing.assert_close(tangent, ((outputs[0] - outputs[1]) / 2e-6).detach(), rtol=1e-4, atol=1e-5)


PROCESS = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {folder!r})
from refusion import distributed
from refusion.config import TrainConfig
from refusion.train import Trainer
torch.set_num_threads(1)
torch.set_default_dtype({dtype})
distributed.start(torch.device("cpu"))

class Pairs:
    images = torch.rand(2, 8, 1, 16, 16, generator=torch.Generator().manual_seed(3)).to({dtype})
    def batch(self, epoch, stage, step, batch_size, *, rank=0, world=1):
        first = (step * world + rank) * batch_size + 3 * stage
        return [x[first : first + batch_size] for x in self.images]
    def steps_per_epoch(self, batch_size, world=1):
        return 1

config = TrainConfig(batch_size=2 // distributed.world(), accumulate=1, lr=1e-3, lr_meta=1e-2, lr_inner=1e-2,
                     meta_optimizer={optimizer!r}, meta_gradient={method!r}, out=sys.argv[1])
trainer = Trainer(config, Pairs())
trainer.meta_step()
trainer.fusion_step()
if distributed.rank() == 0:
    torch.save({{n: net.state_dict() for n, net in trainer.networks.items()}}, sys.argv[1])
distributed.stop()
"""


@pytest.mark.parametrize(
    ("method", "optimizer", "dtype"),
    [("jvp", "max_normalized", "torch.float32"), ("jvp", "adam", "torch.float64"), ("double", "adam", "torch.float64")],
)
def test_meta_gradient_step_on_two_processes_equals_one(
    tmp_path: Path, method: str, optimizer: str, dtype: str
) -> None:
    """In float32 the loss-proposal network alone is compared: Adam's first step is a sign and magnifies rounding."""
    script = tmp_path / "step.py"
    folder = str(Path(__file__).resolve().parents[2])
    script.write_text(PROCESS.format(folder=folder, method=method, optimizer=optimizer, dtype=dtype))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    for command, name in (([sys.executable], "one.pt"), (torchrun, "two.pt")):
        result = subprocess.run(
            [*command, str(script), str(tmp_path / name)], env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    torch.manual_seed(0)
    initial = {"fusion": FusionNet().state_dict(), "proposal": LossProposalNet().state_dict()}
    double = dtype == "torch.float64"
    for network in ("fusion", "proposal", "outer") if double else ("proposal",):
        moved = 0.0
        for name, tensor in one[network].items():
            torch.testing.assert_close(two[network][name], tensor, rtol=0, atol=1e-9 if double else 1e-5)
            moved = max(moved, float((tensor - initial.get(network, {}).get(name, 0)).abs().max()))
        assert moved > 5e-4  # the step did something
