"""Pairing: which thermal picture goes with which visible one. Pure: no threads and no clock of its own.

Camera b (visible) is the master: each of its pictures comes out once, in order, with the picture of camera a (thermal)
that is nearest in time. Frames are put in as they arrive, and `next` is asked with the time of now:

    pairer = Pairer(Pairing(clock_offset_ms=-80))
    pairer.add_a(thermal); pairer.add_b(visible)
    while (pair := pairer.next(time.monotonic())) is not None: ...

With cameras of 30 and 9 frames/s three of four pictures meet a thermal one that was used before (`reused`). A picture
waits for a nearer partner no longer than `hold_ms`, and only where the thermal camera's rhythm says that one will come.
Thermal pictures wait as long as they can be of use: a network camera's picture comes later than that of a USB core.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal, NamedTuple, get_args

from runtime.errors import InputError
from runtime.frames import Frame, State

OnMissing = Literal["hold", "pass", "skip"]

# A stamp that goes back further than this is a clock that was set, and not a picture that came late, in seconds.
CLOCK_SET = 1.0
_SLACK = 1.5  # intervals that a picture may wait beyond `hold_ms` for the loop
_INTERVALS = 9  # of which the median is a camera's rhythm
_AWAY_INTERVALS = 3  # a camera that is slower than `max_age_ms` is away after so many of its intervals
_FIRST_INTERVAL = 2.0  # seconds that a camera has for its second picture
_MOST_WAITING = 64  # pictures of a camera, however fast it is


@dataclass(frozen=True)
class Pairing:
    """The knobs of pairing.

    Attributes:
        max_skew_ms: two pictures further apart than this are no pair.
        hold_ms: how long a picture may wait for a nearer partner, from its arrival; one to one `max_age_ms` longer.
        max_age_ms: with on_missing "hold", how far the last thermal picture may be from the visible one that it is
            used for; and after how long without a picture a camera counts as away.
        queue_size: pictures of each camera that may wait; the oldest is dropped, earlier where the loop is too slow.
            Where it is too small for that, as many wait as come within `hold_ms`, and of the thermal camera within
            `max_age_ms` besides.
        clock_offset_ms: is added to the thermal camera's times. Negative where its clock is ahead of the visible one's.
        on_missing: what happens to a visible picture without a thermal one. "hold": the last thermal picture is used on
            until it is too old, then as "pass". "pass": the visible one passes alone. "skip": nothing comes out.
        one_to_one: use each picture once only, which gives the rate of the slower camera and the smallest skew. Where
            nothing fits for `max_age_ms`, `on_missing` says what happens.

    Raises:
        InputError: a number or word that makes no sense.
    """

    max_skew_ms: float = 100.0
    hold_ms: float = 40.0
    max_age_ms: float = 500.0
    queue_size: int = 4
    clock_offset_ms: float = 0.0
    on_missing: OnMissing = "hold"
    one_to_one: bool = False

    def __post_init__(self) -> None:
        for name in ("max_skew_ms", "hold_ms", "max_age_ms"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} is {value:g}; give milliseconds, 0 or more")
        if not math.isfinite(self.clock_offset_ms):
            raise InputError(f"clock_offset_ms is {self.clock_offset_ms}; give milliseconds")
        if self.max_age_ms < self.max_skew_ms:
            raise InputError(f"max_age_ms ({self.max_age_ms:g}) must not be below max_skew_ms ({self.max_skew_ms:g})")
        if self.queue_size < 1:
            raise InputError(f"queue_size is {self.queue_size}; give 1 or more")
        if self.on_missing not in get_args(OnMissing):
            raise InputError(f"unknown on_missing '{self.on_missing}'; choose from {', '.join(get_args(OnMissing))}")


class Pair(NamedTuple):
    """What goes into one output picture; never are both sides None."""

    a: Frame | None
    b: Frame | None
    state: State
    reused: bool = False

    @property
    def master(self) -> Frame:
        """The picture that sets the time: b's, or a's where that is missing."""
        master = self.b or self.a
        assert master is not None
        return master

    @property
    def skew_ms(self) -> float:
        """Time of a minus time of b in ms, by their stamps; 0 where one is missing."""
        return 1000 * (self.a.time - self.b.time) if self.a and self.b else 0.0


class _Side:
    """The pictures of one camera that wait, and what is known of its rhythm."""

    def __init__(self, queue_size: int):
        self.frames: deque[Frame] = deque()
        self.queue_size = queue_size
        self.ended = False
        self.last_arrival: float | None = None
        self.dropped = self.duplicates = self.late = 0
        self.interval: float | None = None  # s between pictures, by their stamps
        self._intervals: deque[float] = deque(maxlen=_INTERVALS)
        self._last_time: float | None = None

    def add(self, frame: Frame, keep: float) -> None:
        """Put in a picture, and let go of the oldest where more wait than `queue_size` and than come in `keep` s."""
        self.last_arrival = frame.arrival
        if self._last_time is not None:
            step = frame.time - self._last_time
            if step == 0:
                self.duplicates += 1
                return
            if -CLOCK_SET < step < 0:
                self.late += 1
                return
            if step < 0:
                self.dropped += len(self.frames)
                self.frames.clear()
                self._intervals.clear()
            else:
                self._intervals.append(step)
                self.interval = median(self._intervals)
        self._last_time = frame.time
        within = math.ceil(keep / self.interval) if self.interval else 0
        if len(self.frames) >= max(self.queue_size, min(within, _MOST_WAITING)):
            self.frames.popleft()
            self.dropped += 1
        self.frames.append(frame)

    def away_at(self, seconds: float) -> float | None:
        """When it counts as away if nothing comes any more: after so many seconds, later for a slow camera."""
        if self.last_arrival is None:
            return None
        rhythm = _FIRST_INTERVAL if self.interval is None else _AWAY_INTERVALS * self.interval
        return self.last_arrival + max(seconds, rhythm)

    def is_away(self, now: float, seconds: float) -> bool:
        at = self.away_at(seconds)
        return self.ended or at is None or now > at


class Pairer:
    """Puts the pictures of two cameras together.

    Args:
        knobs: see `Pairing`; may be replaced while it runs, but for `queue_size`.
        lossless: for recordings that are read as fast as they are used: no picture is dropped and none waits by the
            clock, only until the other recording has come as far. Ask `has_room_a` and `has_room_b` before adding.
    """

    def __init__(self, knobs: Pairing | None = None, *, lossless: bool = False):
        self.knobs = knobs or Pairing()
        self._lossless = lossless
        self._a, self._b = _Side(self.knobs.queue_size + 1), _Side(self.knobs.queue_size)
        self._used_a: Frame | None = None  # the last thermal picture that came out
        self._fitted: float | None = None  # one to one: when two pictures fitted, or the first came
        self.skipped = 0

    def add_a(self, frame: Frame) -> None:
        """Put in a picture of the thermal camera, with the time of its own clock."""
        if self.knobs.clock_offset_ms:
            frame = replace(frame, time=frame.time + self.knobs.clock_offset_ms / 1000)
        self._a.add(frame, (self.knobs.max_age_ms + self.knobs.hold_ms) / 1000)

    def add_b(self, frame: Frame) -> None:
        """Put in a picture of the visible camera."""
        self._b.add(frame, self._longest_wait())

    def end_a(self) -> None:
        """Camera a gives no more pictures."""
        self._a.ended = True

    def end_b(self) -> None:
        """Camera b gives no more pictures."""
        self._b.ended = True

    def has_room_a(self) -> bool:
        """Whether a picture can be added without one being dropped."""
        return len(self._a.frames) < self._a.queue_size

    def has_room_b(self) -> bool:
        """Whether a picture can be added without one being dropped."""
        return len(self._b.frames) < self._b.queue_size

    @property
    def ended(self) -> bool:
        """Whether neither camera gives any more pictures."""
        return self._a.ended and self._b.ended

    def next(self, now: float) -> Pair | None:
        """The next pair that is ready, or None; ask until there is none.

        Args:
            now: time on the clock of `Frame.arrival`, in seconds.
        """
        pair = self._next_one_to_one(now) if self.knobs.one_to_one else self._next(now)
        return pair or self._a_alone(now)

    def due(self, now: float) -> float | None:
        """When after `now` `next` may give something though nothing more is put in; None: never."""
        if self._lossless:
            return None
        waiting = self._a if self.knobs.one_to_one else self._b
        times = [frame.arrival + self._longest_wait() for frame in list(waiting.frames)[:1]]
        times += [at for side in (self._a, self._b) if (at := side.away_at(self.knobs.max_age_ms / 1000)) is not None]
        return min((time for time in times if time > now), default=None)

    def counters(self) -> dict[str, int]:
        """Pictures that were dropped from a full queue, came twice, came too late to be sorted in, or were skipped."""
        a, b = self._a, self._b
        return {
            "dropped_a": a.dropped,
            "dropped_b": b.dropped,
            "duplicates_a": a.duplicates,
            "duplicates_b": b.duplicates,
            "late_a": a.late,
            "late_b": b.late,
            "skipped": self.skipped,
        }

    def _next(self, now: float) -> Pair | None:
        frames_a, frames_b = self._a.frames, self._b.frames
        self._leave_out_stale(now)
        while frames_b:
            b = frames_b[0]
            # Times rise, so a picture that is followed by one before b is no longer the nearest of any.
            while len(frames_a) > 1 and frames_a[1].time <= b.time:
                frames_a.popleft()
            if self._should_wait(self._a, b, now):
                return None
            frames_b.popleft()
            pair = self._with_partner(b)
            if pair.state == "a_missing" and self.knobs.on_missing == "skip":
                self.skipped += 1
                continue
            return pair
        return None

    def _leave_out_stale(self, now: float) -> None:
        """Where the loop is slower than the master, go on with newer pictures rather than with the queue's oldest."""
        if self._lossless or self._b.interval is None:
            return
        longest = self.knobs.hold_ms / 1000 + _SLACK * self._b.interval
        frames = self._b.frames
        while len(frames) > 1 and now - frames[0].arrival > longest:
            frames.popleft()
            self._b.dropped += 1

    def _with_partner(self, b: Frame) -> Pair:
        a = min(self._a.frames, key=lambda frame: abs(frame.time - b.time), default=None)
        if a is None:
            return Pair(None, b, "a_missing")
        apart = 1000 * abs(a.time - b.time)
        reused = a is self._used_a
        if apart <= self.knobs.max_skew_ms:
            self._used_a = a
            return Pair(a, b, "fused", reused)
        if self.knobs.on_missing == "hold" and apart <= self.knobs.max_age_ms:
            self._used_a = a
            return Pair(a, b, "held", reused)
        return Pair(None, b, "a_missing")

    def _next_one_to_one(self, now: float) -> Pair | None:
        a, b, knobs = self._a, self._b, self.knobs
        if self._fitted is None:
            self._fitted = now
        while a.frames and b.frames:
            first = a.frames[0]
            while len(b.frames) > 1 and b.frames[1].time <= first.time:
                b.frames.popleft()
            if self._should_wait(b, first, now):
                return None
            nearest = min(b.frames, key=lambda frame: abs(frame.time - first.time))
            if self._lossless and len(a.frames) == 1 and not a.ended:
                return None
            following = self._after_first(a)
            if abs(following - nearest.time) < abs(first.time - nearest.time):
                # Each the other's nearest: else a lost picture would shift all that come after it by one.
                a.frames.popleft()
                self.skipped += 1
                continue
            if 1000 * abs(nearest.time - first.time) <= knobs.max_skew_ms:
                while b.frames.popleft() is not nearest:
                    pass
                self._used_a = a.frames.popleft()
                self._fitted = now
                return Pair(self._used_a, nearest, "fused")
            older = a if first.time < nearest.time else b
            left = older.frames.popleft()
            waited = not self._lossless and now - self._fitted > knobs.max_age_ms / 1000
            if older is b and waited and knobs.on_missing != "skip":
                return Pair(None, left, "a_missing")
            self.skipped += 1
        if b.frames and (a.ended if self._lossless else a.is_away(now, knobs.max_age_ms / 1000)):
            if knobs.on_missing != "skip":
                return Pair(None, b.frames.popleft(), "a_missing")
            self.skipped += len(b.frames)
            b.frames.clear()
        return None

    def _after_first(self, side: _Side) -> float:
        """Time of the picture after a camera's first that waits, by its rhythm where it isn't there yet."""
        if len(side.frames) > 1:
            return side.frames[1].time
        return math.inf if side.ended or side.interval is None else side.frames[0].time + side.interval

    def _should_wait(self, side: _Side, frame: Frame, now: float) -> bool:
        """Whether a picture of `side` that is yet to come may be a nearer partner of `frame`."""
        newest = side.frames[-1] if side.frames else None
        if side.ended or (newest is not None and newest.time >= frame.time):
            return False
        if self._lossless:
            return True
        deadline = frame.arrival + self._longest_wait()
        if now >= deadline or side.is_away(now, self.knobs.max_age_ms / 1000):
            return False
        if newest is None or side.interval is None:
            return True
        is_nearer = newest.time + side.interval - frame.time < frame.time - newest.time
        ahead = frame.time - newest.time if self.knobs.one_to_one else side.interval
        return is_nearer and newest.arrival + ahead <= deadline

    def _longest_wait(self) -> float:
        """Seconds that a picture may wait for a partner; one to one it waits for a camera that comes later, too."""
        return (self.knobs.hold_ms + (self.knobs.max_age_ms if self.knobs.one_to_one else 0)) / 1000

    def _a_alone(self, now: float) -> Pair | None:
        """The thermal picture alone, while the master is away."""
        if self._b.frames or not (self._b.ended if self._lossless else self._is_master_away(now)):
            return None
        frames = self._a.frames
        fresh = [frame for frame in frames if self._used_a is None or frame.index > self._used_a.index]
        if not fresh:
            return None
        # Those that came before the master was known to be away are late already.
        frame = fresh[0] if self._lossless else fresh[-1]
        while frames[0] is not frame:
            frames.popleft()
        self._used_a = frame  # it stays, for the master's first picture when that is back
        if self.knobs.one_to_one:
            frames.popleft()
        if self.knobs.on_missing == "skip":
            self.skipped += 1
            return None
        return Pair(frame, None, "b_missing")

    def _is_master_away(self, now: float) -> bool:
        seconds = self.knobs.max_age_ms / 1000
        if self._b.last_arrival is None and not self._b.ended:  # not there yet: give it as long as to one that stopped
            return bool(self._a.frames) and now - self._a.frames[0].arrival > seconds
        return self._b.is_away(now, seconds)
