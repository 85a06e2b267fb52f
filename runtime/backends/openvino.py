"""OpenVINO: Intel and ARM CPUs, and Intel's GPUs. An extra: pip install 'refusion[openvino]'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends import check_model_inputs, fixed_batch, image_size
from runtime.errors import InputError

_KINDS = {"f32": "float32", "u8": "uint8"}


class OpenVinoBackend:
    """A loaded fusion model, see `runtime.backends.Backend`.

    It computes in float32: OpenVINO's own choice on a CPU with bfloat16 is that, which is off by up to 0.014.
    """

    def __init__(self, compiled: Any, metadata: dict[str, str], shape: list[object], kind: str, threads: int):
        self._request = compiled.create_infer_request()
        self.metadata, self.threads = metadata, threads
        self.size, self.batch = image_size(shape, kind), fixed_batch(shape)

    @classmethod
    def load(cls, path: str | Path, threads: int | None = None) -> OpenVinoBackend:
        """Load an .onnx file for the CPU.

        Args:
            path: .onnx file.
            threads: threads that compute one frame; None takes every core that the process may use.

        Raises:
            InputError: the package or the file is missing, or it is not a fusion model.
        """
        try:
            import openvino
        except ImportError as error:
            raise InputError("backend openvino needs the package openvino: pip install 'refusion[openvino]'") from error
        from runtime.backends.onnxruntime import available_cores, read_metadata

        path = Path(path)
        metadata = read_metadata(path)  # OpenVINO doesn't hand on what the file says of itself
        threads = threads or available_cores()
        core = openvino.Core()
        try:
            model = core.read_model(path)
            settings = {
                "INFERENCE_PRECISION_HINT": "f32",
                "INFERENCE_NUM_THREADS": threads,
                "PERFORMANCE_HINT": "LATENCY",
            }
            compiled = core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise InputError(f"model {path} cannot be loaded by OpenVINO ({' '.join(str(error).split())})") from error
        shapes = {
            port.any_name: (
                [d.get_length() if d.is_static else "any" for d in port.partial_shape],
                _KINDS.get(port.element_type.get_type_name(), port.element_type.get_type_name()),
            )
            for port in compiled.inputs
        }
        check_model_inputs(path, shapes, [port.any_name for port in compiled.outputs])
        return cls(compiled, metadata, *shapes["a"], threads)

    def run(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Fuse a and b, arrays as `runtime.backends.Backend` says; the result is a new array."""
        return self._request.infer({"a": a, "b": b})["fused"].copy()
