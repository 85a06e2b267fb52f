"""What the page shows: the newest frame as JPEG, its latency, and a status where the stream gives none."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.color import apply_tone, chroma, compose, is_grey
from runtime.frames import Frame, FusedFrame
from runtime.health import CameraHealth, EventLog
from runtime.status import Recent, StreamHealth

JPEG_QUALITY = 85
LONG_POLL = 5.0  # seconds that somebody waits for the next frame before asking again
SOURCE_WIDTH = 480  # pixels; sources are shown smaller than the fused picture
PICTURES = ("fused", "a", "b")


class Shown:
    """One frame as the page shows it. A picture is encoded when it is first asked for, so that nobody's page is free.

    Attributes:
        number: 1 for the first frame that the page got.
        frame: the frame.
    """

    def __init__(self, number: int, frame: FusedFrame):
        self.number = number
        self.frame = frame
        self._lock = threading.Lock()
        self._jpegs: dict[str, bytes] = {}

    def jpeg(self, name: str) -> bytes:
        """The picture "fused", "a" or "b" as JPEG; empty where that source is missing."""
        with self._lock:
            if name not in self._jpegs:
                self._jpegs[name] = self._encode(name)
            return self._jpegs[name]

    def _encode(self, name: str) -> bytes:
        if name == "fused":
            return _jpeg(self.frame.image)
        source = self.frame.a if name == "a" else self.frame.b
        return b"" if source is None else _jpeg(preview(source.image))


def preview(image: np.ndarray, width: int = SOURCE_WIDTH) -> NDArray[np.uint8]:
    """A source at most `width` wide, 8 bits; raw thermal counts by their percentiles 1 and 99."""
    if image.shape[1] > width:
        size = (width, max(round(image.shape[0] * width / image.shape[1]), 1))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    if image.dtype == np.uint8:
        return image
    return compose(apply_tone(image, "percentile"), None if is_grey(image) else chroma(image))


def _jpeg(image: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


class Live:
    """The newest frame, and how old frames are when they get here. Any thread may ask; one gives frames."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._shown: Shown | None = None
        self._updated = 0.0
        self._latency_ms = Recent()
        self.closed = False

    def update(self, frame: FusedFrame) -> None:
        """Take the next frame."""
        now = time.monotonic()
        master = frame.b or frame.a
        if master is not None:
            self._latency_ms.add(1000 * (now - master.arrival))
        with self._changed:
            self._shown = Shown(self._shown.number + 1 if self._shown else 1, frame)
            self._updated = now
            self._changed.notify_all()

    def wait(self, after: int, timeout: float) -> Shown | None:
        """The newest frame if its number is above `after`, else the next one; None where none comes, or at the end."""

        def newer() -> bool:
            return self._shown is not None and self._shown.number > after

        with self._changed:
            self._changed.wait_for(lambda: self.closed or newer(), timeout)
            return self._shown if newer() and not self.closed else None

    def close(self) -> None:
        """No more frames will come; wakes all who wait."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def silence(self) -> float | None:
        """Seconds since the newest frame, or None before the first."""
        with self._changed:
            return time.monotonic() - self._updated if self._shown else None

    def latency_ms(self) -> dict[str, float] | None:
        """p50 and p95 of the time from the arrival of the master camera's picture to here; None before the first."""
        values = self._latency_ms.values()
        if not len(values):
            return None
        p50, p95 = np.percentile(values, (50, 95))
        return {"p50": round(float(p50), 1), "p95": round(float(p95), 1)}


class OwnStatus:
    """The status of frames that come without a stream's own: the same keys, from the frames alone."""

    def __init__(self) -> None:
        events = EventLog()
        self._output = StreamHealth(events)
        self._events = events
        self._cameras: dict[str, CameraHealth] = {}
        self._seen: dict[str, float] = {}  # arrival of each camera's newest picture

    def update(self, frame: FusedFrame) -> None:
        """Take the next frame."""
        skew = frame.skew_ms if frame.a and frame.b else None
        self._output.output(frame.state, frame.age_ms, skew, frame.reused, frame.stages)
        for side, source in (("a", frame.a), ("b", frame.b)):
            if source is not None and self._seen.get(side) != source.arrival:
                self._seen[side] = source.arrival
                self._camera(side, source).seen(source)

    def snapshot(self) -> dict[str, Any]:
        """What `Stream.status` gives."""
        now = time.monotonic()
        for camera in list(self._cameras.values()):
            camera.look(now)
        self._output.look(now)
        sources = {side: {**camera.snapshot(now), "dropped": 0} for side, camera in list(self._cameras.items())}
        return {**self._output.snapshot(now), "sources": sources, "sinks": []}

    def _camera(self, side: str, source: Frame) -> CameraHealth:
        if side not in self._cameras:
            self._cameras[side] = CameraHealth(source.source, partial(self._events.add, source.source))
        return self._cameras[side]
