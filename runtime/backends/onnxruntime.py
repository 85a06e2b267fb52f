"""ONNX Runtime: the default backend, on the CPU, or on CUDA where its package has that provider and it is asked for."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from runtime.errors import InputError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

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


class OnnxRuntimeBackend:
    """A loaded fusion model: inputs `a` and `b`, output `fused`, each (1, 1, H, W) float32 in [0, 1].

    Attributes:
        metadata: what the model file says of itself (`task`, `input_order`, `precision`, ...), strings.
        size: (H, W) that the model is fixed to, None for a side that may be any.
        threads: number of threads that compute one frame.
    """

    def __init__(self, session: ort.InferenceSession, size: tuple[int | None, int | None], threads: int):
        self._session = session
        self.size = size
        self.threads = threads
        self.metadata: dict[str, str] = dict(session.get_modelmeta().custom_metadata_map)

    @classmethod
    def load(cls, path: str | Path, threads: int | None = None, device: str = "cpu") -> OnnxRuntimeBackend:
        """Load a model file.

        Args:
            path: .onnx file.
            threads: threads that compute one frame; None takes every core that the process may use.
            device: "cpu" or "cuda".

        Raises:
            InputError: no such file, not an ONNX model, not a fusion model, or a device that isn't there.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(
                f"model {path} is {'not a file' if path.exists() else 'missing'}; give a path to an .onnx file"
            )
        if threads is not None and threads < 1:
            raise InputError(f"the number of threads is {threads}; give 1 or more")
        provider = PROVIDERS[device]
        if provider not in ort.get_available_providers():
            raise InputError(f"this onnxruntime has no {provider}; install onnxruntime-gpu, or use the CPU")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or available_cores()
        options.log_severity_level = 4  # what goes wrong comes as an exception
        # The memory pattern of a size is a second block beside the arena that found it: 2.7 GB in place of 1.4 at
        # 640x480, for 4 % of the time. Bound buffers gave nothing: inputs and output are 1.2 MB each.
        options.enable_mem_pattern = False
        try:
            session = ort.InferenceSession(str(path), options, providers=[provider])
        except _LOAD_ERRORS as error:
            reason = " ".join(str(error).split())
            raise InputError(f"model {path} cannot be loaded, is it a whole .onnx file? ({reason})") from error
        return cls(session, _image_size(session, path), options.intra_op_num_threads)

    def run(self, a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
        """Fuse a, b: (1, 1, H, W) float32 in [0, 1] -> (1, 1, H, W) float32 in [0, 1]."""
        return self._session.run(["fused"], {"a": a, "b": b})[0]


def _image_size(session: ort.InferenceSession, path: Path) -> tuple[int | None, int | None]:
    """Check that a session is a fusion model; returns the height and width that it is fixed to."""
    inputs = {node.name: node for node in session.get_inputs()}
    outputs = [node.name for node in session.get_outputs()]
    if set(inputs) != {"a", "b"} or "fused" not in outputs:
        raise InputError(
            f"model {path} has inputs {', '.join(inputs)} and outputs {', '.join(outputs)}; "
            "a fusion model has inputs a, b and output fused"
        )
    for node in inputs.values():
        if node.type != "tensor(float)" or len(node.shape) != 4:
            raise InputError(f"model {path} has input {node.name} {node.type} {node.shape}, not float (1, 1, H, W)")
    height, width = inputs["a"].shape[2:]
    return (height if isinstance(height, int) else None, width if isinstance(width, int) else None)
