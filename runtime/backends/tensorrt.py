"""TensorRT: engines of this machine's GPU, without PyTorch.

Buffers on both sides are allocated once for a size, those of the host pinned; a frame is one CUDA graph: both copies to
the GPU, the network, the copy back. The sidecar is checked before TensorRT touches the engine. Engines of TensorRT-RTX
run as well, without the graph.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends import check_model_inputs, image_size
from runtime.cuda_driver import CudaDriver, CudaGraph, DriverError
from runtime.engine_key import LIBRARIES, check_engine
from runtime.errors import InputError

if TYPE_CHECKING:
    import tensorrt as trt

Shape = tuple[int, ...]
NAMES = ("a", "b", "fused")

log = logging.getLogger("refusion")


@dataclass(frozen=True)
class Tensor:
    """An input or output of an engine, a free axis is -1; for inputs, the profile's smallest, usual, largest shape."""

    dtype: np.dtype
    shape: Shape
    profile: tuple[Shape, ...] = ()


class TensorRTBackend:
    """A loaded engine: inputs `a` and `b`, output `fused`, of the types and sizes that it was built for.

    One frame at a time: calls from several threads wait for each other. `close` it, or use it as a context manager, to
    give the GPU's memory back.

    Attributes:
        metadata: what the engine's model says of itself (`task`, `input_order`, `precision`, `io`, ...), strings.
        size: (H, W) that the engine is fixed to, None for a side that may vary.
        batch: number of pairs that it is fixed to, None where it may vary.
        smallest, usual, largest: (H, W) of the profile: what the engine takes, and what it is fastest for.
        threads: 0, the GPU computes.
    """

    threads = 0

    def __init__(self, path: Path, key: dict[str, Any], device: int):
        self.metadata: dict[str, str] = key["model"]["metadata"]
        self._path, self._rebuild = path, key["rebuild"]
        self._cuda = _import_pycuda()
        self._cuda.init()
        self._device = self._cuda.Device(device).retain_primary_context()
        self._lock = threading.Lock()
        self._frame: _Frame | None = None
        with self._on_device():
            self._engine, self._messages = _deserialize(path, key)
            self._tensors = _read_tensors(self._engine, key["builder"]["library"])
            self._stream = self._cuda.Stream()
        self._captures = key["builder"]["library"] == "tensorrt"
        self.size = check_tensors(path, self._tensors)
        fewest, _, most = (shape[0] for shape in self._tensors["a"].profile)
        self.batch = fewest if fewest == most else None
        axis = height_axis(self._tensors["a"])
        self.smallest, self.usual, self.largest = (
            (shape[axis], shape[axis + 1]) for shape in self._tensors["a"].profile
        )

    @classmethod
    def load(cls, path: str | Path, device: int = 0) -> TensorRTBackend:
        """Load an engine.

        Args:
            path: .engine file with its sidecar beside it.
            device: number of the GPU.

        Raises:
            InputError: no such engine, damaged, built for another machine, or a package is missing.
        """
        path = Path(path)
        return cls(path, check_engine(path, device), device)

    def run(self, a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Fuse a, b: (N, 1, H, W) float in [0, 1] or, with `io` "bgr", (N, H, W, 3) uint8 -> the same shape.

        Args:
            a, b: sources of one shape, of the engine's type or one that converts to it.
            out: array that takes the result; None makes a new one. With it, no memory is allocated for a frame of the
                size of the last.

        Raises:
            InputError: a shape or type that the engine isn't built for.
            RuntimeError: the GPU failed.
        """
        check_sources(self._path, self._tensors, {"a": a, "b": b}, self._rebuild)
        with self._lock, self._on_device():
            frame = self._frame
            if frame is None or frame.shape != a.shape:
                frame = self._new_frame(a.shape)
            np.copyto(frame.host["a"], a, casting="same_kind")
            np.copyto(frame.host["b"], b, casting="same_kind")
            frame.launch()
            self._stream.synchronize()
            fused = frame.host["fused"]
            if out is None:
                return fused.astype(np.float32) if fused.dtype == np.float16 else fused.copy()
            np.copyto(out, fused, casting="same_kind")
            return out

    def close(self) -> None:
        """Give back the GPU's memory; the backend can't be used afterwards."""
        with self._lock, self._on_device():
            if self._frame is not None:
                self._frame.close()
            self._frame = None
            del self._engine, self._stream
        self._device.detach()

    def __enter__(self) -> TensorRTBackend:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """The GPU's context is that of this thread."""
        self._device.push()
        try:
            yield
        finally:
            self._cuda.Context.pop()

    def _new_frame(self, shape: Shape) -> _Frame:
        if self._frame is not None:
            self._frame.close()
            self._frame = None
        self._frame = _Frame(self._cuda, self._engine, self._stream, self._tensors, shape, self._messages)
        if self._captures:
            self._frame.capture()
        return self._frame


class _Frame:
    """Buffers, execution context and CUDA graph of one size."""

    def __init__(
        self,
        cuda: Any,
        engine: trt.ICudaEngine,
        stream: Any,
        tensors: dict[str, Tensor],
        shape: Shape,
        messages: list[str],
    ):
        self.shape = shape
        self._cuda, self._stream, self._messages = cuda, stream, messages
        self._graph: CudaGraph | None = None
        self._context: trt.IExecutionContext = engine.create_execution_context()
        if self._context is None:
            raise RuntimeError(f"TensorRT makes no execution context: {_last(messages)}")
        for name in ("a", "b"):
            if not self._context.set_input_shape(name, shape):
                raise RuntimeError(f"TensorRT refuses the shape {shape} of {name}: {_last(messages)}")
        self.host: dict[str, NDArray[Any]] = {}
        self._gpu: dict[str, Any] = {}
        for name in NAMES:
            size = tuple(self._context.get_tensor_shape(name))
            self.host[name] = cuda.pagelocked_empty(size, tensors[name].dtype)
            self._gpu[name] = cuda.mem_alloc(self.host[name].nbytes)
            self._context.set_tensor_address(name, int(self._gpu[name]))

    def launch(self) -> None:
        """Put copies and network on the stream."""
        if self._graph is not None:
            self._graph.launch(self._stream.handle)
        else:
            self._enqueue()

    def _enqueue(self) -> None:
        for name in ("a", "b"):
            self._cuda.memcpy_htod_async(self._gpu[name], self.host[name], self._stream)
        if not self._context.execute_async_v3(self._stream.handle):
            raise RuntimeError(f"TensorRT failed: {_last(self._messages)}")
        self._cuda.memcpy_dtoh_async(self.host["fused"], self._gpu["fused"], self._stream)

    def capture(self) -> None:
        """Make a CUDA graph of the launch; where TensorRT can't be captured, launches stay as they are."""
        self._enqueue()  # what TensorRT puts off to the first run of a shape must not fall into the capture
        self._stream.synchronize()
        driver = CudaDriver()
        driver.begin_capture(self._stream.handle)
        failure: RuntimeError | None = None
        try:
            self._enqueue()
        except RuntimeError as error:
            failure = error
        try:
            graph = driver.end_capture(self._stream.handle)
        except DriverError as error:
            failure = failure or error
        if failure is None:
            self._graph = graph
        else:
            log.warning("no CUDA graph for this engine, each frame is launched step by step (%s)", failure)

    def close(self) -> None:
        if self._graph is not None:
            self._graph.close()
            self._graph = None
        del self._context
        for memory in self._gpu.values():
            memory.free()
        self._gpu.clear()
        self.host.clear()


def _import_pycuda() -> Any:
    try:
        return importlib.import_module("pycuda.driver")
    except ImportError as error:
        raise InputError(
            "running an engine needs the package pycuda, which is compiled with the CUDA toolkit: "
            f"pip install 'refusion[tensorrt]' ({error})"
        ) from error


def _deserialize(path: Path, key: dict[str, Any]) -> tuple[trt.ICudaEngine, list[str]]:
    """The engine of a checked file, and the list that TensorRT's errors go to from now on."""
    library = key["builder"]["library"]
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        try:
            trt = importlib.import_module(library)
        except ImportError as error:
            raise InputError(f"{LIBRARIES[library]} cannot be imported: {error}") from error

    class Messages(trt.ILogger):
        """Keeps TensorRT's errors; the engine holds on to it."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(msg.split()))
            elif severity == trt.ILogger.Severity.WARNING:
                log.info("TensorRT: %s", msg)

    messages = Messages()
    try:
        runtime = trt.Runtime(messages)
    except TypeError as error:  # what pybind11 makes of TensorRT's null pointer
        raise InputError(f"{LIBRARIES[library]} does not start: {_last(messages.errors)}") from error
    if key["builder"]["version_compatible"]:
        runtime.engine_host_code_allowed = True  # such an engine carries a runtime of its own; the file was checked
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise InputError(
            f"{LIBRARIES[library]} can't load engine {path}: {_last(messages.errors)}; rebuild it: {key['rebuild']}"
        )
    return engine, messages.errors


def _last(messages: list[str]) -> str:
    return messages[-1] if messages else "no reason given"


def _read_tensors(engine: trt.ICudaEngine, library: str) -> dict[str, Tensor]:
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = importlib.import_module(library)
    tensors = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype, shape = np.dtype(trt.nptype(engine.get_tensor_dtype(name))), tuple(engine.get_tensor_shape(name))
        profile: tuple[Shape, ...] = ()
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            free = -1 in shape
            profile = tuple(map(tuple, engine.get_tensor_profile_shape(name, 0))) if free else (shape, shape, shape)
        tensors[name] = Tensor(dtype, shape, profile)
    return tensors


def check_tensors(path: Path, tensors: dict[str, Tensor]) -> tuple[int | None, int | None]:
    """(H, W) that an engine is fixed to, None for a side that may vary.

    Raises:
        InputError: not an engine of a fusion model.
    """
    shapes: dict[str, tuple[list[object], str]] = {}
    for name, tensor in tensors.items():
        # An axis whose profile has one size is as fixed as one that the model fixes.
        smallest, _, largest = tensor.profile or (tensor.shape,) * 3
        shape: list[object] = [low if low == high else "any" for low, high in zip(smallest, largest, strict=True)]
        kind = "float32" if tensor.dtype == np.float16 else str(tensor.dtype)  # float16 is converted here
        shapes[name] = (shape, kind)
    inputs = {name: shape for name, shape in shapes.items() if tensors[name].profile}
    check_model_inputs(path, inputs, [name for name in tensors if name not in inputs])
    return image_size(*inputs["a"])


def height_axis(tensor: Tensor) -> int:
    """1 for (N, H, W, 3), 2 for (N, 1, H, W)."""
    return 1 if tensor.dtype == np.uint8 else 2


def check_sources(path: Path, tensors: dict[str, Tensor], sources: dict[str, np.ndarray], rebuild: str) -> None:
    """Raise InputError unless an engine takes these arrays."""
    if sources["a"].shape != sources["b"].shape:
        raise InputError(f"a is {sources['a'].shape} and b is {sources['b'].shape}; both must have one shape")
    for name, array in sources.items():
        tensor = tensors[name]
        if array.ndim != 4 or not np.can_cast(array.dtype, tensor.dtype, "same_kind"):
            raise InputError(f"{name} is {array.dtype} {array.shape}; engine {path} takes {tensor.dtype} of 4 axes")
        smallest, _, largest = tensor.profile
        if not all(low <= side <= high for low, side, high in zip(smallest, array.shape, largest, strict=True)):
            raise InputError(
                f"{name} is {_text(array.shape)} and engine {path} takes {_text(smallest)} to {_text(largest)}; "
                f"rebuild it with another --min-size or --max-size: {rebuild}"
            )


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))
