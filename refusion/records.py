"""What a training run leaves to look at: TensorBoard scalars and panels, JSON lines, dev metrics."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from refusion.config import TrainConfig
from refusion.evaluate import evaluate_pairs, find_scenes
from runtime.color import luma, stretch


class Recorder:
    """Scalars and panels of a run as TensorBoard records and, beside them, JSON lines in log.jsonl."""

    def __init__(self, out: Path, *, enabled: bool, first_step: int):
        self.enabled = enabled
        if enabled:
            # What a run that was killed wrote after its last checkpoint is dropped: those steps come again.
            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1 if first_step else None)
            _keep_lines(out / "log.jsonl", first_step)
            self.lines = (out / "log.jsonl").open("a", encoding="utf-8")

    def scalars(self, step: int, epoch: int, scalars: Mapping[str, float | Tensor]) -> str:
        """Record scalars; returns them as short text for the progress bar."""
        values = {name: float(value) for name, value in scalars.items()}
        if self.enabled:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            record = {"step": step, "epoch": epoch, "time": round(time.time(), 1), **values}
            self.lines.write(json.dumps(record) + "\n")
            self.lines.flush()
        return " ".join(f"{name} {value:.4g}" for name, value in values.items())

    def panel(self, step: int, a: Tensor, b: Tensor, fused: Tensor, w: Tensor, v: Tensor) -> None:
        """A picture of up to four crops: a, b, fused, and the weights w and v of source a. Images (N, 1, H, W)."""
        if self.enabled:
            columns = torch.cat((a, b, fused.to(a), w[:, :1].to(a), v[:, :1].to(a)), 3)[:4]  # (N, 1, H, 5 W)
            self.board.add_image("a, b, fused, w of a, v of a", torch.cat(tuple(columns), 1).clamp(0, 1), step)

    def close(self) -> None:
        if self.enabled:
            self.board.close()
            self.lines.close()


def _keep_lines(path: Path, last_step: int) -> None:
    if path.exists():
        lines = [
            line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= last_step
        ]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def write_config(out: Path, config: TrainConfig) -> None:
    """The settings of the run as TOML, to read or to give to --config."""
    out.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.asdict(config)
    # A JSON string, number, boolean or list of strings is written the same in TOML.
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in settings.items() if name != "resume"]
    (out / "config.toml").write_text("".join(lines), encoding="utf-8")


def source_commit() -> str:
    """Commit of the checkout that this file belongs to; empty where it is installed from elsewhere."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        return ""
    return result.stdout.strip()


class TorchFuser:
    """The PyTorch network as runtime.Fuser fuses stills: two pictures -> luma, stretched to its own range."""

    def __init__(self, net: nn.Module):
        self.net, self.device = net, next(net.parameters()).device

    @torch.inference_mode()
    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """a, b: (H, W) or (H, W, 3) BGR, 8 or 16 bits -> (H, W) uint8."""
        x, y = (torch.from_numpy(luma(image))[None, None].to(self.device) for image in (a, b))
        fused = self.net(x, y)[0, 0].float().cpu().numpy()
        return np.rint(stretch(fused, float(fused.min()), float(fused.max())) * 255).astype(np.uint8)


def measure(net: nn.Module, folders: Sequence[str], limit: int) -> dict[str, float]:
    """Qabf, VIF and SSIM (tdfusion convention) of a network, means over the dev folders' sources."""
    fuse = TorchFuser(net)
    scenes = [scene for folder in folders for scene in find_scenes(folder, {"net": fuse}, limit or None)]
    return evaluate_pairs(scenes, "tdfusion", ("Qabf", "VIF", "SSIM")).total("net")
