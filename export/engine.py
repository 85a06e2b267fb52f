"""ONNX model -> TensorRT engine with its sidecar: checks first, then `export.tensorrt_builder`.

Everything that can be wrong with the request or the machine is said before TensorRT is imported or a minute is spent.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.profile import Model, Shape, Size, profile, read_model
from runtime.cuda_driver import CudaDriver, Gpu
from runtime.engine_key import (
    HARDWARE_COMPATIBILITY,
    check,
    describe,
    read_sidecar,
    same_build,
    sidecar_path,
    tensorrt_problem,
    write_sidecar,
)
from runtime.errors import InputError
from runtime.files import write_whole
from runtime.machine import Machine, probe

if TYPE_CHECKING:
    from export.rtx_builder import Request

# An engine of this network is 7 to 15 MB. Some builds of TensorRT-RTX came out hundreds of megabytes large.
RTX_MAX_BYTES = 100 * 1_000_000
FREE_BYTES = 200 * 1_000_000

log = logging.getLogger("refusion")


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    *,
    min_size: Size | None = None,
    opt_size: Size | None = None,
    max_size: Size | None = None,
    batch: tuple[int, int, int] = (1, 1, 1),
    workspace_gb: float | None = None,
    optimization_level: int | None = None,
    timing_cache: Path | None = None,
    version_compatible: bool = False,
    hardware_compatible: bool | str = False,
    device: int = 0,
    rebuild_command: str = "",
    force: bool = False,
) -> Path:
    """Build a TensorRT engine for a GPU of this machine, and its sidecar; takes minutes.

    An engine that is there already and was built from the same model, for this machine, with the same options, is kept.

    Args:
        onnx_path: the model; its types are the engine's precision.
        engine_path: the engine's file, `<name>.engine`; the sidecar goes beside it.
        min_size, opt_size, max_size: (H, W) that the engine takes (opt: is fastest for) where the model leaves them
            free. None takes MIN_SIZE, OPT_SIZE, MAX_SIZE of export.profile, widened to hold what is given.
        batch: smallest, usual and largest number of pairs in one call, where the model leaves it free.
        workspace_gb: limit of the GPU memory that a layer may use for itself, in GiB; None: the whole GPU.
        optimization_level: 0 (builds fast) to 5 (runs fast); None: TensorRT's default.
        timing_cache: file, or folder of files, in which TensorRT remembers how fast each kernel was, which shortens the
            next build. A folder gets one file a TensorRT version and GPU. None: `refusion` in the user's cache folder.
        version_compatible: the engine also runs on newer TensorRT; may be slower.
        hardware_compatible: "same_compute_capability" or "ampere_plus" (also True): the engine also runs on other GPUs;
            may be slower. Not for Jetson.
        device: number of the GPU.
        rebuild_command: the command that makes this engine anew, for messages; "" puts one together.
        force: build even if the engine that is there would do.

    Returns:
        engine_path.

    Raises:
        InputError: the model, a size or an option is no good; no GPU or TensorRT here; a failed build; a full disk.
    """
    model = read_model(onnx_path)
    shapes = profile(model, (min_size, opt_size, max_size), batch)
    level = _compatibility_level(hardware_compatible)
    machine = probe()
    gpu, version = _require_builder(machine, device)
    if level != "none" and machine.jetpack:
        raise InputError(
            "hardware compatibility is not for Jetson: leave --hardware-compatible out and build on each kind"
        )
    key = _key(
        model,
        shapes,
        builder={
            "library": "tensorrt",
            "version": version,
            "platform": machine.platform,
            "workspace_gb": workspace_gb,
            "optimization_level": optimization_level,
            "version_compatible": version_compatible,
            "hardware_compatibility": level,
        },
        gpu={"name": gpu.name, "compute_capabilities": [_capability(gpu)]},
        rebuild=rebuild_command or default_rebuild_command(model, engine_path),
    )
    if not force and is_up_to_date(engine_path, key, machine, device):
        log.warning("%s is up to date (%s); --force builds it anew", engine_path, describe(key))
        return engine_path
    _check_target(engine_path)
    CudaDriver().use(device)
    try:
        from export.tensorrt_builder import Options, build_plan
    except ImportError as error:
        raise InputError(f"TensorRT {version} is installed and cannot be imported: {error}") from error
    options = Options(
        shapes={name: shape for name, shape in shapes.items() if None in model.inputs[name]},
        workspace_gb=workspace_gb,
        optimization_level=optimization_level,
        version_compatible=version_compatible,
        hardware_compatibility=level,
        timing_cache=_timing_cache_file(timing_cache, version, gpu),
    )
    plan = build_plan(model.content, onnx_path.name, options)
    write_whole(engine_path, plan)
    write_sidecar(engine_path, key)
    return engine_path


def build_rtx_engine(
    onnx_path: Path,
    engine_path: Path,
    *,
    min_size: Size | None = None,
    opt_size: Size | None = None,
    max_size: Size | None = None,
    batch: tuple[int, int, int] = (1, 1, 1),
    compute_capabilities: Sequence[str],
    rebuild_command: str = "",
) -> Path:
    """Build an engine of TensorRT-RTX, which needs no GPU here: desktop GPUs compile the rest when they load it.

    Args:
        onnx_path, engine_path, min_size, opt_size, max_size, batch, rebuild_command: as for `build_engine`; the model's
            height and width must be free.
        compute_capabilities: GPUs that the engine is for, as ["8.6", "8.9", "12.0"]; Jetson's are not to be had.

    Returns:
        engine_path.

    Raises:
        InputError: the model, a size or a capability is no good; no TensorRT-RTX here; a failed build; a full disk.
    """
    model = read_model(onnx_path)
    shapes = profile(model, (min_size, opt_size, max_size), batch)
    if any(None not in shape[1:] for shape in model.inputs.values()):
        raise InputError(
            f"TensorRT-RTX builds models of free height and width alone; export {onnx_path} with --size 0 0"
        )
    if not compute_capabilities or not all(_is_capability(capability) for capability in compute_capabilities):
        given = ", ".join(compute_capabilities) or "none"
        raise InputError(f"compute capabilities are {given}; give them like 8.6 8.9 12.0")
    machine = probe()
    version = machine.packages.get("tensorrt_rtx")
    if version is None:
        raise InputError("TensorRT-RTX is not installed: pip install 'refusion[rtx]'")
    key = _key(
        model,
        shapes,
        builder={
            "library": "tensorrt_rtx",
            "version": version,
            "platform": machine.platform,
            "version_compatible": False,
            "hardware_compatibility": "none",
        },
        gpu={"name": None, "compute_capabilities": list(compute_capabilities)},
        rebuild=rebuild_command or default_rebuild_command(model, engine_path, "rtx-engine"),
    )
    _check_target(engine_path)
    from export.rtx_builder import Request

    request = Request(str(onnx_path), shapes, list(compute_capabilities))
    plan = _run_rtx_builder(request)
    if len(plan) > RTX_MAX_BYTES:
        raise InputError(
            f"TensorRT-RTX made an engine of {len(plan) / 1e6:.0f} MB of {onnx_path}, {RTX_MAX_BYTES / 1e6:.0f} MB is "
            "the limit: build for fewer compute capabilities at a time"
        )
    write_whole(engine_path, plan)
    write_sidecar(engine_path, key)
    return engine_path


def require_builder(device: int = 0) -> None:
    """Raise the InputError that says what is missing where no TensorRT engine can be built on this machine."""
    _require_builder(probe(), device)


def _require_builder(machine: Machine, device: int) -> tuple[Gpu, str]:
    """The GPU and the version of TensorRT that build here."""
    problem, advice = tensorrt_problem(machine, device)
    if problem:
        raise InputError(
            f"no TensorRT engine can be built here: {problem}; {advice}. --format onnx works here: take that model to "
            "the machine that is to run it, and build the engine there"
        )
    return machine.gpus[device], machine.packages["tensorrt"]


def _compatibility_level(asked: bool | str) -> str:
    level = asked if isinstance(asked, str) else "ampere_plus" if asked else "none"
    if level not in HARDWARE_COMPATIBILITY:
        raise InputError(f"unknown hardware compatibility '{level}'; choose from {', '.join(HARDWARE_COMPATIBILITY)}")
    return level


def _capability(gpu: Gpu) -> str:
    return ".".join(map(str, gpu.compute_capability))


def _is_capability(text: str) -> bool:
    major, dot, minor = text.partition(".")
    return bool(dot) and major.isdigit() and minor.isdigit()


def _key(
    model: Model,
    shapes: Mapping[str, tuple[Shape, Shape, Shape]],
    *,
    builder: dict[str, Any],
    gpu: dict[str, Any],
    rebuild: str,
) -> dict[str, Any]:
    """The sidecar of an engine that is to be built, but for the engine's own size and hash."""
    digest = hashlib.sha256(model.content).hexdigest()
    return {
        "model": {"file": model.path.name, "sha256": digest, "metadata": model.metadata},
        "precision": model.metadata.get("precision", "unknown"),
        "tensors": {
            name: {"dtype": tensor.dtype, "shape": [-1 if side is None else side for side in tensor.shape]}
            for name, tensor in model.tensors.items()
        },
        "shapes": {
            name: dict(zip(("min", "opt", "max"), map(list, steps), strict=True)) for name, steps in shapes.items()
        },
        "builder": builder,
        "gpu": gpu,
        "rebuild": rebuild,
    }


