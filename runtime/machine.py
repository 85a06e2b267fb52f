"""What this machine has: processor, memory, JetPack, CUDA driver and GPUs, versions of the packages that matter.

Nothing heavy is imported, and nothing that may crash: GPUs are asked of the driver, versions are read from files.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from runtime.cuda_driver import CudaDriver, DriverError, Gpu

TEGRA_RELEASE = Path("/etc/nv_tegra_release")
# Release of Linux for Tegra -> JetPack.
_JETPACK = {32: "4", 34: "5", 35: "5", 36: "6", 38: "7"}

# Module -> distributions that may bring it, under whose names pip lists its version.
PACKAGES: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    "pycuda": ("pycuda",),
    "torch": ("torch",),
    "onnx": ("onnx",),
    "onnxscript": ("onnxscript",),
    "triton": ("triton",),
    "cv2": ("opencv-python-headless", "opencv-python", "opencv-contrib-python"),
    "av": ("av",),
    "gi": ("pygobject",),
    "rclpy": ("rclpy", "ros-rclpy"),
}


@dataclass(frozen=True)
class Machine:
    """This machine.

    Attributes:
        platform: operating system and processor, as "linux-aarch64": engines do not move between platforms.
        python: version, as "3.10.12".
        cores: CPU cores that this process may use.
        memory: bytes of main memory, 0 where the system does not tell.
        jetpack: as "JetPack 6 (L4T 36.4.3)", or "" where this is no Jetson.
        cuda: newest CUDA version that the driver runs, as "12.6", or "".
        gpus: what the driver lists, in its order.
        gpu_problem: why `gpus` is empty, one line.
        packages: module -> version, of those in PACKAGES that are installed; "" where the version is unknown.
    """

    platform: str
    python: str
    cores: int
    memory: int
    jetpack: str = ""
    cuda: str = ""
    gpus: tuple[Gpu, ...] = ()
    gpu_problem: str = ""
    packages: dict[str, str] = field(default_factory=dict)


def probe() -> Machine:
    """Look at this machine; never raises for what is missing."""
    cuda, gpus, problem = _probe_gpus()
    versions = {module: installed_version(module, *names) for module, names in PACKAGES.items()}
    return Machine(
        platform=platform_name(),
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=_memory(),
        jetpack=jetpack(TEGRA_RELEASE.read_text(encoding="utf-8")) if TEGRA_RELEASE.is_file() else "",
        cuda=cuda,
        gpus=gpus,
        gpu_problem=problem,
        packages={module: version for module, version in versions.items() if version is not None},
    )


def platform_name() -> str:
    return f"{sys.platform}-{platform.machine()}"


def installed_version(module: str, *distributions: str) -> str | None:
    """Version of an installed module without importing it, "" where it is unknown, None where it is not installed."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return None
    for distribution in distributions or (module,):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    # A package of the system that was linked into a virtual environment has no metadata there.
    source = Path(spec.origin).read_text(encoding="utf-8", errors="replace") if spec.origin else ""
    stated = re.search(r'^__version__\s*=\s*["\']([^"\']+)', source, re.MULTILINE)
    return stated[1] if stated else ""


def jetpack(release: str) -> str:
    """First line of /etc/nv_tegra_release -> "JetPack 6 (L4T 36.4.3)"."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", release)
    if not found:
        return "JetPack of unknown release"
    major, revision = int(found[1]), found[2]
    return f"JetPack {_JETPACK.get(major, '?')} (L4T {major}.{revision})"


def _probe_gpus() -> tuple[str, tuple[Gpu, ...], str]:
    try:
        driver = CudaDriver()
        gpus = driver.gpus()
        return driver.version(), gpus, "" if gpus else "the CUDA driver lists no GPU"
    except DriverError as error:
        return "", (), str(error)


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
