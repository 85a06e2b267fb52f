"""Training in three stages an epoch (ReFusion, section 3.4): inner and outer updates, then fusion and reconstruction.

    python -m refusion.train --task ivif --data DIR --out runs/ivif            # or: refusion train ...
    torchrun --nproc-per-node 2 -m refusion.train --task ivif --data DIR --out runs/ivif

Each epoch first makes `meta_steps` meta steps (refusion.meta), which change the loss-proposal network alone; then it
goes over the training set with that network frozen: an Adam step on the fusion network with the proposed loss, then one
on the outer loss's own network (source reconstruction). In `out`: checkpoint.pt (resumes bit-exactly), last.safetensors
and best.safetensors (fusion network), log.jsonl and TensorBoard records.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

import kernels
from refusion import distributed, records
from refusion.allocator import keep_freed_memory
from refusion.checkpoint import load_checkpoint, save_checkpoint
from refusion.config import TrainConfig, add_flags, from_flags
from refusion.lite import LiteNet
from refusion.losses import OuterLoss, ReconstructionLoss, distillation_loss, fusion_loss, gradient_ramp
from refusion.meta import Batch, exchange, meta_step, plain
from refusion.model import FusionNet, LossProposalNet
from refusion.weights import load_network, save_weights
from runtime.errors import InputError, exit_code
from runtime.tasks import TASKS

log = logging.getLogger("refusion")

# Stages of an epoch, as the data set numbers its orders.
INNER, OUTER, FUSION = 0, 1, 2


class Data(Protocol):
    """What training reads: refusion.data.PairDataset, or anything alike; a third tensor of a batch is the target."""

    def batch(
        self, epoch: int, stage: int, step: int, batch_size: int, *, rank: int = 0, world: int = 1
    ) -> Sequence[Tensor]: ...

    def steps_per_epoch(self, batch_size: int, world: int = 1) -> int: ...


@dataclass
class Position:
    """Where a run is: the next step. Stage 0 counts meta steps, stage 1 fusion steps."""

    epoch: int = 0
    stage: int = 0
    step: int = 0
    total: int = 0  # steps since the start


class Trainer:
    """State of a run: networks, optimizers, schedules, position. `run` goes on from the position to the end."""

    def __init__(self, config: TrainConfig, data: Data, outer: OuterLoss | None = None):
        self.config, self.data = config, data
        self.device = _device(config.device)
        torch.manual_seed(config.seed)
        self.fusion: FusionNet | LiteNet = LiteNet() if config.network == "lite" else FusionNet()
        if config.init:
            self.fusion.load_state_dict(_same_kind(config.init, self.fusion).state_dict())
        self.teacher = load_network(config.teacher)[0].requires_grad_(False) if config.teacher else None
        self.proposal = LossProposalNet(
            symmetric=config.loss_proposal == "symmetric",
            prior=config.prior,
            prior_w=config.prior_w,
            prior_v=config.prior_v,
        )
        self.outer = ReconstructionLoss(noise=config.outer_noise) if outer is None else outer
        self.networks: dict[str, torch.nn.Module] = {
            "fusion": self.fusion,
            "proposal": self.proposal,
            "outer": self.outer,
        }
        for net in (*self.networks.values(), *([self.teacher] if self.teacher else [])):
            net.to(device=self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            for module in net.modules():
                if hasattr(module, "recompute"):
                    module.recompute = config.recompute  # type: ignore[assignment]
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "fusion": torch.optim.Adam(self.fusion.parameters(), config.lr)
        }
        if any(True for _ in self.outer.parameters()):
            self.optimizers["outer"] = torch.optim.Adam(self.outer.parameters(), config.lr)
        # With max-normalised updates this one only holds the learning rate.
        kind = torch.optim.Adam if config.meta_optimizer == "adam" else torch.optim.SGD
        self.optimizers["proposal"] = kind(self.proposal.parameters(), config.lr_meta)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.accumulated = [torch.zeros_like(p) for p in self.proposal.parameters()]
        self.position = Position()
        self.best = -math.inf
        self.fusion_steps = config.fusion_steps or data.steps_per_epoch(config.batch_size, distributed.world())

    @property
    def lr_factor(self) -> float:
        """What all learning rates are multiplied with in this epoch; the cosine ends at 1 %."""
        epoch = self.position.epoch
        if self.config.schedule == "cosine":
            return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * epoch / self.config.epochs))
        return self.config.lr_gamma ** (epoch // self.config.lr_step)

    def _set_learning_rates(self) -> None:
        for name, optimizer in self.optimizers.items():
            lr = self.config.lr_meta if name == "proposal" else self.config.lr
            optimizer.param_groups[0]["lr"] = lr * self.lr_factor

    @property
    def gradient_weight(self) -> float:
        ramp = gradient_ramp(self.position.epoch, self.config.epochs) if self.config.ramp else 1.0
        return ramp * self.config.gradient_weight

    def batch(self, stage: int, step: int) -> Batch:
        world, rank = distributed.world(), distributed.rank()
        tensors = self.data.batch(self.position.epoch, stage, step, self.config.batch_size, rank=rank, world=world)
        tensors = [t.to(self.device, non_blocking=True) for t in tensors]
        return (exchange if self.config.exchange else plain)(*tensors)

    def _autocast(self, enabled: bool) -> contextlib.AbstractContextManager[Any]:
        dtype = torch.float16 if self.config.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=enabled)

    def meta_step(self) -> dict[str, float | Tensor]:
        """Inner and outer update on fresh batches; every `accumulate` steps an update of the loss-proposal network."""
        config, step = self.config, self.position.step
        with self._autocast(config.amp == "bf16"):
            result = meta_step(
                self.fusion,
                self.proposal,
                self.outer,
                self.batch(INNER, step),
                self.batch(OUTER, step),
                gradient_weight=self.gradient_weight,
                lr=config.lr_inner * self.lr_factor,
                method=config.meta_gradient,
                mean=distributed.mean,
            )
        for total, gradient in zip(self.accumulated, result.gradients.values(), strict=True):
            total.add_(gradient)
        largest = torch.zeros(())
        if (step + 1) % config.accumulate == 0:
            largest = self._update_proposal()
        return {"inner_loss": result.inner_loss, "outer_loss": result.outer_loss, "meta_gradient": largest}

    def _update_proposal(self) -> Tensor:
        """phi -= lr * g / max|g|, or Adam, with the accumulated gradient; returns max|g|."""
        optimizer, parameters = self.optimizers["proposal"], list(self.proposal.parameters())
        if self.config.meta_optimizer == "adam":
            largest = torch.stack([g.abs().max() for g in self.accumulated]).max()
            if torch.isfinite(largest):
                for p, g in zip(parameters, self.accumulated, strict=True):
                    p.grad = g.clone()
                optimizer.step()
                optimizer.zero_grad()
        else:
            largest = kernels.max_normalized_update(parameters, self.accumulated, optimizer.param_groups[0]["lr"])
        if not torch.isfinite(largest):
            log.warning("step %d: the meta-gradient is not finite; this update is left out", self.position.total)
        for total in self.accumulated:
            total.zero_()
        return largest

    def fusion_step(self) -> dict[str, float | Tensor]:
        """Loss-proposal network frozen: an Adam step on the fusion network, then one on the outer loss's network."""
        batch = self.batch(FUSION, self.position.step)
        with self._autocast(self.config.amp != "none"):
            with torch.no_grad():
                w, v = self.proposal(batch.a, batch.b)
            fused = self.fusion(batch.a, batch.b)
            loss = fusion_loss(fused, batch.a, batch.b, w, v, self.gradient_weight)
            scalars: dict[str, float | Tensor] = {"fusion_loss": loss.detach()}
            if self.teacher is not None:
                with torch.no_grad():
                    taught = self.teacher(batch.a, batch.b)
                distance = distillation_loss(fused, taught)
                scalars["distillation_loss"] = distance.detach()
                loss = loss + self.config.distill * distance
            self._descend("fusion", loss)
            outer = self.outer(fused.detach(), batch.target_a, batch.target_b, batch.target)
            if "outer" in self.optimizers:
                self._descend("outer", outer)
        if self.scaler.is_enabled():
            self.scaler.update()
        return scalars | {"outer_loss_of_fused": outer.detach()}

    def _descend(self, name: str, loss: Tensor) -> None:
        optimizer, parameters = self.optimizers[name], list(self.networks[name].parameters())
        optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        for p, gradient in zip(parameters, distributed.mean(gradients), strict=True):
            p.grad = gradient
        self.scaler.step(optimizer)

    def steps(self) -> Iterator[dict[str, float | Tensor]]:
        """Make the steps of the current epoch that are left, yielding the scalars of each."""
        self._set_learning_rates()
        stages = ((self.meta_step, self.config.meta_steps), (self.fusion_step, self.fusion_steps))
        while self.position.stage < len(stages):
            step, count = stages[self.position.stage]
            while self.position.step < count:
                scalars = step()
                self.position.step += 1
                self.position.total += 1
                yield scalars
            self.position.stage, self.position.step = self.position.stage + 1, 0

    def run(self) -> None:
        """Train to the end; only rank 0 writes."""
        config, out, main = self.config, Path(self.config.out), distributed.rank() == 0
        recorder = records.Recorder(out, enabled=main, first_step=self.position.total)
        per_epoch = config.meta_steps + self.fusion_steps
        bar = tqdm(
            total=config.epochs * per_epoch, initial=self.position.total, unit="step", disable=None if main else True
        )
        while self.position.epoch < config.epochs:
            for scalars in self.steps():
                bar.update()
                total = self.position.total
                if total % config.log_every == 0 and main:
                    shown = recorder.scalars(total, self.position.epoch, scalars)
                    bar.set_description(f"epoch {self.position.epoch + 1}/{config.epochs} {shown}")
                if total % config.checkpoint_every == 0 and main:
                    save_checkpoint(out / "checkpoint.pt", self)
            self._end_epoch(recorder, main)
        bar.close()
        recorder.close()

    def _end_epoch(self, recorder: records.Recorder, main: bool) -> None:
        config, out = self.config, Path(self.config.out)
        if main:
            batch = self.batch(FUSION, 0)
            with torch.no_grad():
                w, v = self.proposal(batch.a, batch.b)
                fused = self.fusion(batch.a, batch.b)
            recorder.panel(self.position.total, batch.a, batch.b, fused, w, v)
        epoch = self.position.epoch
        self.position = Position(epoch + 1, 0, 0, self.position.total)
        if main:
            measured = epoch + 1 == config.epochs or (epoch + 1) % config.dev_every == 0
            score = self._measure(recorder) if config.dev and measured else None
            save_weights(out / "last.safetensors", self.fusion.state_dict(), self._metadata(score))
            if score is not None and score > self.best:
                self.best = score
                save_weights(out / "best.safetensors", self.fusion.state_dict(), self._metadata(score))
            save_checkpoint(out / "checkpoint.pt", self)

    def _measure(self, recorder: records.Recorder) -> float:
        """Mean of Qabf and VIF over the dev sources, as `refusion eval` computes them for stills."""
        metrics = records.measure(self.fusion, self.config.dev, self.config.dev_limit)
        recorder.scalars(self.position.total, self.position.epoch, {f"dev_{k}": v for k, v in metrics.items()})
        return (metrics["Qabf"] + metrics["VIF"]) / 2

    def _metadata(self, score: float | None) -> dict[str, object]:
        return {
            "task": self.config.task,
            "input_order": "a = {}, b = {}".format(*TASKS[self.config.task]),
            "network": type(self.fusion).__name__,
            "training_data": ", ".join(Path(d).name for d in self.config.data) or "generated",
            "epochs": self.position.epoch,
            "steps": self.position.total,
            "dev_score": "" if score is None else f"{score:.4f}",
            "source_commit": records.source_commit(),
        }


