"""Health of cameras: who is silent, frozen, lost or back; the watchdog that notices, and how reconnecting waits.

`CameraHealth` is fed by the camera's own thread and looked at by a watchdog with a thread of its own, so that a camera
that sends nothing is noticed though the thread that reads it is stuck in a read. It has no clock: times are given.
"""

from __future__ import annotations

import logging
import queue
import statistics
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.frames import Frame

SILENT_AFTER = 1.0  # seconds without a picture; longer for cameras that are slower than that
FIRST_AFTER = 4.0  # the same for the first picture after opening, which may have to wait for a key frame
SILENT_INTERVALS = 4  # so many of the camera's intervals are a silence
FROZEN_AFTER = 3.0  # seconds of pictures that are equal to the last bit
FROZEN_FRAMES = 10  # and at least so many of them
CLOCK_JUMP = 0.5  # seconds that a stamp may move against the time of arrival
EVENTS_KEPT = 200
LISTENER_TIMEOUT = 2.0  # seconds that a listener may take for the last events
TICK = 0.2  # seconds between two looks of the watchdog
_SIGNATURE_STEP = 8  # every 8th row and column makes a picture's signature

log = logging.getLogger("refusion")

# Of each camera; `dropped` comes from its queue.
COUNTERS = (
    "frames",
    "corrupt",
    "silences",
    "freezes",
    "losses",
    "reconnects",
    "clock_jumps",
    "clock_refused",
    "size_changes",
)


@dataclass(frozen=True)
class Event:
    """Something happened to a camera, or to the stream.

    Attributes:
        time: Unix time in seconds.
        source: the camera's name, or "stream".
        kind: "open", "silent", "frozen", "ok" (after one of the last two), "lost", "reconnected", "clock_jump",
            "size_changed", "ended"; or, of the stream, the state that its pictures have from now on.
        detail: a line for people.
    """

    time: float
    source: str
    kind: str
    detail: str = ""


class EventLog:
    """The last events, in order; other threads may add and read.

    Args:
        listener: called with each from `start` on, earlier ones first, in a thread of its own: it may take its time,
            fail, and ask for the status.
    """

    def __init__(self, listener: Callable[[Event], None] | None = None):
        self._events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._listener = listener
        self._untold: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._tell, name="events", daemon=True)

    def start(self) -> None:
        """Begin to tell the listener; not before everything is open, where one line says what is wrong."""
        if self._listener is not None:
            self._thread.start()

    def add(self, source: str, kind: str, detail: str = "") -> None:
        """Note an event; never waits."""
        event = Event(time.time(), source, kind, detail)
        self._events.append(event)
        if self._listener is not None:
            self._untold.put(event)

    def close(self) -> None:
        """Tell the listener what it wasn't told yet, and end its thread."""
        self._untold.put(None)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(LISTENER_TIMEOUT)

    def _tell(self) -> None:
        assert self._listener is not None
        while (event := self._untold.get()) is not None:
            try:
                self._listener(event)
            except Exception:  # it is somebody else's, and the next event is another one
                log.exception("the listener of events failed")

    def events(self) -> list[Event]:
        """The last EVENTS_KEPT events, oldest first."""
        return list(self._events)


def signature(image: np.ndarray) -> int:
    """Checksum of every 8th row and column: equal for equal pictures, and a camera's noise changes it every time."""
    return zlib.crc32(np.ascontiguousarray(image[::_SIGNATURE_STEP, ::_SIGNATURE_STEP]).data)


