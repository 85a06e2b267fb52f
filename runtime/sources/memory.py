"""`shm://`: pictures of another process in shared memory; the layout is that of `runtime.shm`."""

from __future__ import annotations

import threading
import time

from runtime.errors import InputError
from runtime.shm import ShmReader
from runtime.sources.base import Capture, Source, SourceLostError
from runtime.uri import Options

_POLL = 0.2  # seconds that a wait for a picture may take before the end of the stream is looked for
_STALE = 1.0  # seconds after which a picture that was there before us is none that the sender gives now


def open_shm(uri: str, address: str, options: Options, queue_size: int) -> Source:
    """A segment of shared memory: `shm://thermal`. Its writer's times are taken.

    Options:
        wait: seconds that the writer may take to appear, 5 by default.

    Raises:
        InputError: a bad name or option.
    """
    wait = options.number("wait", 5, 0, 3600)
    options.done()
    ShmReader(address).close()  # a bad name is told before a thread begins
    return Source(uri, lambda: SharedMemory(address, wait), queue_size=queue_size)


class SharedMemory:
    """Pictures of a `runtime.shm.ShmWriter`."""

    def __init__(self, name: str, wait: float):
        self.corrupt = 0
        self._name, self._wait = name, wait
        self._reader = ShmReader(name)
        self._first: Capture | None = None

    def open(self, stop: threading.Event) -> None:
        self._stop = stop
        self._first = self._next(self._wait)
        if self._first is not None and not 0 <= time.time() - (self._first.time or 0) <= _STALE:
            self._first = self._next(self._wait)  # the sender may stand still, or have died
        if self._first is None:
            raise InputError(f"shm://{self._name}: nobody writes it; start the sender first, or give it time (?wait=)")

    def read(self) -> Capture | None:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        while not self._stop.is_set():
            capture = self._next(_POLL)
            if capture is not None:
                return capture
            if self._reader.ended:
                raise SourceLostError(f"shm://{self._name}: the sender ended")
        return None

    def close(self) -> None:
        self._reader.close()

    def _next(self, seconds: float) -> Capture | None:
        left = seconds
        while not self._stop.is_set():
            frame = self._reader.read(min(left, _POLL))
            if frame is not None:
                return Capture(frame.image, frame.time, "device")
            left -= _POLL
            if left <= 0:
                return None
        return None
