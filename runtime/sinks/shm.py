"""`shm://NAME`: shared memory for another process on this machine; the layout is that of `runtime.shm`."""

from __future__ import annotations

from typing import Any

from runtime.frames import FusedFrame
from runtime.shm import ShmWriter
from runtime.sinks.base import Output
from runtime.sinks.uri import SinkOptions


def open_shm(address: str, options: SinkOptions) -> Output:
    """Open a ring of pictures in shared memory.

    Options:
        slots: pictures that the ring holds, 4 by default.

    Raises:
        InputError: a bad name, or one that is in use.
    """
    slots = options.whole("slots", 4, 2, 256)
    options.done()
    return ShmOutput(address, slots)


class ShmOutput:
    """Writes each frame's picture, time, index and state."""

    def __init__(self, name: str, slots: int):
        self.url = f"shm://{name}"
        self._writer = ShmWriter(name, slots)

    def write(self, frame: FusedFrame) -> None:
        self._writer.write(frame.image, frame.time, frame.index, frame.state)

    def finish(self) -> None:
        self._writer.close()

    def counters(self) -> dict[str, Any]:
        return {}
