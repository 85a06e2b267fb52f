"""scripts/gpu_check: what it says without a GPU, and that a failing step is reported and stops nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check"
STEPS = ("tests", "compile", "benchmark", "pairs", "train kernels", "train reference", "compare")
STEPS += ("engines", "verify engines", "latency of engines")


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def script() -> ModuleType:
    """The script as a module; it has no suffix."""
    loader = SourceFileLoader("gpu_check", str(SCRIPT))
    spec = spec_from_loader("gpu_check", loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


def write_log(folder: Path, *losses: float) -> None:
    folder.mkdir()
    lines = [json.dumps({"step": i + 1, "inner_loss": loss}) for i, loss in enumerate(losses)]
    (folder / "log.jsonl").write_text("".join(line + "\n" for line in lines))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: everything would run")
def test_without_a_gpu_it_says_what_it_would_run(tmp_path: Path) -> None:
    done = gpu_check("--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    for step in STEPS:
        assert f"\n  {step}: " in done.stdout
    assert "-m kernels.bench" in done.stdout
    assert "REFUSION_KERNELS=reference" in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_failing_step_is_reported_and_stops_nothing(tmp_path: Path) -> None:
    write_log(tmp_path / "train_kernels", 0.5, 0.4)
    write_log(tmp_path / "train_reference", 0.5, 0.41)
    done = gpu_check("--anyway", "--out", str(tmp_path), "--only", "compare", "pairs")
    assert done.returncode == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert {row["step"]: row["passed"] for row in report["steps"]} == {"pairs": True, "compare": False}
    assert "step 2: inner_loss is 0.4 with the kernels, 0.41 without" in (tmp_path / "report.md").read_text()
    assert len(list((tmp_path / "pairs" / "a").iterdir())) == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: engines would be built")
def test_what_needs_tensorrt_is_left_out_without_it(tmp_path: Path) -> None:
    done = gpu_check("--anyway", "--out", str(tmp_path), "--only", "engines", "latency of engines", "pairs")
    assert done.returncode == 0
    assert "1 of 1 steps passed, 2 left out" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    results = {row["step"]: row["result"] for row in report["steps"]}
    assert results == {"pairs": "passed", "engines": "left out", "latency of engines": "left out"}
    assert "left out: no CUDA driver" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("ours", "reference", "complaint"),
    [
        ((0.5, 0.4), (0.5, 0.40001), ""),
        ((0.5, float("nan")), (0.5, 0.4), "step 2: inner_loss is nan"),
        ((0.5,), (0.5, 0.4), "1 and 2 steps"),
        ((), (), "0 and 0 steps"),
    ],
)
def test_compares_losses(tmp_path: Path, ours: tuple[float, ...], reference: tuple[float, ...], complaint: str) -> None:
    write_log(tmp_path / "train_kernels", *ours)
    write_log(tmp_path / "train_reference", *reference)
    found = script().compare_losses(tmp_path)
    assert complaint in found
    assert bool(found) == bool(complaint)


def test_names_the_training_that_is_missing(tmp_path: Path) -> None:
    assert "train_kernels" in script().compare_losses(tmp_path)
