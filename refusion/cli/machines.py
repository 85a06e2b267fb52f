"""`refusion doctor`: what this machine can build and run, and what to install for the rest."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from refusion.cli.parsing import Subparsers

if TYPE_CHECKING:
    from runtime.machine import Machine

PACKAGE_SHOWN = {
    "cv2": "OpenCV",
    "av": "PyAV",
    "gi": "PyGObject",
    "tensorrt_rtx": "TensorRT-RTX",
    "tensorrt": "TensorRT",
}


@dataclass(frozen=True)
class Finding:
    """One thing that refusion can do somewhere: whether here, with what, and what to do where not."""

    group: str
    what: str
    works: bool
    found: str
    advice: str = ""


def add_doctor_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="what this machine can build and run, and what to install",
        description="Look at this machine: what refusion can export, build and run here, and what to install for the "
        "rest. Changes nothing.",
    )
    parser.set_defaults(run=run_doctor)
    parser.add_argument("--json", action="store_true", help="print it for programs")


def run_doctor(args: argparse.Namespace) -> None:
    from runtime.machine import probe

    machine = probe()
    findings = list(examine(machine))
    commands = next_commands(machine, findings)
    if args.json:
        report = {
            "machine": asdict(machine),
            "findings": [asdict(finding) for finding in findings],
            "next": [{"command": command, "why": why} for command, why in commands],
        }
        print(json.dumps(report, indent=1))
        return
    print("\n".join([*describe(machine), "", *table(findings), "", "next:"]))
    width = max(len(command) for command, _ in commands)
    print("\n".join(f"  {command:<{width}}  # {why}" for command, why in commands))


def describe(machine: Machine) -> list[str]:
    """The machine in a few lines."""
    lines = [
        ("machine", f"{machine.platform}, Python {machine.python}, {machine.jetpack or 'no Jetson'}"),
        ("processor", f"{machine.cores} cores, {machine.memory / 2**30:.0f} GiB memory"),
        ("CUDA driver", f"CUDA {machine.cuda}" if machine.cuda else machine.gpu_problem),
    ]
    for number, gpu in enumerate(machine.gpus):
        lines.append((f"GPU {number}", f"{gpu}, {gpu.memory / 2**30:.1f} GiB"))
    packages = (f"{PACKAGE_SHOWN.get(name, name)} {version or '?'}" for name, version in machine.packages.items())
    lines.append(("packages", ", ".join(packages)))
    return [f"{name:<12} {text}" for name, text in lines]


def table(findings: list[Finding]) -> list[str]:
    """Findings below each other, a group at a time: yes or no, what, found or what to do."""
    width = max(len(finding.what) for finding in findings)
    lines: list[str] = []
    group = ""
    for finding in findings:
        if finding.group != group:
            group = finding.group
            lines.append(f"{group}:")
        note = finding.found if finding.works else f"{finding.found}: {finding.advice}"
        lines.append(f"  {'yes' if finding.works else 'no ':<3}  {finding.what:<{width}}  {note}")
    return lines


def examine(machine: Machine) -> Iterator[Finding]:
    """What refusion can do on a machine."""
    yield from _exports(machine)
    yield from _backends(machine)
    yield from _streams(machine)
    yield from _training(machine)


def _packages(machine: Machine, group: str, what: str, names: tuple[str, ...], extra: str) -> Finding:
    missing = [name for name in names if name not in machine.packages]
    found = f"no {', '.join(missing)}" if missing else _versions(machine, names)
    return Finding(group, what, not missing, found, f"pip install 'refusion[{extra}]'")


def _versions(machine: Machine, names: tuple[str, ...]) -> str:
    return ", ".join(f"{PACKAGE_SHOWN.get(name, name)} {machine.packages[name]}".strip() for name in names)


def _exports(machine: Machine) -> Iterator[Finding]:
    group = "export"
    yield _packages(machine, group, "ONNX model, fp32, fp16 and int8", ("torch", "onnx", "onnxscript"), "export")
    from runtime.engine_key import tensorrt_problem

    problem, advice = tensorrt_problem(machine)
    found = problem or f"{_versions(machine, ('tensorrt',))}, {machine.gpus[0]}"
    yield Finding(group, "TensorRT engine for this GPU", not problem, found, advice)
    yield _packages(machine, group, "TensorRT-RTX engine for desktop GPUs", ("tensorrt_rtx",), "rtx")


def _backends(machine: Machine) -> Iterator[Finding]:
    group = "run a model"
    from runtime.backends.onnxruntime import PROVIDERS
    from runtime.engine_key import tensorrt_problem

    yield Finding(group, "onnxruntime", True, f"{_versions(machine, ('onnxruntime',))}, {machine.cores} cores")
    offered = _providers()
    for device in ("cuda", "tensorrt"):
        provider = PROVIDERS.get(device, "")
        if not machine.gpus:
            found, advice = machine.gpu_problem, "needs an NVIDIA GPU"
        else:
            found, advice = f"this onnxruntime has no {provider}", "pip install onnxruntime-gpu in place of onnxruntime"
        works = bool(machine.gpus) and provider in offered
        yield Finding(group, f"onnxruntime-{device}", works, provider if works else found, advice)
    problem, advice = tensorrt_problem(machine)
    if not problem and "pycuda" not in machine.packages:
        problem, advice = "no pycuda", "pip install 'refusion[tensorrt]' (compiled with the CUDA toolkit)"
    found = problem or _versions(machine, ("tensorrt", "pycuda"))
    yield Finding(group, "tensorrt", not problem, found, advice)
    yield _packages(machine, group, "openvino", ("openvino",), "openvino")


def _providers() -> list[str]:
    import onnxruntime

    return onnxruntime.get_available_providers()


def _streams(machine: Machine) -> Iterator[Finding]:
    group = "streams"
    yield _packages(machine, group, "network cameras and video files (PyAV)", ("av",), "stream")
    ffmpeg = shutil.which("ffmpeg")
    yield Finding(group, "ffmpeg command, to look into streams", bool(ffmpeg), ffmpeg or "none", "apt install ffmpeg")
    yield Finding(
        group,
        "GStreamer pipelines, Jetson cameras",
        "gi" in machine.packages,
        _versions(machine, ("gi",)) if "gi" in machine.packages else "no PyGObject",
        "apt install python3-gi gir1.2-gst-plugins-base-1.0 gstreamer1.0-plugins-good",
    )
    yield _window()
    yield Finding(group, "browser page", True, "http://127.0.0.1:8000, from refusion stream")
    yield Finding(
        group,
        "ROS 2",
        "rclpy" in machine.packages,
        _versions(machine, ("rclpy",)) if "rclpy" in machine.packages else "no rclpy",
        "install ROS 2 and source its setup.bash",
    )


def _window() -> Finding:
    import cv2

    from runtime.sinks.display import has_windows

    group, what = "streams", "window on the desktop"
    system = re.search(r"^ *GUI: *(\S+)", cv2.getBuildInformation(), re.MULTILINE)
    if not has_windows(cv2.getBuildInformation()):
        advice = "pip uninstall opencv-python-headless; pip install opencv-python; or watch in a browser"
        return Finding(group, what, False, f"OpenCV {cv2.__version__} without windows", advice)
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return Finding(group, what, False, "no desktop (DISPLAY is not set)", "watch in a browser")
    return Finding(group, what, True, f"OpenCV {cv2.__version__}, {system[1] if system else 'windows'}")


def _training(machine: Machine) -> Iterator[Finding]:
    yield _packages(machine, "train", "train a network", ("torch",), "train")
    kernels = _packages(machine, "train", "Triton kernels on the GPU", ("triton",), "gpu")
    if kernels.works and not machine.gpus:
        kernels = Finding(kernels.group, kernels.what, False, machine.gpu_problem, "plain PyTorch is used instead")
    yield kernels


def next_commands(machine: Machine, findings: list[Finding]) -> list[tuple[str, str]]:
    """What to type next on this machine, and why."""
    works = {finding.what for finding in findings if finding.works}
    commands = [("refusion demo", "fuses a generated scene, to see that it works")]
    if "TensorRT engine for this GPU" in works:
        build = "python -m export.build --task ivif --precision fp16 --format engine --size 480 640 --out ivif.engine"
        commands.append((build, "an engine for this GPU"))
        if "tensorrt" in works:
            commands.append(("refusion bench --model ivif.engine", "its speed here"))
    elif "ONNX model, fp32, fp16 and int8" in works:
        build = "python -m export.build --task ivif --precision fp16 --format onnx --out ivif-fp16.onnx"
        commands.append((build, "a model for another machine, where its engine is then built"))
    commands.append(("refusion bench", "how fast this machine is"))
    commands.append(("refusion stream --help", "cameras, files and network streams in, a page or a video out"))
    if machine.jetpack:
        commands.append(("sudo nvpmodel -m 0 && sudo jetson_clocks", "full power, before speed is measured"))
    return commands
