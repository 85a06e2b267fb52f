"""The generated downstream task: its data, its loss, and that meta-learning moves the weights the right way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from refusion.downstream import SegmentationLoss, TargetsAndClutter, experiment, main, table


def test_pairs_are_reproducible_and_ranks_share_one_batch() -> None:
    data = TargetsAndClutter(seed=4)
    whole = data.batch(0, 1, 2, 4)
    parts = [data.batch(0, 1, 2, 2, rank=rank, world=2) for rank in range(2)]
    for i in range(3):
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))
        assert whole[i].shape == (4, 1, 32, 32) and whole[i].min() >= 0 and whole[i].max() <= 1
    assert not torch.equal(whole[0], TargetsAndClutter(seed=5).batch(0, 1, 2, 4)[0])


def test_targets_stand_out_in_the_source_that_is_named() -> None:
    data = TargetsAndClutter(seed=1)
    named = [data.a_shows_targets(0, 0, i) for i in range(40)]
    assert 8 < sum(named) < 32  # the order is drawn
    for i, in_a in enumerate(named):
        a, b, mask = data.draw(0, 0, i)
        shown, clutter = (a, b) if in_a else (b, a)
        assert shown[mask > 0].mean() - shown[mask == 0].mean() > 0.5
        assert clutter[mask == 0].std() > 0.06


def test_loss_needs_targets_and_is_differentiable() -> None:
    loss = SegmentationLoss()
    a, b, target = TargetsAndClutter(0).batch(0, 0, 0, 2)
    fused = (0.5 * (a + b)).requires_grad_()
    (slope,) = torch.autograd.grad(loss(fused, a, b, target), fused)
    assert slope.abs().max() > 0
    with pytest.raises(ValueError, match="needs the target mask"):
        loss(fused, a, b)


def test_arms_differ_in_meta_learning_alone(tmp_path: Path) -> None:
    """A run far too short to learn: `python -m refusion.downstream` is the real one."""
    result = experiment(0, tmp_path, warm_up=4, epochs=1, meta_steps=4, fusion_steps=4)
    learned, fixed = (torch.load(tmp_path / arm / "checkpoint.pt", weights_only=True) for arm in ("learned", "fixed"))
    assert fixed["networks"]["proposal"]["output.weight"].abs().max() == 0  # w = v = 0.5 still
    assert learned["networks"]["proposal"]["output.weight"].abs().max() > 1e-3
    assert (learned["position"]["total"], fixed["position"]["total"]) == (8, 4)
    assert 0 < result.w_on_targets < 1 and result.w_on_targets != 0.5
    assert 0 < result.loss_learned != result.loss_fixed > 0
    assert (tmp_path / "learned.png").stat().st_size > 1000
    assert "1 seeds" in table([result])


def test_command_refuses_in_one_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = main(
        ["--seeds", "0", "--epochs", "0", "--warm-up", "1", "--fusion-steps", "1", "--out", str(tmp_path / "o")]
    )
    assert code == 2
    assert capfd.readouterr().err.endswith("refusion: setting 'epochs' is 0: give at least 1\n")