def default_rebuild_command(model: Model, engine_path: Path, engine_format: str = "engine") -> str:
    """The command that makes an engine like this one from the weights that are shipped."""
    task, precision = model.metadata.get("task", "ivif"), model.metadata.get("precision", "fp32")
    words = ["python", "-m", "export.build", "--task", task, "--precision", precision]
    return shlex.join([*words, "--format", engine_format, "--out", str(engine_path)])


def is_up_to_date(engine_path: Path, key: dict[str, Any], machine: Machine, device: int = 0) -> bool:
    """Whether a whole engine is there, built from the same model, for the same machine, with the same options."""
    if not engine_path.is_file() or not sidecar_path(engine_path).is_file():
        return False
    try:
        check(engine_path, machine, device)
    except InputError:
        return False  # to be built anew, whatever is wrong with it
    return same_build(read_sidecar(engine_path), key)


def _check_target(engine_path: Path) -> None:
    """Refuse before minutes are spent: a folder in the way, or a full disk."""
    if engine_path.is_dir():
        raise InputError(f"{engine_path} is a folder; give a file like {engine_path}.engine")
    folder = next(parent for parent in engine_path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < FREE_BYTES:
        raise InputError(f"{folder} has {free / 1e6:.0f} MB free; an engine and its build need {FREE_BYTES / 1e6:.0f}")


def _timing_cache_file(asked: Path | None, version: str, gpu: Gpu) -> Path:
    """One file a TensorRT version and GPU: TensorRT refuses another's."""
    if asked is not None and not asked.is_dir():
        return asked
    folder = asked or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refusion"
    name = "".join(letter if letter.isalnum() else "_" for letter in gpu.name)
    return folder / f"tensorrt-{version}-{name}-sm{_capability(gpu).replace('.', '')}.timing"


def _run_rtx_builder(request: Request) -> bytes:
    """Build in a process of its own: after a failed build TensorRT-RTX made engines of hundreds of megabytes."""
    with tempfile.TemporaryDirectory(prefix="refusion-rtx-") as folder:
        (Path(folder) / "request.json").write_text(json.dumps(asdict(request)), encoding="utf-8")
        done = subprocess.run([sys.executable, "-m", "export.rtx_builder", folder], check=False)
        if (error := Path(folder) / "error.txt").is_file():
            raise InputError(error.read_text(encoding="utf-8"))
        if done.returncode:
            raise InputError(f"TensorRT-RTX ended with code {done.returncode} and no message over {request.model}")
        return (Path(folder) / "plan").read_bytes()