class CameraHealth:
    """State and counters of one camera.

    States: "opening", "ok", "silent" (nothing comes), "frozen" (always the same picture), "lost" (the connection
    broke; it is tried again), "ended" (a recording came to its end).

    Args:
        name: of the camera, without user and password.
        report: called with the kind and the detail of every event; may be replaced.
    """

    def __init__(self, name: str, report: Callable[[str, str], None]):
        self.name = name
        self.state = "opening"
        self.reason = ""
        self.counters: Counter[str] = Counter()
        self.report = report
        self._lock = threading.RLock()  # between the camera's thread and the watchdog's; never the stream's
        self._last: Frame | None = None
        self._stamp: tuple[float, float] | None = None  # the camera's own, and its picture's arrival
        self._since: float | None = None  # arrival of the last picture, or when it was opened or lost
        self._is_new = True  # no picture came since it was opened
        self._intervals: deque[float] = deque(maxlen=30)
        self._signature: int | None = None
        self._same_since, self._same_frames = 0.0, 0

    @property
    def interval(self) -> float | None:
        """Median of the last seconds between pictures, by arrival."""
        return statistics.median(self._intervals) if self._intervals else None

    def opened(self, now: float) -> None:
        """The source was opened, for the first time or again."""
        with self._lock:
            again = self.counters["opened"] > 0
            self.counters["opened"] += 1
            self.counters["reconnects"] += again
            self._since, self._is_new = now, True
            self._signature = self._stamp = None
            if not again:
                self._set("ok", "open", "")
            elif self.state != "ok":
                self._set("ok", "reconnected", "")

    def lost(self, reason: str, now: float) -> None:
        """The connection broke, or could not be made again."""
        with self._lock:
            self.counters["losses"] += 1
            self._since = now
            is_news = self.state != "lost" or reason != self.reason
            self.state, self.reason = "lost", reason
            if is_news:
                self.report("lost", reason)

    def ended(self, reason: str = "") -> None:
        """The recording is at its end, or can't be read further for this reason."""
        with self._lock:
            self._set("ended", "ended", reason)

    def corrupt(self, count: int = 1) -> None:
        """Pictures came that can't be used."""
        with self._lock:
            self.counters["corrupt"] += count

    def clock_refused(self) -> None:
        """A stamp was so far off that the time of arrival was taken."""
        with self._lock:
            self.counters["clock_refused"] += 1

    def seen(self, frame: Frame, stamp: float | None = None) -> None:
        """A picture came, with this stamp of the camera's clock, whether it was believed or not."""
        with self._lock:
            self.counters["frames"] += 1
            last, self._last, self._since = self._last, frame, frame.arrival
            if last is not None and not self._is_new:
                self._intervals.append(frame.arrival - last.arrival)
            self._is_new = False
            self._check_clock(frame, stamp)
            if last is not None and frame.image.shape[:2] != last.image.shape[:2]:
                self.counters["size_changes"] += 1
                self.report("size_changed", f"from {_size(last.image)} to {_size(frame.image)}")
            is_frozen = self._is_frozen(frame)
            if is_frozen and self.state != "frozen":
                self.counters["freezes"] += 1
                self._set("frozen", "frozen", f"the same picture for {frame.arrival - self._same_since:.1f} s")
            elif not is_frozen and self.state != "ok":
                self._set("ok", "ok", f"after {self.state}")

    def look(self, now: float) -> float:
        """Notice a silence; returns the seconds by which it is longer than the camera's pictures may take, or 0."""
        with self._lock:
            if self._since is None or self.state in ("opening", "lost", "ended"):
                return 0.0
            seconds = now - self._since
            # Until its rhythm is known a camera has as long as for its first picture.
            patience = FIRST_AFTER if self._is_new or self.interval is None else SILENT_AFTER
            limit = max(patience, SILENT_INTERVALS * (self.interval or 0))
            if seconds > limit and self.state != "silent":
                self.counters["silences"] += 1
                self._set("silent", "silent", f"no picture for {seconds:.1f} s")
            return seconds - limit if self.state == "silent" else 0.0

    def snapshot(self, now: float) -> dict[str, Any]:
        """State, rate and counters, for JSON."""
        with self._lock:
            interval, last = self.interval, self._last
            return {
                "name": self.name,
                "state": self.state,
                "reason": self.reason,
                "fps": round(1 / interval, 2) if interval and self.state in ("ok", "frozen") else 0.0,
                "size": _size(last.image) if last else None,
                "depth": last.image.dtype.itemsize * 8 if last else None,
                "clock": last.clock if last else None,
                "seconds_since_picture": round(now - last.arrival, 3) if last else None,
                **{name: self.counters[name] for name in COUNTERS},
            }

    def _set(self, state: str, kind: str, detail: str) -> None:
        self.state = state
        self.reason = detail if state != "ok" else ""
        self.report(kind, detail)

    def _check_clock(self, frame: Frame, stamp: float | None) -> None:
        last, self._stamp = self._stamp, None if stamp is None else (stamp, frame.arrival)
        if last is None or stamp is None or self.state != "ok":
            return
        jump = (stamp - last[0]) - (frame.arrival - last[1])
        if abs(jump) > CLOCK_JUMP:
            self.counters["clock_jumps"] += 1
            self.report("clock_jump", f"its clock moved by {jump:+.2f} s")

    def _is_frozen(self, frame: Frame) -> bool:
        mark = signature(frame.image)
        if mark != self._signature:
            self._signature, self._same_since, self._same_frames = mark, frame.arrival, 1
            return False
        self._same_frames += 1
        return self._same_frames >= FROZEN_FRAMES and frame.arrival - self._same_since >= FROZEN_AFTER


class Watchdog:
    """A thread that looks at every camera a few times a second, whatever their own threads wait for.

    Args:
        looks: called with `time.monotonic()` at every look.
    """

    def __init__(self, looks: Sequence[Callable[[float], object]]):
        self._looks = looks
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(TICK):
            for look in self._looks:
                try:
                    look(time.monotonic())
                except Exception:  # one camera's trouble must not end the watch over the others
                    log.exception("the watchdog failed")


class Backoff:
    """Seconds to wait before the next try: 0.5, 1, 2, 4, 8, 8, ...; from the start again after a success."""

    FIRST, LAST = 0.5, 8.0

    def __init__(self) -> None:
        self._next = self.FIRST

    def next(self) -> float:
        seconds, self._next = self._next, min(2 * self._next, self.LAST)
        return seconds

    def reset(self) -> None:
        self._next = self.FIRST


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
