"""A model repository for NVIDIA Triton Inference Server: one fusion model for many cameras and machines.

    <out>/<name>/config.pbtxt
    <out>/<name>/1/model.onnx or model.plan

Source: Triton documentation, "Model Repository" and "Model Configuration" (ModelConfig of model_config.proto).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export.profile import OPT_SIZE, TensorInfo, read_model
from runtime.engine_key import describe, file_sha256, read_sidecar
from runtime.errors import InputError

DEFAULT_MAX_BATCH = 8
QUEUE_DELAY_US = 2000  # a fifteenth of a frame at 30 Hz: what a request may wait for others to share its batch

log = logging.getLogger("refusion")

_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8"}
_PRECISION_MODES = {"fp32": "FP32", "fp16": "FP16", "int8": "INT8"}


@dataclass(frozen=True)
class _Served:
    """What the configuration says of the model file."""

    platform: str
    file: str
    about: str
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    largest_batch: int | None  # None: any
    usual_size: tuple[int, int]


def write_repository(
    model_path: Path,
    out: Path,
    *,
    name: str = "",
    max_batch: int = DEFAULT_MAX_BATCH,
    preferred_batches: Sequence[int] = (),
    queue_delay_us: int = QUEUE_DELAY_US,
    instances: int = 1,
    device: str = "auto",
    tensorrt: bool = False,
    force: bool = False,
) -> Path:
    """Write a model repository, or add a model to one; the model's folder appears whole or not at all.

    Args:
        model_path: .onnx, or .engine with its sidecar; the server's machine must be the one that it was built for.
        out: the repository's folder.
        name: the model's name on the server; "" takes the file's, without its suffix.
        max_batch: most pairs in one call; the server joins requests of equal size up to it. 1: none are joined. With a
            model that takes fewer, that many.
        preferred_batches: sizes of a batch that are run without waiting for more; () takes max_batch.
        queue_delay_us: microseconds that a request may wait for others.
        instances: copies of the model on each GPU, or on the CPU.
        device: "auto" (GPUs if there are, else the CPU), "gpu" or "cpu".
        tensorrt: let the server's ONNX Runtime run an ONNX model with TensorRT, which builds an engine at the start.
        force: replace a model of that name.

    Returns:
        The model's folder, `<out>/<name>`.

    Raises:
        InputError: no good model, name or number; the model is there already; the folder can't be written.
    """
    name = name or model_path.stem
    if not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9_-]", name):
        raise InputError(f"'{name}' is no name for a model on a server; use letters, digits, '_', '-' and '.'")
    served = _engine(model_path) if model_path.suffix == ".engine" else _onnx(model_path)
    if served.largest_batch is not None and max_batch > served.largest_batch:
        log.warning(
            "%s takes %d pair%s at a time, so the server joins no more; a model exported with --batch 0 takes up to %d",
            *(model_path, served.largest_batch, "s" if served.largest_batch > 1 else "", max_batch),
        )
        max_batch = served.largest_batch
    _check(model_path, served, max_batch, preferred_batches, queue_delay_us, instances, device, tensorrt)
    folder = out / name
    if folder.exists() and not force:
        raise InputError(f"{folder} is there already; --force replaces it, or give another name")
    config = "\n".join(
        [
            *_header(name, served, max_batch),
            *_tensors(served),
            *_batching(served, max_batch, preferred_batches, queue_delay_us),
            *_placement(served, instances, device, tensorrt),
            *_warm_up(served),
            "",
        ]
    )
    _write(folder, config, model_path, served.file)
    return folder


def _onnx(path: Path) -> _Served:
    model = read_model(path)
    shape = model.inputs["a"]
    axis = 1 if model.metadata.get("io") == "bgr" else 2
    size = (shape[axis] or OPT_SIZE[0], shape[axis + 1] or OPT_SIZE[1])
    about = f"{path.name}, an ONNX model"
    return _Served("onnxruntime_onnx", "model.onnx", about, model.metadata, model.tensors, shape[0], size)


def _engine(path: Path) -> _Served:
    if not path.is_file():
        raise InputError(f"engine {path} is missing; build it: python -m export.build --format engine")
    key = read_sidecar(path)
    if file_sha256(path) != key["engine"]["sha256"]:
        raise InputError(f"engine {path} is not the file that its sidecar describes; rebuild it: {key['rebuild']}")
    if key["builder"]["library"] != "tensorrt":
        raise InputError(f"engine {path} is one of TensorRT-RTX, which the server does not run; take --format engine")
    tensors = {
        name: TensorInfo(tensor["dtype"], tuple(None if side < 0 else side for side in tensor["shape"]))
        for name, tensor in key["tensors"].items()
    }
    metadata, usual = key["model"]["metadata"], key["shapes"]["a"]["opt"]
    axis = 1 if metadata.get("io") == "bgr" else 2
    about = f"{path.name}, a TensorRT engine for {describe(key)}"
    largest = key["shapes"]["a"]["max"][0]
    return _Served("tensorrt_plan", "model.plan", about, metadata, tensors, largest, (usual[axis], usual[axis + 1]))


def _check(
    path: Path,
    served: _Served,
    max_batch: int,
    preferred: Sequence[int],
    queue_delay_us: int,
    instances: int,
    device: str,
    tensorrt: bool,
) -> None:
    if max_batch < 1 or instances < 1 or queue_delay_us < 0:
        raise InputError("batch and instances start from 1, the queue delay from 0")
    if any(not 1 <= size <= max_batch for size in preferred):
        raise InputError(f"preferred batches {', '.join(map(str, preferred))} must lie between 1 and {max_batch}")
    if device not in ("auto", "gpu", "cpu"):
        raise InputError(f"unknown device '{device}'; choose from auto, gpu, cpu")
    if served.platform == "tensorrt_plan" and (device == "cpu" or tensorrt):
        raise InputError(f"{path} is an engine already: it runs on a GPU, and without ONNX Runtime")
    for name, tensor in served.tensors.items():
        if tensor.dtype not in _TYPES:
            raise InputError(f"{path}: {name} is {tensor.dtype}; the server is offered {', '.join(_TYPES)}")


def _batched(served: _Served) -> bool:
    """Whether the server may fill the first axis; a model whose number of pairs is fixed is served as it is."""
    return served.tensors["a"].shape[0] is None


def _header(name: str, served: _Served, max_batch: int) -> list[str]:
    order = served.metadata.get("input_order", "a, b")
    kind = "(3 colours, BGR, 0 to 255)" if served.metadata.get("io") == "bgr" else "(luma, 0 to 1)"
    return [
        f"# {_comment(served.about)}",
        f"# task {_comment(served.metadata.get('task', '?'))}, {_comment(order)} {kind}, "
        f"precision {_comment(served.metadata.get('precision', '?'))}",
        f"name: {json.dumps(name)}",
        f"platform: {json.dumps(served.platform)}",
        f"max_batch_size: {max_batch if _batched(served) else 0}",
        "version_policy { latest { num_versions: 1 } }",
    ]


def _comment(text: str) -> str:
    return " ".join(text.split())


def _dims(served: _Served, name: str) -> list[int]:
    shape = served.tensors[name].shape[1 if _batched(served) else 0 :]
    return [-1 if side is None else side for side in shape]


def _tensors(served: _Served) -> list[str]:
    return [
        f'{kind} {{ name: "{name}" data_type: {_TYPES[served.tensors[name].dtype]} dims: {_dims(served, name)} }}'
        for kind, name in (("input", "a"), ("input", "b"), ("output", "fused"))
    ]


def _batching(served: _Served, max_batch: int, preferred: Sequence[int], queue_delay_us: int) -> list[str]:
    if max_batch == 1 or not _batched(served):
        return []
    sizes = sorted(set(preferred)) or [max_batch]
    return [
        f"dynamic_batching {{ preferred_batch_size: {list(sizes)} max_queue_delay_microseconds: {queue_delay_us} }}"
    ]


def _placement(served: _Served, instances: int, device: str, tensorrt: bool) -> list[str]:
    kind = "KIND_GPU" if served.platform == "tensorrt_plan" else f"KIND_{device.upper()}"
    lines = [f"instance_group {{ count: {instances} kind: {kind} }}"]
    if tensorrt:
        mode = _PRECISION_MODES.get(served.metadata.get("precision", ""), "FP32")
        parameters = {
            "precision_mode": mode,
            "trt_engine_cache_enable": "true",
            "trt_engine_cache_path": "/tmp/refusion",
        }
        lines += ["optimization { execution_accelerators { gpu_execution_accelerator {", '  name: "tensorrt"']
        lines += [f'  parameters {{ key: "{key}" value: "{value}" }}' for key, value in parameters.items()]
        lines += ["} } }"]
    return lines


def _warm_up(served: _Served) -> list[str]:
    """The server runs one blank pair before it says that it is ready."""
    height, width = served.usual_size
    lines = [f'model_warmup {{ name: "blank {width}x{height}" batch_size: {1 if _batched(served) else 0}']
    for name in ("a", "b"):
        dims = _dims(served, name)
        free = iter(served.usual_size)
        first = 0 if _batched(served) else 1
        dims = dims[:first] + [next(free) if side < 0 else side for side in dims[first:]]
        value = f"data_type: {_TYPES[served.tensors[name].dtype]} dims: {dims} zero_data: true"
        lines.append(f'  inputs {{ key: "{name}" value {{ {value} }} }}')
    return [*lines, "}"]


def _write(folder: Path, config: str, model: Path, file: str) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            new = Path(temporary) / "new"
            (new / "1").mkdir(parents=True)
            (new / "config.pbtxt").write_text(config, encoding="utf-8")
            shutil.copyfile(model, new / "1" / file)
            if folder.exists():
                os.rename(folder, Path(temporary) / "old")
            os.rename(new, folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from error
