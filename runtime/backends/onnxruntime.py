"""ONNX Runtime: the default backend, on the CPU, or on CUDA where its package has that provider and it is asked for."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from runtime.backends import check_model_inputs, fixed_batch, image_size
from runtime.cuda_driver import CudaDriver, DriverError
from runtime.errors import InputError

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_KINDS = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}

_LOAD_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


def available_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cuda_answers() -> bool:
    """Whether this ONNX Runtime has the CUDA provider and a driver answers."""
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        return False
    try:
        return bool(CudaDriver().gpus())
    except DriverError:
        return False


def engine_cache() -> Path:
    """Folder of the engines that ONNX Runtime's TensorRT provider builds: $XDG_CACHE_HOME/refusion/onnxruntime."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refusion" / "onnxruntime"


class OnnxRuntimeBackend:
    """A loaded fusion model, see `runtime.backends.Backend`."""

    def __init__(self, session: ort.InferenceSession, shape: list[object], kind: str, threads: int):
        self._session = session
        self.size, self.batch = image_size(shape, kind), fixed_batch(shape)
        self.threads = threads
        self.metadata: dict[str, str] = dict(session.get_modelmeta().custom_metadata_map)

    @classmethod
    def load(cls, path: str | Path, threads: int | None = None, device: str = "cpu") -> OnnxRuntimeBackend:
        """Load a model file.

        Args:
            path: .onnx file.
            threads: threads that compute one frame; None takes every core that the process may use.
            device: "cpu", "cuda", or "tensorrt", whose engines are kept in `engine_cache()`.

        Raises:
            InputError: no such file, not an ONNX model, not a fusion model, or a device that isn't there.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or available_cores()
        # The memory pattern of a size is a second block beside the arena that found it: 2.7 GB in place of 1.4 at
        # 640x480, for 4 % of the time. Bound buffers gave nothing: inputs and output are 1.2 MB each.
        options.enable_mem_pattern = False
        session = _session(Path(path), options, PROVIDERS[device])
        shapes = {node.name: (node.shape, _KINDS.get(node.type, node.type)) for node in session.get_inputs()}
        check_model_inputs(path, shapes, [node.name for node in session.get_outputs()])
        return cls(session, *shapes["a"], 0 if device != "cpu" else options.intra_op_num_threads)

    def run(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Fuse a and b, arrays as `runtime.backends.Backend` says; the result is a new array."""
        return self._session.run(["fused"], {"a": a, "b": b})[0]


def read_metadata(path: Path) -> dict[str, str]:
    """What an .onnx file says of itself. Raises InputError for a missing or damaged file."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return dict(_session(path, options, PROVIDERS["cpu"]).get_modelmeta().custom_metadata_map)


def _session(path: Path, options: ort.SessionOptions, provider: str) -> ort.InferenceSession:
    if not path.is_file():
        raise InputError(
            f"model {path} is {'not a file' if path.exists() else 'missing'}; give a path to an .onnx file"
        )
    if provider not in ort.get_available_providers():
        raise InputError(f"this onnxruntime has no {provider}; install onnxruntime-gpu, or use the CPU")
    options.log_severity_level = 4  # what goes wrong comes as an exception
    settings: dict[str, object] = {}
    if provider == PROVIDERS["tensorrt"]:
        cache = engine_cache()
        cache.mkdir(parents=True, exist_ok=True)
        settings = {"trt_engine_cache_enable": True, "trt_engine_cache_path": str(cache)}
    try:
        session = ort.InferenceSession(str(path), options, providers=[(provider, settings)])
    except _LOAD_ERRORS as error:
        reason = " ".join(str(error).split())
        raise InputError(f"model {path} cannot be loaded, is it a whole .onnx file? ({reason})") from error
    if provider not in session.get_providers():  # it falls back to the CPU without a word
        raise InputError(f"{provider} cannot start here: check the GPU's driver and CUDA's libraries, or use the CPU")
    return session
