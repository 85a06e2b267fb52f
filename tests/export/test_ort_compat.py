"""The embedded models in the oldest ONNX Runtime that users have (JetPack 6) and in this one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "ort_compat_check"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    return done


@pytest.mark.slow
def test_embedded_models_give_the_same_in_both() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ONNX Runtime 1.23.2, Python 3.10." in done.stdout
    for model in (ROOT / "runtime" / "models").glob("*.onnx"):
        assert done.stdout.count(f"\n{model.stem} ") == 3


@pytest.mark.slow
def test_a_model_that_differs_is_found(tmp_path: Path) -> None:
    """Random numbers in the graph: never the same twice."""
    path = tmp_path / "random.onnx"
    onnx.save(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["": 18]>
            tiny (float[1,1,h,w] a, float[1,1,h,w] b) => (float[1,1,h,w] fused)
            { noise = RandomUniformLike(a) max = Max(a, b) fused = Mul(max, noise) }"""
        ),
        path,
    )
    done = run("--models", str(path))
    assert done.returncode == 1
    assert "DIFFERENT" in done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "runtime" / "models").glob("*.onnx")), ids=lambda path: path.stem)
def test_embedded_models_have_versions_that_old_runtimes_read(path: Path) -> None:
    model = onnx.load(path)
    assert model.ir_version <= 10
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
