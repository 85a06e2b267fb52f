"""The sidecar of an engine, `<name>.engine.json`: what it was made from and for, checked before anything loads it.

An engine runs only on the TensorRT version and the GPU that it was built with, and a library that is given another one
fails late, with a message of its internals, or not at all. So `check_engine` comes first. What it accepts:

- the file: its size and sha256 are those of the sidecar.
- platform: the same operating system and processor, always.
- TensorRT version: the same. Built with `version_compatible`: the same or a newer version of the same major release,
  or TensorRT 11 for an engine of TensorRT 10. TensorRT-RTX: the same, always.
- GPU: the same name and compute capability. `hardware_compatibility` "same_compute_capability": any GPU of that
  capability; "ampere_plus": any GPU of capability 8.0 or newer. TensorRT-RTX: any GPU of the capabilities built for.

Source: TensorRT documentation, "Engine Compatibility" (11.1) and "Support Matrix" (11.4.1).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from runtime.cuda_driver import Gpu
from runtime.errors import InputError
from runtime.files import write_whole
from runtime.machine import Machine, probe

FORMAT_VERSION = 1
LIBRARIES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
HARDWARE_COMPATIBILITY = ("none", "same_compute_capability", "ampere_plus")
OLDEST, NEWEST_MAJOR = (10, 3), 11  # TensorRT versions that are supported: JetPack 6 to the newest
# Major versions whose version-compatible engines run on another major version.
_NEXT_MAJOR = {8: 10, 10: 11}

# What a sidecar holds, and of which type.
_FIELDS: dict[tuple[str, ...], type | tuple[type, ...]] = {
    ("format_version",): int,
    ("engine", "sha256"): str,
    ("engine", "bytes"): int,
    ("model", "file"): str,
    ("model", "sha256"): str,
    ("model", "metadata"): dict,  # task, input_order, io, precision, ...: the ONNX model's own, strings
    ("precision",): str,
    ("tensors",): dict,  # a, b, fused -> "dtype" as NumPy names it, "shape" with -1 for what is free
    ("shapes",): dict,  # input -> {"min", "opt", "max"} -> shape
    ("builder", "library"): str,
    ("builder", "version"): str,
    ("builder", "platform"): str,
    ("builder", "version_compatible"): bool,
    ("builder", "hardware_compatibility"): str,
    ("gpu", "name"): (str, type(None)),  # None: not built for one GPU
    ("gpu", "compute_capabilities"): list,  # as "8.7"
    ("rebuild",): str,  # the command that makes this engine anew
}


def sidecar_path(engine: str | Path) -> Path:
    return Path(f"{engine}.json")


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_sidecar(engine: Path, key: dict[str, Any]) -> Path:
    """Write the sidecar of an engine file, atomically.

    Args:
        engine: the engine's file, which is there already: its size and hash go into the sidecar.
        key: all fields of the sidecar but `format_version` and `engine`.
    """
    stated = {"sha256": file_sha256(engine), "bytes": engine.stat().st_size}
    text = json.dumps({"format_version": FORMAT_VERSION, "engine": stated, **key}, indent=1) + "\n"
    path = sidecar_path(engine)
    write_whole(path, text.encode())
    return path


def read_sidecar(engine: str | Path) -> dict[str, Any]:
    """The sidecar of an engine, complete and of the right types.

    Raises:
        InputError: there is none, or it is damaged or of a newer release.
    """
    path = sidecar_path(engine)
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"engine {engine} has no sidecar {path.name}, so what it was built for is unknown; copy it along with the "
            "engine, or rebuild: python -m export.build --format engine"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(_damaged(path, f"not JSON that can be read: {' '.join(str(error).split())}")) from error
    if isinstance(key, dict) and isinstance(version := key.get("format_version"), int) and version > FORMAT_VERSION:
        raise InputError(f"sidecar {path} is of format {version}, this release reads {FORMAT_VERSION}: update refusion")
    for names, kind in _FIELDS.items():
        value: Any = key
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            raise InputError(_damaged(path, f"its field '{'.'.join(names)}' is missing or of another type"))
    return key


def _damaged(path: Path, reason: str) -> str:
    return f"sidecar {path} is damaged ({reason}); rebuild the engine: python -m export.build --format engine"


def check_engine(path: str | Path, device: int = 0) -> dict[str, Any]:
    """Check an engine's file and sidecar against each other and against this machine; nothing of TensorRT is loaded.

    Args:
        path: the engine's file.
        device: number of the GPU that is to run it.

    Returns:
        The sidecar.

    Raises:
        InputError: no such engine, a missing or damaged sidecar, a damaged or replaced engine, or another machine: one
            line that says what the engine was built for, what this machine is, and the command that rebuilds it.
    """
    return check(path, probe(), device)


def check(path: str | Path, machine: Machine, device: int = 0) -> dict[str, Any]:
    """`check_engine` for a machine that was looked at already."""
    engine = Path(path)
    if not engine.is_file():
        what = "not a file" if engine.exists() else "missing"
        raise InputError(f"engine {engine} is {what}; build it: python -m export.build --format engine")
    key = read_sidecar(engine)
    rebuild = f"rebuild it: {key['rebuild']}"
    size, stated = engine.stat().st_size, key["engine"]["bytes"]
    if size != stated:
        raise InputError(f"engine {engine} has {size:,} bytes and its sidecar says {stated:,}: damaged; {rebuild}")
    if file_sha256(engine) != key["engine"]["sha256"]:
        raise InputError(f"engine {engine} is not the file that its sidecar describes (sha256 differs); {rebuild}")
    gpu = machine.gpus[device] if 0 <= device < len(machine.gpus) else None
    library = key["builder"]["library"]
    version = machine.packages.get(library)
    if (
        gpu is None
        or key["builder"]["platform"] != machine.platform
        or not _version_fits(key["builder"], version)
        or not _gpu_fits(key, gpu)
    ):
        here = _describe_here(machine, gpu, device, library, version)
        raise InputError(f"engine {engine} was built for {describe(key)}; this machine has {here}; {rebuild}")
    return key


def describe(key: dict[str, Any]) -> str:
    """What an engine was built for, as "TensorRT 10.3.0, Orin (sm_87), linux-aarch64"."""
    builder, gpu = key["builder"], key["gpu"]
    capabilities = ", ".join(f"sm_{str(capability).replace('.', '')}" for capability in gpu["compute_capabilities"])
    name = f"{gpu['name']} ({capabilities})" if gpu["name"] else f"GPUs of {capabilities}"
    library = LIBRARIES.get(builder["library"], builder["library"])
    newer = " or newer" if builder["version_compatible"] else ""
    return f"{library} {builder['version']}{newer}, {name}, {builder['platform']}"


def _describe_here(machine: Machine, gpu: Gpu | None, device: int, library: str, version: str | None) -> str:
    name = LIBRARIES.get(library, library)
    installed = f"no {name}" if version is None else f"{name} {version or 'of unknown version'}"
    if gpu is None:
        missing = f"no GPU {device}" if machine.gpus else f"no GPU: {machine.gpu_problem}"
        return f"{installed}, {missing}, {machine.platform}"
    return f"{installed}, {gpu}, {machine.platform}"


def tensorrt_problem(machine: Machine, device: int = 0) -> tuple[str, str]:
    """What keeps a machine from building and running TensorRT engines, and what to do; "" for nothing."""
    if not machine.gpus:
        return machine.gpu_problem, "engines are built and run on a machine with an NVIDIA GPU"
    if not 0 <= device < len(machine.gpus):
        return f"no GPU {device} among {len(machine.gpus)}", "they are counted from 0"
    version = machine.packages.get("tensorrt")
    if version is None:
        return "no TensorRT for this Python", (
            "sudo apt install python3-libnvinfer, and a virtual environment with --system-site-packages"
            if machine.jetpack
            else "pip install 'refusion[tensorrt]'"
        )
    numbers = version_numbers(version)
    if not numbers:
        return f"TensorRT of unknown version '{version}'", "install it with pip or apt"
    if numbers[:2] < OLDEST:
        return f"TensorRT {version} is too old", "10.3 (JetPack 6) is the oldest that is supported"
    if numbers[0] > NEWEST_MAJOR:
        return f"TensorRT {version} is newer than this release of refusion knows", "update refusion"
    return "", ""


def version_numbers(version: str) -> tuple[int, ...]:
    """ "10.3.0.post12" -> (10, 3, 0): the leading numbers of a version."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _version_fits(builder: dict[str, Any], version: str | None) -> bool:
    if version is None:
        return False
    built, here = version_numbers(builder["version"]), version_numbers(version)
    if not builder["version_compatible"] or not built or not here:
        return version == builder["version"]
    return (here >= built and here[0] == built[0]) or here[0] == _NEXT_MAJOR.get(built[0])


def _gpu_fits(key: dict[str, Any], gpu: Gpu) -> bool:
    level = key["builder"]["hardware_compatibility"]
    if level == "ampere_plus":
        return gpu.compute_capability >= (8, 0)
    major, minor = gpu.compute_capability
    same_capability = f"{major}.{minor}" in key["gpu"]["compute_capabilities"]
    return same_capability and (level == "same_compute_capability" or key["gpu"]["name"] in (None, gpu.name))


def same_build(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two sidecars are of the same model, target and options, so that one engine does for both."""
    compared = ("model", "precision", "shapes", "builder", "gpu")
    return all(_without_name(a[name]) == _without_name(b[name]) for name in compared)


def _without_name(field: Any) -> Any:
    return {name: value for name, value in field.items() if name != "file"} if isinstance(field, dict) else field
