"""The TensorRT backend as far as it goes without a GPU: the sidecar first, then shapes, types and limits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from runtime.backends.tensorrt import Tensor, TensorRTBackend, check_sources, check_tensors
from runtime.engine_key import write_sidecar
from runtime.errors import InputError
from runtime.machine import probe

ROOT = Path(__file__).resolve().parents[2]
FREE = Tensor(np.dtype(np.float32), (-1, 1, -1, -1), ((1, 1, 64, 64), (1, 1, 480, 640), (2, 1, 1080, 1920)))
LUMA = {"a": FREE, "b": FREE, "fused": Tensor(np.dtype(np.float32), (-1, 1, -1, -1))}
FRAME = Tensor(np.dtype(np.uint8), (1, 480, 640, 3), ((1, 480, 640, 3),) * 3)
COLOUR = {"a": FRAME, "b": FRAME, "fused": Tensor(np.dtype(np.uint8), (1, 480, 640, 3))}
PATH = Path("ivif.engine")


def make_engine(folder: Path) -> Path:
    engine = folder / "ivif.engine"
    engine.write_bytes(b"not a plan at all")
    machine = probe()
    builder = {"library": "tensorrt", "version": "10.3.0", "platform": machine.platform}
    key = {
        "model": {"file": "m.onnx", "sha256": "0", "metadata": {"task": "ivif"}},
        "precision": "fp16",
        "tensors": {},
        "shapes": {},
        "builder": {**builder, "version_compatible": False, "hardware_compatibility": "none"},
        "gpu": {"name": "Orin", "compute_capabilities": ["8.7"]},
        "rebuild": "python -m export.build --checkpoint m.onnx --format engine",
    }
    write_sidecar(engine, key)
    return engine


def test_the_sidecar_is_checked_before_tensorrt_is_touched(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    code = f"""
import sys
from runtime.backends.tensorrt import TensorRTBackend
from runtime.errors import InputError
try:
    TensorRTBackend.load({str(engine)!r})
except InputError as error:
    print(error)
assert not {{"tensorrt", "pycuda", "torch"}} & {{name.split(".")[0] for name in sys.modules}}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "was built for TensorRT 10.3.0, Orin (sm_87)" in done.stdout
    assert done.stdout.count("\n") == 1


def test_a_missing_engine_and_one_without_a_sidecar(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is missing; build it"):
        TensorRTBackend.load(tmp_path / "x.engine")
    (tmp_path / "x.engine").write_bytes(b"plan")
    with pytest.raises(InputError, match=r"has no sidecar x\.engine\.json"):
        TensorRTBackend.load(tmp_path / "x.engine")


def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    engine = make_engine(tmp_path)
    engine.write_bytes(engine.read_bytes()[:-1])
    command = [sys.executable, "-m", "refusion", "demo", "--model", str(engine), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"refusion: engine {engine} has 16 bytes and its sidecar says 17: damaged; rebuild it"
    )
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_an_engine_is_fixed_to() -> None:
    assert check_tensors(PATH, LUMA) == (None, None)
    assert check_tensors(PATH, COLOUR) == (480, 640)
    one_height = Tensor(FREE.dtype, FREE.shape, ((1, 1, 480, 64), (1, 1, 480, 640), (1, 1, 480, 1920)))
    assert check_tensors(PATH, {**LUMA, "a": one_height, "b": one_height}) == (480, None)
    half = Tensor(np.dtype(np.float16), FREE.shape, FREE.profile)
    assert check_tensors(PATH, {**LUMA, "a": half, "b": half}) == (None, None)


def test_an_engine_of_another_kind_is_refused() -> None:
    with pytest.raises(InputError, match="inputs a and outputs fused; a fusion model has inputs a, b"):
        check_tensors(PATH, {"a": FREE, "fused": LUMA["fused"]})
    whole = Tensor(np.dtype(np.int32), FREE.shape, FREE.profile)
    with pytest.raises(InputError, match="has input a int32"):
        check_tensors(PATH, {**LUMA, "a": whole})


def zeros(*shape: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    return {"a": np.zeros(shape, dtype), "b": np.zeros(shape, dtype)}


@pytest.mark.parametrize(
    ("tensors", "sources"),
    [
        (LUMA, zeros(1, 1, 64, 64)),
        (LUMA, zeros(2, 1, 1080, 1920)),
        (LUMA, zeros(1, 1, 331, 585, dtype=np.float64)),
        (COLOUR, zeros(1, 480, 640, 3, dtype=np.uint8)),
    ],
)
def test_sources_that_fit(tensors: dict[str, Tensor], sources: dict[str, np.ndarray]) -> None:
    check_sources(PATH, tensors, sources, "rebuild")


@pytest.mark.parametrize(
    ("tensors", "sources", "message"),
    [
        (
            LUMA,
            zeros(1, 1, 63, 64),
            r"a is 1x1x63x64 and engine ivif.engine takes 1x1x64x64 to 2x1x1080x1920; rebuild it",
        ),
        (LUMA, zeros(3, 1, 64, 64), "a is 3x1x64x64"),
        (LUMA, zeros(64, 64), r"a is float32 \(64, 64\); engine ivif.engine takes float32 of 4 axes"),
        (LUMA, zeros(1, 2, 64, 64), "a is 1x2x64x64"),
        (COLOUR, zeros(1, 480, 640, 3), r"a is float32 .*takes uint8"),
        (LUMA, {**zeros(1, 1, 64, 64), "b": np.zeros((1, 1, 64, 65), np.float32)}, "both must have one shape"),
    ],
)
def test_sources_that_do_not_fit(tensors: dict[str, Tensor], sources: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        check_sources(PATH, tensors, sources, "python -m export.build --max-size 2160 3840")
    assert "\n" not in str(error.value)