def _same_kind(weights: str, net: FusionNet | LiteNet) -> FusionNet | LiteNet:
    """The network of the weights to start from, which must be of the kind that is trained."""
    loaded = load_network(weights)[0]
    if type(loaded) is not type(net):
        raise InputError(f"setting 'init' is {weights}, a {type(loaded).__name__}; a {type(net).__name__} is trained")
    return loaded


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"setting 'device' is {name!r}: give auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("setting 'device' is cuda, but PyTorch sees no CUDA GPU: give --device cpu")
    return device


def train(config: TrainConfig, data: Data | None = None, outer: OuterLoss | None = None) -> Trainer:
    """Train as configured; data and outer loss default to the folders of the configuration and to reconstruction.

    Raises InputError for bad settings or data, and for a checkpoint that belongs to other settings.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    out = Path(config.out)
    if (out / "checkpoint.pt").exists() and not config.resume:
        raise InputError(f"{out} holds a run already: go on with --resume, or give another --out")
    device = _device(config.device)
    try:
        kernels.backend_for(torch.empty(0, device=device))  # a wrong REFUSION_KERNELS shows before any work
    except (ValueError, RuntimeError) as error:
        raise InputError(str(error)) from error
    distributed.start(device)
    try:
        return _train(config, data, outer)
    finally:
        distributed.stop()


def _train(config: TrainConfig, data: Data | None, outer: OuterLoss | None) -> Trainer:
    out = Path(config.out)
    if data is None:
        from refusion.data import PairDataset

        if not config.data:
            raise InputError("no training data: give --data DIR, a folder with pairs in a/ and b/")
        data = PairDataset(
            [Path(d) for d in config.data],
            crop=config.crop,
            seed=config.seed,
            a_name=config.a_name,
            b_name=config.b_name,
            skip_bad=config.skip_bad,
            flips=config.flips,
            darken=config.darken,
            cache_gb=config.cache_gb,
            progress=distributed.rank() == 0,
        )
    trainer = Trainer(config, data, outer)
    if config.resume and (out / "checkpoint.pt").exists():
        load_checkpoint(out / "checkpoint.pt", trainer)
    elif distributed.rank() == 0:
        records.write_config(out, config)
    started = time.monotonic()
    trainer.run()
    log.info("%d steps in %.0f s: %s", trainer.position.total, time.monotonic() - started, out)
    return trainer


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `python -m refusion.train` and torchrun; the same flags as `refusion train`."""
    parser = argparse.ArgumentParser(prog="refusion.train", description="Train a fusion network.")
    add_flags(parser)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_code(lambda: train(from_flags(args)))


if __name__ == "__main__":
    raise SystemExit(main())
