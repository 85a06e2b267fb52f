"""A source: one thread that reads a camera, and a bounded queue that drops the oldest.

A kind of camera is a `Reader`: open, read, close, called by one thread. `Source` gives each of its pictures a time on
the common clock, a place in the queue and a look at the camera's health, and opens the reader again when it was lost.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, NamedTuple, Protocol

import numpy as np

from runtime.color import check_image
from runtime.errors import InputError
from runtime.frames import Clock, Frame
from runtime.health import Backoff, CameraHealth

OPEN_TIMEOUT = 15.0  # seconds that the first opening may take
REOPEN_AFTER = 2.0  # seconds that a silence may last on, before a reader that is stuck is left behind for a new one
MAX_STUCK = 2  # readers left behind that are still stuck; while there are as many no new one is started
CLOSE_TIMEOUT = 3.0  # seconds that `close` waits for a read to return
EXIT_TIMEOUT = 15.0  # and the end of the process, which would abort in a decoder's code otherwise
# A stamp is believed while the fastest picture of the last seconds took this long from the camera to here, in seconds.
FASTEST_DELAY = (-0.5, 2.0)
DELAY_WINDOW = 5.0

log = logging.getLogger("refusion")
_sources: weakref.WeakSet[Source] = weakref.WeakSet()  # those whose thread was started


class SourceLostError(Exception):
    """A camera that was there gives nothing more: a broken connection, a device that was unplugged."""


class Capture(NamedTuple):
    """A picture as a reader gives it: HxW or HxWx3 (BGR), uint8 or uint16, with the Unix time of capture, if known."""

    image: np.ndarray
    time: float | None = None
    clock: Clock = "arrival"


class Reader(Protocol):
    """A kind of camera. All three are called by the same thread.

    Attributes:
        corrupt: pictures that could not be decoded, so far.
    """

    corrupt: int

    def open(self, stop: threading.Event) -> None:
        """Open it.

        Args:
            stop: set when this reader is to end; who waits for anything long should wait for it as well.

        Raises:
            InputError: it can't be opened: missing, refused, of a kind that can't be read.
        """

    def read(self) -> Capture | None:
        """Wait for the next picture; None at the end of a recording.

        Raises:
            SourceLostError: the connection broke.
        """

    def close(self) -> None:
        """Let go of everything; also called where `open` failed."""


class Playback:
    """The clock on which recordings are laid, shared by both sources of a stream. It begins when it is first asked.

    Attributes:
        round_seconds: after which recordings that are played again and again begin again, all at once.
    """

    def __init__(self) -> None:
        self._start: tuple[float, float] | None = None  # Unix and monotonic seconds
        self._zero: float | None = None
        self.round_seconds = 0.0
        self._lock = threading.Lock()

    @property
    def unix(self) -> float:
        """Unix time at which the playback began, in seconds."""
        return self._begun()[0]

    def wait(self, seconds: float, stop: threading.Event) -> None:
        """Wait until so many seconds after the beginning, or until `stop` is set."""
        left = self._begun()[1] + seconds - time.monotonic()
        if left > 0:
            stop.wait(left)

    def has_round_of(self, seconds: float) -> None:
        """A recording of this length is played again and again; the longest sets the pace of all."""
        self.round_seconds = max(self.round_seconds, seconds)

    def zero(self, recorded: float) -> float:
        """The Unix time, in recordings that have such times, that is the beginning: that of whoever asks first."""
        with self._lock:
            if self._zero is None:
                self._zero = recorded
            return self._zero

    def _begun(self) -> tuple[float, float]:
        with self._lock:
            if self._start is None:
                self._start = time.time(), time.monotonic()
            return self._start


class StampCheck:
    """Whether a camera's clock can be believed: many cameras never had theirs set.

    A stamp is older than its picture's arrival by the delay on the way, of which the shortest of the last seconds tells
    a wrong clock from a slow way. A picture that was late for once keeps its stamp.
    """

    def __init__(self) -> None:
        self._since = float("-inf")
        self._shortest = self._shortest_before = float("inf")

    def believes(self, captured: float, arrived: float) -> bool:
        """Whether to take a stamp (Unix seconds) of a picture that arrived then (Unix seconds)."""
        if not self._since <= arrived < self._since + DELAY_WINDOW:
            is_next = self._since <= arrived < self._since + 2 * DELAY_WINDOW
            self._shortest_before = self._shortest if is_next else float("inf")
            self._since, self._shortest = arrived, float("inf")
        self._shortest = min(self._shortest, arrived - captured)
        lowest, highest = FASTEST_DELAY
        return lowest <= min(self._shortest, self._shortest_before) <= highest


class Source:
    """One camera or recording, read by a thread of its own.

    Args:
        name: for people; holds no user and no password.
        make_reader: makes a reader, whenever the source is opened.
        live: it is opened again when it was lost; a recording is at its end then.
        lossless: the reader waits where the queue is full, instead of the oldest picture being dropped.
        queue_size: pictures that may wait to be taken.
        secrets: texts that are cut out of every message.

    Attributes:
        health: state and counters.
        wake: set whenever something changed; the stream's loop waits for it. May be replaced before `start`.
    """

    def __init__(
        self,
        name: str,
        make_reader: Callable[[], Reader],
        *,
        live: bool = True,
        lossless: bool = False,
        queue_size: int = 4,
        secrets: Sequence[str] = (),
    ):
        self.name, self.live, self.lossless = name, live, lossless
        self.wake = threading.Event()
        self.health = CameraHealth(name, lambda kind, detail: None)
        self._make_reader = make_reader
        self._secrets = [secret for secret in secrets if secret]
        self._queue: deque[Frame] = deque(maxlen=None if lossless else queue_size)
        self._room = threading.Semaphore(queue_size)
        self._received = self._taken = 0
        self._stop = threading.Event()  # of the thread that reads now; an older one's is set
        self._opened = threading.Event()
        self._failure: InputError | None = None
        self._threads: list[threading.Thread] = []
        self._finished = False
        self._opening_since = float("inf")
        self._stamps = StampCheck()

    @property
    def ended(self) -> bool:
        """Whether it is a recording at its end, and every picture of it was taken."""
        return self._finished and not self._queue

    @property
    def has_picture(self) -> bool:
        """Whether one waits to be taken."""
        return bool(self._queue)

    @property
    def dropped(self) -> int:
        """Pictures that were pushed out of the queue."""
        return max(self._received - self._taken - len(self._queue), 0)

    def begin(self) -> None:
        """Begin to open it, in its own thread; `wait_opened` tells how that went."""
        self._start_thread()

    def wait_opened(self) -> None:
        """Wait until it is open.

        Raises:
            InputError: it can't be opened, or takes too long.
        """
        if not self._opened.wait(OPEN_TIMEOUT):
            raise InputError(f"{self.name} did not open within {OPEN_TIMEOUT:.0f} s; is the camera on?")
        if self._failure is not None:
            raise self._failure

    def start(self) -> None:
        """Open it and wait until it is open.

        Raises:
            InputError: it can't be opened, or takes too long.
        """
        self.begin()
        self.wait_opened()

    def take(self) -> Frame | None:
        """The oldest picture that waits, or None. For one thread, the stream's."""
        try:
            frame = self._queue.popleft()
        except IndexError:
            return None
        self._taken += 1
        if self.lossless:
            self._room.release()
        return frame

    def look(self, now: float) -> None:
        """Called by the watchdog: notice a silence, and leave behind a reader that is stuck in it, or in opening."""
        if self.lossless:  # it waits for the stream, not the stream for it
            return
        silent = self.health.look(now) > REOPEN_AFTER
        is_stuck = self._opened.is_set() and now - self._opening_since > OPEN_TIMEOUT
        if self.live and (silent or is_stuck):
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            if len(self._threads) <= MAX_STUCK:
                self.health.lost("no picture came; opening it again" if silent else "opening it takes too long", now)
                self._start_thread()

    def snapshot(self, now: float) -> dict[str, Any]:
        """Health, drops and the queue's length, for JSON."""
        return {**self.health.snapshot(now), "dropped": self.dropped, "queued": len(self._queue)}

    def close(self, timeout: float = CLOSE_TIMEOUT) -> bool:
        """End the thread; gives False where it is still stuck in a read, after which it ends."""
        self._stop.set()
        self._room.release()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
        return not any(thread.is_alive() for thread in self._threads)

    def _start_thread(self) -> None:
        """Begin to read in a new thread; the one before ends as soon as its read returns."""
        self._stop.set()
        self._stop = threading.Event()
        self._opening_since = float("inf")
        thread = threading.Thread(target=self._run, args=(self._stop,), name=f"source {self.name}", daemon=True)
        self._threads.append(thread)
        _sources.add(self)
        thread.start()

    def _run(self, stop: threading.Event) -> None:
        backoff = Backoff()
        while not stop.is_set():
            try:
                with closing(self._make_reader()) as reader:
                    self._opening_since = time.monotonic()
                    reader.open(stop)
                    if not stop.is_set():
                        self._opening_since = float("inf")
                        self.health.opened(time.monotonic())
                        self._stamps = StampCheck()
                        self._opened.set()
                        self._pump(reader, stop, backoff)
                reason = ""
            except (InputError, SourceLostError) as error:
                reason = self._without_secrets(str(error))
            except Exception as error:  # whatever a driver or decoder raises, the stream goes on without this camera
                reason = self._without_secrets(f"{type(error).__name__}: {' '.join(str(error).split())}")
                log.debug("%s failed", self.name, exc_info=error)
            if stop.is_set() or not self._again(reason):
                return
            self._opening_since = float("inf")
            stop.wait(backoff.next())

    def _again(self, reason: str) -> bool:
        """Whether to open it again, after it came to its end or, with a reason, was lost."""
        if not self._opened.is_set():
            self._failure = InputError(reason)
            self._opened.set()
            return False
        if self.live and reason:
            self.health.lost(reason, time.monotonic())
            return True
        self._finished = True
        self.health.ended(reason)
        self.wake.set()
        return False

    def _pump(self, reader: Reader, stop: threading.Event, backoff: Backoff) -> None:
        """Read until the end."""
        corrupt = 0
        while True:
            capture = reader.read()
            arrival = time.monotonic()
            if stop.is_set() or capture is None:
                return
            if reader.corrupt > corrupt:
                self.health.corrupt(reader.corrupt - corrupt)
                corrupt = reader.corrupt
            try:
                check_image(capture.image)
            except InputError:
                self.health.corrupt()
                continue
            backoff.reset()
            self._put(capture, arrival)

    def _put(self, capture: Capture, arrival: float) -> None:
        captured, clock = self._stamped(capture)
        frame = Frame(capture.image, captured, clock, arrival, self._received, self.name)
        if self.lossless:
            self._room.acquire()
        self._received += 1
        self._queue.append(frame)
        self.health.seen(frame, capture.time if capture.clock in ("device", "ntp") else None)
        self.wake.set()

    def _stamped(self, capture: Capture) -> tuple[float, Clock]:
        if capture.clock == "file" and capture.time is not None:
            return capture.time, "file"
        now = time.time()
        if capture.time is None:
            return now, "arrival"
        if self._stamps.believes(capture.time, now):
            return capture.time, capture.clock
        self.health.clock_refused()
        return now, "arrival"

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


@atexit.register
def _end_threads() -> None:
    for source in list(_sources):
        if not source.close(EXIT_TIMEOUT):
            log.warning("%s is stuck in a read and is left behind", source.name)
