"""What is found of a machine: of this one, and of one whose CUDA driver answers as on a Jetson."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from runtime.cuda_driver import CudaDriver, DriverError
from runtime.machine import installed_version, jetpack, probe

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).parent / "cuda_driver.c"


def driver_library(folder: Path, *options: str) -> dict[str, str]:
    """Environment of a process that finds a stand-in for the CUDA driver, compiled against NVIDIA's own header."""
    spec = find_spec("triton")
    header = Path(spec.origin or "").parent / "backends" / "nvidia" / "include" if spec else Path()
    if not shutil.which("cc") or not (header / "cuda.h").is_file():
        pytest.skip("no C compiler, or no cuda.h (it comes with the package triton)")
    command = ["cc", "-shared", "-fPIC", "-Werror", *options, f"-I{header}", "-o", str(folder / "libcuda.so.1")]
    subprocess.run([*command, str(DRIVER)], check=True, capture_output=True)
    return os.environ | {"LD_LIBRARY_PATH": str(folder)}


def run(code: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_this_machine() -> None:
    machine = probe()
    assert machine.platform == f"{sys.platform}-{platform.machine()}"
    assert machine.python == platform.python_version()
    assert 1 <= machine.cores <= (os.cpu_count() or 1)
    assert machine.memory > 1 << 28
    assert machine.packages["onnxruntime"] == version("onnxruntime")
    assert "no_such_package" not in machine.packages
    assert bool(machine.gpus) != bool(machine.gpu_problem)


def test_without_a_driver_the_reason_is_said() -> None:
    try:
        CudaDriver()
    except DriverError as error:
        assert str(error) == "no CUDA driver (libcuda.so.1 is not there)"
        assert probe().gpu_problem == str(error)
    else:
        pytest.skip("this machine has a CUDA driver")


def test_a_driver_as_on_a_jetson(tmp_path: Path) -> None:
    code = "import json, dataclasses, runtime.machine as m; print(json.dumps(dataclasses.asdict(m.probe())))"
    machine = json.loads(run(code, driver_library(tmp_path)))
    assert machine["cuda"] == "12.6"
    assert machine["gpus"] == [{"name": "Orin", "compute_capability": [8, 7], "memory": 7990000000}]
    assert machine["gpu_problem"] == ""


def test_a_driver_that_sees_no_gpu(tmp_path: Path) -> None:
    environment = driver_library(tmp_path, "-DINIT=CUDA_ERROR_NO_DEVICE")
    found = run("import runtime.machine as m; print(m.probe().gpus, m.probe().gpu_problem)", environment)
    assert found == "() the CUDA driver says CUDA_ERROR_NO_DEVICE (100) to cuInit\n"


def test_cuda_graphs_reach_the_driver_with_whole_pointers(tmp_path: Path) -> None:
    code = """
from runtime.cuda_driver import CudaDriver, DriverError
driver, stream = CudaDriver(), 0x7f1234567890
driver.use(0)
driver.begin_capture(stream)
graph = driver.end_capture(stream)
graph.launch(stream)
graph.close()
try:
    driver.end_capture(5)
except DriverError as error:
    print(error)
"""
    assert run(code, driver_library(tmp_path)).splitlines() == [
        "current 1",
        "begin 0x7f1234567890 1",
        "launch 1 0x7f1234567890",
        "destroy 1",
        "the CUDA driver says CUDA_ERROR_INVALID_VALUE (1) to cuStreamEndCapture",
    ]


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64", "JetPack 6 (L4T 36.4.3)"),
        ("# R35 (release), REVISION: 5.0, GCID: 35550185, BOARD: t186ref, EABI: aarch64", "JetPack 5 (L4T 35.5.0)"),
        ("# R38 (release), REVISION: 2.0, GCID: 1", "JetPack 7 (L4T 38.2.0)"),
        ("# R99 (release), REVISION: 1.0, GCID: 1", "JetPack ? (L4T 99.1.0)"),
        ("", "JetPack of unknown release"),
    ],
)
def test_jetpack_release(release: str, expected: str) -> None:
    assert jetpack(release) == expected


def test_versions_are_read_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in {"linked_package": '__version__ = "10.3.0"\nraise RuntimeError', "bare_package": "x = 1"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    assert installed_version("linked_package") == "10.3.0"
    assert installed_version("bare_package") == ""
    assert installed_version("no_such_package") is None
    assert installed_version("numpy") == version("numpy")
    assert not {"linked_package", "bare_package"} & set(sys.modules)


def test_probing_imports_nothing_heavy() -> None:
    code = "import sys; from runtime.machine import probe; probe(); print(sorted(sys.modules))"
    loaded = run(code, dict(os.environ))
    for name in ("numpy", "cv2", "onnxruntime", "tensorrt", "tensorrt_rtx", "torch", "openvino"):
        assert f"'{name}'" not in loaded
