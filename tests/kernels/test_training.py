"""A training run of the real command gives the same losses with the kernels as with plain PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

FLAGS = [
    "--crop", "12", "--epochs", "1", "--meta-steps", "4", "--fusion-steps", "16", "--log-every", "1", "--threads", "1",
    "--device", "cpu", "--lr", "1e-3",
]  # fmt: skip


def losses(pairs: Path, out: Path, kernels: str) -> list[dict[str, float]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"REFUSION_KERNELS": kernels, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "refusion.train", "--data", str(pairs), "--out", str(out), *FLAGS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_twenty_steps_give_the_same_losses(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for side in "ab":
        (tmp_path / "pairs" / side).mkdir(parents=True)
        for i in range(4):
            image = cv2.GaussianBlur(rng.integers(0, 256, (40, 40), dtype=np.uint8), (0, 0), 1.5)
            cv2.imwrite(str(tmp_path / "pairs" / side / f"{i}.png"), image)
    reference = losses(tmp_path / "pairs", tmp_path / "reference", "reference")
    kernels = losses(tmp_path / "pairs", tmp_path / "interpret", "interpret")
    assert len(reference) == len(kernels) == 20
    for expected, got in zip(reference, kernels, strict=True):
        for name in expected:
            if "loss" in name:
                assert got[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), (expected["step"], name)
