"""A generated task with a known right answer: does the loss-proposal network learn what a downstream task needs?

    python -m refusion.downstream --seeds 0 1 2

One source shows targets (bright discs on grain), the other clutter (stripes); which of the two is a and which is b is
drawn for each pair. The outer loss is that of a small segmentation network that looks for the targets in the fused
image. Starting from w = v = 0.5, the weights on the targets must come to favour the source that shows them; and the
fused image must serve the segmentation better than one that was made with w = v = 0.5 throughout (TDFusion's outer
loss, and a worked example of `refusion.losses.OuterLoss` and `refusion.train.Data`).
"""

from __future__ import annotations

import argparse
import copy
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refusion.config import TrainConfig
from refusion.losses import OuterLoss
from refusion.train import Trainer, train
from runtime.errors import exit_code
from runtime.images import write_image
from runtime.panel import side_by_side

SIZE = 32  # pixels
_HELD_OUT = 1_000  # epoch whose pairs are never trained on


class SegmentationLoss(OuterLoss):
    """Binary cross-entropy of a small segmentation network on the fused image, which gets sensor noise first.

    target: (N, 1, H, W), 1 where there is a target. The noise makes contrast count: without it any mixture of the
    sources could be amplified back.
    """

    def __init__(self, noise: float = 0.2, channels: int = 8):
        super().__init__()
        self.noise = noise
        self.network = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 1, 3, padding=1),
        )

    def forward(self, fused: Tensor, a: Tensor, b: Tensor, target: Tensor | None = None) -> Tensor:
        if target is None:
            raise ValueError("SegmentationLoss needs the target mask of each pair")
        logits = self.network(fused + self.noise * torch.randn_like(fused))
        return F.binary_cross_entropy_with_logits(logits, target)


@dataclass(frozen=True)
class TargetsAndClutter:
    """Endless pairs, a pure function of (seed, epoch, stage, position)."""

    seed: int

    def batch(
        self, epoch: int, stage: int, step: int, batch_size: int, *, rank: int = 0, world: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """a, b, target: (batch_size, 1, 32, 32) float32 in [0, 1]."""
        first = (step * world + rank) * batch_size
        drawn = [self.draw(epoch, stage, position) for position in range(first, first + batch_size)]
        a, b, target = (torch.from_numpy(np.stack(images)[:, None]) for images in zip(*drawn, strict=True))
        return a, b, target

    def draw(self, epoch: int, stage: int, position: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """a, b, target: (32, 32) float32; a shows the targets at even random draws, see `a_shows_targets`."""
        rng = np.random.default_rng([self.seed, epoch, stage, position])
        y, x = np.mgrid[:SIZE, :SIZE]
        mask = np.zeros((SIZE, SIZE), bool)
        for _ in range(rng.integers(1, 4)):
            (cy, cx), radius = rng.uniform(4, SIZE - 4, 2), rng.uniform(2, 5)
            mask |= (y - cy) ** 2 + (x - cx) ** 2 < radius**2
        targets = 0.3 + 0.6 * mask + 0.05 * rng.standard_normal(mask.shape)
        angle, phase, period = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi), rng.uniform(4, 9)
        stripes = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + phase)
        clutter = 0.15 + 0.12 * stripes + 0.05 * rng.standard_normal(mask.shape)
        pair = [image.clip(0, 1).astype(np.float32) for image in (targets, clutter)]
        if not self.a_shows_targets(epoch, stage, position):
            pair.reverse()
        return pair[0], pair[1], mask.astype(np.float32)

    def a_shows_targets(self, epoch: int, stage: int, position: int) -> bool:
        return bool(np.random.default_rng([self.seed, epoch, stage, position, 1]).integers(2))

    def steps_per_epoch(self, batch_size: int, world: int = 1) -> int:
        return 100


@dataclass(frozen=True)
class Result:
    """What one seed gave."""

    seed: int
    w_on_targets: float  # mean weight of the source that shows them, on their pixels
    w_elsewhere: float
    loss_learned: float  # downstream loss on held-out pairs
    loss_fixed: float


