"""What runs a model file: one small interface, and the choice of who does it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from runtime.errors import InputError

if TYPE_CHECKING:  # the command line reads BACKENDS for its --help
    import numpy as np

BACKENDS = ("auto", "onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt", "openvino")
_PROVIDERS = {"onnxruntime": "cpu", "onnxruntime-cuda": "cuda", "onnxruntime-tensorrt": "tensorrt"}


class Backend(Protocol):
    """A loaded model: inputs `a` and `b`, output `fused`.

    They are (N, 1, H, W) float32 in [0, 1], or (N, H, W, 3) uint8 (BGR) where metadata["io"] is "bgr".

    Attributes:
        metadata: what the model file says of itself (`task`, `input_order`, `precision`, ...), strings.
        size: (H, W) that the model is fixed to, None for a side that may be any.
        batch: number of pairs N that the model is fixed to, None where it may be any.
        threads: CPU threads that compute one frame, 0 where a GPU does.
    """

    metadata: dict[str, str]
    size: tuple[int | None, int | None]
    batch: int | None
    threads: int

    def run(self, a: np.ndarray, b: np.ndarray) -> np.ndarray: ...


def choose_backend(backend: str, path: str | Path | None = None) -> tuple[str, str]:
    """Name of the backend that will run, and in a few words why that one.

    "auto" takes TensorRT for an engine, ONNX Runtime's CUDA where it has it and a GPU answers, else ONNX Runtime on the
    CPU, which is faster there than OpenVINO (python -m benchmarks.fuse). ONNX Runtime's TensorRT provider must be asked
    for: it builds an engine before the first frame, which takes minutes.

    Args:
        backend: one of BACKENDS.
        path: the model file, where it is known.

    Raises:
        InputError: unknown backend, or one that doesn't read that kind of file.
    """
    if backend not in BACKENDS:
        raise InputError(f"unknown backend '{backend}'; choose from {', '.join(BACKENDS)}")
    engine = path is not None and Path(path).suffix == ".engine"
    if backend == "auto":
        if engine:
            return "tensorrt", "auto: the model is an engine"
        from runtime.backends.onnxruntime import cuda_answers

        if cuda_answers():
            return "onnxruntime-cuda", "auto: ONNX Runtime has CUDA here"
        return "onnxruntime", "auto: no GPU that ONNX Runtime can use"
    if path is not None and engine != (backend == "tensorrt"):
        kind = "an .engine file" if backend == "tensorrt" else "an .onnx file"
        raise InputError(f"backend {backend} needs {kind}, and the model is {path}")
    return backend, "as asked for"


def load_backend(path: str | Path, backend: str, threads: int | None = None) -> Backend:
    """Load a model file into a backend (one that `choose_backend` named, not "auto").

    Raises:
        InputError: a file that is missing, damaged or not a fusion model, a number of threads below 1, or a package,
            provider or GPU that isn't there.
    """
    check_threads(threads)
    if backend == "tensorrt":
        from runtime.backends.tensorrt import TensorRTBackend

        return TensorRTBackend.load(path)
    if backend == "openvino":
        from runtime.backends.openvino import OpenVinoBackend

        return OpenVinoBackend.load(path, threads)
    from runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend.load(path, threads, _PROVIDERS[backend])


def check_threads(threads: int | None) -> None:
    """Raise InputError for a number of threads below 1."""
    if threads is not None and threads < 1:
        raise InputError(f"the number of threads is {threads}; give 1 or more")


def runs_on_gpu(backend: str) -> bool:
    """Whether a backend computes on a GPU."""
    return backend in ("tensorrt", "onnxruntime-cuda", "onnxruntime-tensorrt")


def check_model_inputs(path: str | Path, shapes: dict[str, tuple[list[object], str]], outputs: list[str]) -> None:
    """Raise InputError unless a model file's inputs and outputs are those of a fusion model.

    Args:
        path: the file, for the message.
        shapes: name of an input -> its shape, an axis that is not a number may be any, and its type, "float32" or
            "uint8".
        outputs: names of its outputs.
    """
    if set(shapes) != {"a", "b"} or "fused" not in outputs:
        raise InputError(
            f"model {path} has inputs {', '.join(shapes)} and outputs {', '.join(outputs)}; "
            "a fusion model has inputs a, b and output fused"
        )
    for name, (shape, kind) in shapes.items():
        bgr = kind == "uint8" and len(shape) == 4 and shape[3] == 3
        if not bgr and not (kind == "float32" and len(shape) == 4):
            raise InputError(
                f"model {path} has input {name} {kind} {shape}, neither float32 (N, 1, H, W) nor uint8 (N, H, W, 3)"
            )


def fixed_batch(shape: list[object]) -> int | None:
    """Number of pairs that an input of this shape is fixed to, None where it may be any."""
    return shape[0] if isinstance(shape[0], int) else None


def image_size(shape: list[object], kind: str) -> tuple[int | None, int | None]:
    """(H, W) that an input of this shape is fixed to, None for a side that may be any."""
    height, width = shape[1:3] if kind == "uint8" else shape[2:]
    return (height if isinstance(height, int) else None, width if isinstance(width, int) else None)
