"""Training runs: resume after SIGKILL, records, options, refusals. Real runs of the real command on tiny crops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from refusion.config import TrainConfig
from refusion.train import train
from refusion.weights import load_fusion_net
from runtime.errors import InputError

FLAGS = [
    "--crop", "16", "--epochs", "2", "--meta-steps", "4", "--fusion-steps", "6", "--accumulate", "3",
    "--checkpoint-every", "1", "--log-every", "1", "--threads", "1", "--device", "cpu", "--outer-noise", "0.01",
]  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pairs of smooth noise, infrared grey and visible colour."""
    root = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for side, channels in (("a", 1), ("b", 3)):
        (root / side).mkdir()
        for i in range(6):
            image = cv2.GaussianBlur(rng.integers(0, 256, (64, 80, channels), dtype=np.uint8), (0, 0), 2)
            cv2.imwrite(str(root / side / f"{i}.png"), cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX))
    return root


def command(pairs: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "refusion.train", "--data", str(pairs), "--out", str(out), *FLAGS, *more]


def run(pairs: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(pairs, out, *more), capture_output=True, text=True, check=False, timeout=300, env=environment
    )


def records(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def kill_after(pairs: Path, out: Path, steps: int) -> None:
    """Start a run and SIGKILL it once it has logged so many steps."""
    with subprocess.Popen(
        command(pairs, out), stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        deadline = time.monotonic() + 240
        log = out / "log.jsonl"
        while not (log.exists() and len(log.read_text().splitlines()) >= steps):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)


def test_killed_and_resumed_run_ends_as_an_uninterrupted_one(pairs: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = run(pairs, whole)
    assert result.returncode == 0, result.stderr
    # Killed in the middle of an accumulation of meta-gradients, then in the second epoch's fusion stage.
    kill_after(pairs, killed, 2)
    kill_steps = len(records(killed))
    assert kill_steps < 20
    result = run(pairs, killed, "--resume")
    assert result.returncode == 0, result.stderr

    a, _ = load_fusion_net(whole / "last.safetensors")
    b, metadata = load_fusion_net(killed / "last.safetensors")
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name
    assert metadata["steps"] == "20" and metadata["task"] == "ivif"
    one, two = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, killed))
    for network in ("proposal", "outer"):
        for name, tensor in one["networks"][network].items():
            assert torch.equal(tensor, two["networks"][network][name])
    assert [r["step"] for r in records(killed)] == list(range(1, 21))
    for x, y in zip(records(whole), records(killed), strict=True):
        assert {k: v for k, v in x.items() if k != "time"} == {k: v for k, v in y.items() if k != "time"}


def test_run_leaves_records_and_panels(pairs: Path, tmp_path: Path) -> None:
    train(TrainConfig(
        data=(str(pairs),), out=str(tmp_path / "run"), crop=16, epochs=1, meta_steps=2, fusion_steps=2, log_every=1,
        loss_proposal="symmetric", prior_w=5.0, prior_v=5.0, meta_optimizer="adam", dev=(str(pairs),), dev_limit=2,
        device="cpu",
    ))  # fmt: skip
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert {"inner_loss", "outer_loss", "fusion_loss", "dev_Qabf", "dev_VIF"} <= set(board.Tags()["scalars"])
    panel = board.Images(board.Tags()["images"][0])[0]
    assert (panel.width, panel.height) == (5 * 16, 4 * 16)
    _best, metadata = load_fusion_net(tmp_path / "run" / "best.safetensors")
    assert 0 < float(metadata["dev_score"]) < 1
    assert (tmp_path / "run" / "config.toml").read_text().count("symmetric") == 1
    assert not list((tmp_path / "run").glob(".*"))  # no temporary file is left


def test_fusion_loss_falls(pairs: Path, tmp_path: Path) -> None:
    train(TrainConfig(
        data=(str(pairs),), out=str(tmp_path / "run"), crop=16, epochs=1, meta_steps=0, fusion_steps=40, lr=2e-3,
        ramp=False, log_every=1, device="cpu",
    ))  # fmt: skip
    losses = [r["fusion_loss"] for r in records(tmp_path / "run")]
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])


@pytest.mark.parametrize("change", [
    {"amp": "bf16"}, {"amp": "fp16"}, {"recompute": True}, {"meta_gradient": "double"}, {"exchange": False},
    {"meta_optimizer": "adam", "schedule": "cosine"},
], ids=str)  # fmt: skip
def test_options_run_and_stay_finite(pairs: Path, tmp_path: Path, change: dict[str, object]) -> None:
    trainer = train(TrainConfig(
        data=(str(pairs),), out=str(tmp_path / "run"), crop=16, epochs=1, meta_steps=2, fusion_steps=2, log_every=1,
        device="cpu", **change,
    ))  # fmt: skip
    for net in trainer.networks.values():
        assert all(torch.isfinite(p).all() for p in net.parameters())
    assert all(np.isfinite(list(r.values())).all() for r in records(tmp_path / "run"))


def test_recomputation_and_double_backward_train_alike(pairs: Path, tmp_path: Path) -> None:
    weights = []
    for name, change in (("a", {}), ("b", {"recompute": True}), ("c", {"meta_gradient": "double"})):
        trainer = train(TrainConfig(
            data=(str(pairs),), out=str(tmp_path / name), crop=16, epochs=1, meta_steps=2, fusion_steps=1, lr_meta=1e-2,
            device="cpu", **change,
        ))  # fmt: skip
        weights.append(torch.cat([p.detach().flatten() for p in trainer.proposal.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(weights[2], weights[0], rtol=0, atol=1e-4)


def test_refusals_are_one_line_with_exit_code_2(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(pairs, out, "--epochs", "1", "--meta-steps", "0", "--fusion-steps", "1").returncode == 0
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "checkpoint.pt").write_bytes((out / "checkpoint.pt").read_bytes()[:5000])
    for folder, more, words in (
        (out, [], "holds a run already: go on with --resume"),
        (out, ["--resume", "--lr", "5e-4"], "was made with"),
        (damaged, ["--resume"], "damaged checkpoint"),
        (tmp_path / "new", ["--data", str(tmp_path / "absent")], "absent"),
        (tmp_path / "new", ["--device", "cuda:0"], "PyTorch sees no CUDA GPU"),
        (tmp_path / "new", ["--init", "nothing.safetensors"], "no such weights file"),
        (tmp_path / "new", ["--teacher", "nothing.safetensors"], "no such weights file"),
        (tmp_path / "new", ["--network", "lite", "--init", "ivif"], "ivif, a FusionNet; a LiteNet is trained"),
    ):
        if "cuda" in words.lower() and torch.cuda.is_available():
            continue
        result = run(pairs, folder, *more)
        assert result.returncode == 2, (words, result.stderr)
        assert words in result.stderr.strip().splitlines()[-1]
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="no training data"):
        train(TrainConfig(out=str(tmp_path / "none")))