def experiment(seed: int, out: Path, *, warm_up: int, epochs: int, meta_steps: int, fusion_steps: int) -> Result:
    """Warm up with w = v = 0.5, then go on from there twice: with meta-learning, and with w = v = 0.5 held fixed.

    Both arms make the same fusion and segmentation updates on the same pairs.
    """
    data = TargetsAndClutter(seed)
    base = TrainConfig(
        seed=seed, crop=SIZE, batch_size=4, epochs=1, meta_steps=0, fusion_steps=warm_up, lr=2e-3, ramp=False,
        gradient_weight=0.02, loss_proposal="symmetric", device="cpu", out=str(out / "warm"), log_every=10,
        checkpoint_every=10_000,
    )  # fmt: skip
    warm = train(base, data, SegmentationLoss())
    arms = {}
    for name, steps in (("learned", meta_steps), ("fixed", 0)):
        config = replace(
            base, epochs=epochs, meta_steps=steps, fusion_steps=fusion_steps, out=str(out / name),
            init=str(out / "warm" / "last.safetensors"), meta_optimizer="adam", lr_meta=3e-3, lr_inner=1e-2,
            schedule="cosine",
        )  # fmt: skip
        arms[name] = train(config, data, copy.deepcopy(warm.outer))
    w_on_targets, w_elsewhere = learned_weights(arms["learned"], data)
    losses = {name: held_out_loss(trainer, data) for name, trainer in arms.items()}
    write_image(out / "learned.png", picture(arms, data))
    return Result(seed, w_on_targets, w_elsewhere, losses["learned"], losses["fixed"])


def _held_out(data: TargetsAndClutter, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    return data.batch(_HELD_OUT, 0, 0, pairs)


@torch.no_grad()
def learned_weights(trainer: Trainer, data: TargetsAndClutter, pairs: int = 128) -> tuple[float, float]:
    """Mean w of the source that shows the targets, over held-out pairs: on the targets, and elsewhere."""
    a, b, target = _held_out(data, pairs)
    w, _ = trainer.proposal(a, b)
    shown = torch.tensor([data.a_shows_targets(_HELD_OUT, 0, i) for i in range(pairs)])[:, None, None, None]
    of_targets = torch.where(shown, w[:, :1], w[:, 1:])
    return float(of_targets[target > 0].mean()), float(of_targets[target == 0].mean())


@torch.no_grad()
def held_out_loss(trainer: Trainer, data: TargetsAndClutter, pairs: int = 256) -> float:
    """Downstream loss of a trained arm on held-out pairs, with the same noise for every arm."""
    a, b, target = _held_out(data, pairs)
    torch.manual_seed(0)
    return float(trainer.outer(trainer.fusion(a, b), a, b, target))


@torch.no_grad()
def picture(arms: dict[str, Trainer], data: TargetsAndClutter, pairs: int = 6) -> np.ndarray:
    """Held-out pairs in rows: a, b, targets, learned w of a, and the fused image of both arms."""
    a, b, target = _held_out(data, pairs)
    w, _ = arms["learned"].proposal(a, b)
    columns = {"a": a, "b": b, "targets": target, "w of a": w[:, :1]}
    columns |= {f"fused, {name}": trainer.fusion(a, b) for name, trainer in arms.items()}
    large = {
        caption: F.interpolate(images, scale_factor=4).permute(1, 0, 2, 3).reshape(-1, 4 * SIZE)
        for caption, images in columns.items()
    }
    return side_by_side({caption: (image.numpy() * 255).astype(np.uint8) for caption, image in large.items()})


def table(results: Sequence[Result]) -> str:
    """The results as text, with what was asked of each seed."""
    lines = ["seed  w on targets  w elsewhere  loss, learned w  loss, w = 0.5  ratio"]
    for r in results:
        lines.append(
            f"{r.seed:4d}  {r.w_on_targets:12.3f}  {r.w_elsewhere:11.3f}  {r.loss_learned:15.4f}  {r.loss_fixed:13.4f}"
            f"  {r.loss_learned / r.loss_fixed:5.3f}"
        )
    followed = sum(r.w_on_targets >= 0.6 and r.w_elsewhere < 0.5 for r in results)
    served = sum(r.loss_learned < r.loss_fixed for r in results)
    lines.append(f"w at least 0.6 on the targets and below 0.5 elsewhere: {followed} of {len(results)} seeds")
    lines.append(f"downstream loss lower than with w = v = 0.5: {served} of {len(results)} seeds")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="refusion.downstream", description="Meta-learning on a generated task.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--out", type=Path, default=Path("out/downstream"), help="folder (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=200, help="fusion steps with w = 0.5 first (default: 200)")
    parser.add_argument("--epochs", type=int, default=4, help="default: 4")
    parser.add_argument("--meta-steps", type=int, default=25, help="an epoch (default: 25)")
    parser.add_argument("--fusion-steps", type=int, default=80, help="an epoch (default: 80)")
    args = parser.parse_args(argv)

    def command() -> None:
        results = []
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                results.append(
                    experiment(
                        seed, Path(folder), warm_up=args.warm_up, epochs=args.epochs, meta_steps=args.meta_steps,
                        fusion_steps=args.fusion_steps,
                    )
                )  # fmt: skip
                args.out.mkdir(parents=True, exist_ok=True)
                shutil.move(Path(folder) / "learned.png", args.out / f"seed{seed}.png")
        print(table(results))
        print(f"pictures: {args.out}")

    return exit_code(command)


if __name__ == "__main__":
    raise SystemExit(main())
