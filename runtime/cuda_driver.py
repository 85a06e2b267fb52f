"""The CUDA driver by ctypes: whether there is one, what its GPUs are, and CUDA graphs, which pycuda does not have.

NVIDIA's libraries may crash where the driver is missing, so the driver is asked before any of them is imported.
Source: CUDA driver API reference, and cuda.h for the numbers below.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

LIBRARY = "libcuda.so.1"

_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_CAPTURE_MODE_THREAD_LOCAL = 1  # CUstreamCaptureMode: other threads of the process may go on allocating
_NAME_LENGTH = 128


class DriverError(RuntimeError):
    """The driver is missing, or a call failed. The message is one line."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver describes it; `memory` in bytes."""

    name: str
    compute_capability: tuple[int, int]
    memory: int

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.compute_capability[0]}{self.compute_capability[1]})"


class CudaDriver:
    """The loaded and initialised driver.

    Raises:
        DriverError: no driver, no GPU that it may use, or a failed call.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError:
            raise DriverError(f"no CUDA driver ({LIBRARY} is not there)") from None
        self.call("cuInit", ctypes.c_uint(0))

    def call(self, function: str, *arguments: object) -> None:
        """Call a function of the driver that returns a CUresult; arguments are ctypes values."""
        result: int = getattr(self._library, function)(*arguments)
        if result:
            name = ctypes.c_char_p()
            self._library.cuGetErrorName(ctypes.c_int(result), ctypes.byref(name))
            raise DriverError(f"the CUDA driver says {(name.value or b'?').decode()} ({result}) to {function}")

    def version(self) -> str:
        """Newest CUDA version that the driver runs, as "12.6"."""
        number = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(number))
        return f"{number.value // 1000}.{number.value % 1000 // 10}"

    def gpus(self) -> tuple[Gpu, ...]:
        count = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        return tuple(self._gpu(ordinal) for ordinal in range(count.value))

    def _gpu(self, ordinal: int) -> Gpu:
        device, memory = self._device(ordinal), ctypes.c_size_t()
        name = ctypes.create_string_buffer(_NAME_LENGTH)
        self.call("cuDeviceGetName", name, ctypes.c_int(_NAME_LENGTH), device)
        self.call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        major, minor = (
            self._attribute(device, attribute) for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR)
        )
        return Gpu(name.value.decode(errors="replace"), (major, minor), memory.value)

    def _device(self, ordinal: int) -> ctypes.c_int:
        device = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal))
        return device

    def _attribute(self, device: ctypes.c_int, attribute: int) -> int:
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), device)
        return value.value

    def use(self, ordinal: int) -> None:
        """Make a GPU's primary context the current one of this thread: CUDA's libraries then work on that GPU."""
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device(ordinal))
        self.call("cuCtxSetCurrent", context)

    def begin_capture(self, stream: int) -> None:
        """Record what is put on a stream from now on, instead of running it."""
        self.call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), ctypes.c_int(_CAPTURE_MODE_THREAD_LOCAL))

    def end_capture(self, stream: int) -> CudaGraph:
        """End the recording and make it launchable.

        Raises:
            DriverError: something on the stream could not be recorded; the stream is usable again.
        """
        graph, launchable = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        try:
            self.call("cuGraphInstantiateWithFlags", ctypes.byref(launchable), graph, ctypes.c_ulonglong(0))
        finally:
            self.call("cuGraphDestroy", graph)
        return CudaGraph(self, launchable)


class CudaGraph:
    """What was recorded of a stream; runs as one launch."""

    def __init__(self, driver: CudaDriver, handle: ctypes.c_void_p):
        self._driver, self._handle = driver, handle

    def launch(self, stream: int) -> None:
        self._driver.call("cuGraphLaunch", self._handle, ctypes.c_void_p(stream))

    def close(self) -> None:
        self._driver.call("cuGraphExecDestroy", self._handle)
