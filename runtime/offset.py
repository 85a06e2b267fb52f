"""The offset between two cameras' clocks, from what moves before both.

A motion sensor of each camera: how much its picture changes from frame to frame, over time. Both cameras look at the
same scene, so both sensors rise and fall together, however different the pictures are. The shift at which they agree
best is the offset. Wave a hand before both cameras, irregularly, or turn them by jerks: an even motion looks the same
at several shifts, and is refused, as is a scene in which nothing moves.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from runtime.errors import InputError
from runtime.frames import Frame
from runtime.sources import Playback, open_source, resolve_pair
from runtime.tone import StreamTone

FloatArray = NDArray[np.float64]

LARGEST = 1.0  # seconds: offsets up to this are looked for
STEP = 0.005  # seconds of the common grid
BLOCKS = 8  # of the recording, of which each is left out once for the uncertainty
SHORTEST = 5.0  # seconds of recording
LEAST_CORRELATION = 0.35
CLEARLY_BEST = 1.08  # times as good as the next best shift further than NEIGHBOURHOOD away
NEIGHBOURHOOD = 0.15  # seconds
LEAST_CERTAIN = 0.06  # seconds: an estimate that is less certain is refused
_SIZE = (80, 60)  # (width, height) at which pictures are compared
_SLOW = 1.5  # seconds: what changes more slowly than this (light, traffic) is taken out
_ADVICE = "move something warm and bright before both cameras, irregularly"


@dataclass(frozen=True)
class Offset:
    """A measured offset.

    Attributes:
        seconds: to be added to the thermal camera's times; `Pairing.clock_offset_ms` in ms.
        uncertainty: 95 % of such estimates are within this many seconds.
        correlation: of both motions at that offset, up to 1.
    """

    seconds: float
    uncertainty: float
    correlation: float


class MotionSensor:
    """How much one camera's pictures change, over time."""

    def __init__(self) -> None:
        self._tone = StreamTone("percentile")
        self._last: tuple[float, np.ndarray] | None = None
        self.times: list[float] = []
        self.changes: list[float] = []

    def add(self, frame: Frame) -> None:
        """Look at the next picture."""
        image = self._tone(frame.image, frame.time)
        if image.ndim == 3:
            image = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
        full = 255.0 if image.dtype == np.uint8 else 65535.0
        small = cv2.resize(image, _SIZE, interpolation=cv2.INTER_AREA).astype(np.float32) / np.float32(full)
        small -= small.mean()  # a change of exposure moves the whole picture
        if self._last is not None and frame.time > self._last[0]:
            before, picture = self._last
            # The change happened between both pictures, at a rate that doesn't depend on how far they are apart.
            self.times.append((before + frame.time) / 2)
            self.changes.append(float(np.abs(small - picture).mean()) / (frame.time - before))
        if self._last is None or frame.time > self._last[0]:
            self._last = frame.time, small


def estimate_offset(a: MotionSensor, b: MotionSensor) -> Offset:
    """The offset to add to the times of a, from the motion that both cameras saw.

    Raises:
        InputError: too short a recording, too little motion, or motion that fits several offsets.
    """
    grid, motion_a, motion_b, step = _on_common_grid(a, b)
    lags = np.arange(-round(LARGEST / STEP), round(LARGEST / STEP) + 1)
    scores = _correlations(motion_a, motion_b, lags)
    best = int(np.argmax(scores))
    if not scores[best] >= LEAST_CORRELATION:
        raise InputError(f"the cameras' motions don't agree (correlation {scores[best]:.2f}); {_ADVICE}")
    if best in (0, len(lags) - 1):
        raise InputError(f"the clocks are further apart than {LARGEST:g} s, or the motions don't agree; {_ADVICE}")
    others = scores[np.abs(lags - lags[best]) * STEP > NEIGHBOURHOOD]
    if scores[best] < CLEARLY_BEST * others.max():
        raise InputError(f"the motion fits several offsets equally well, it is too even; {_ADVICE}")
    # A motion of a that is seen `lag` later on its own clock than on b's: its times are that much too late.
    seconds = -_peak(scores, best, lags)
    estimates = [-_peak_without(block, grid, motion_a, motion_b, lags, lags[best]) for block in range(BLOCKS)]
    # Jackknife over blocks of time, and a part of the slower camera's interval, within which no motion is placed.
    spread = np.sqrt((BLOCKS - 1) / BLOCKS * np.sum((np.array(estimates) - np.mean(estimates)) ** 2))
    uncertainty = float(np.hypot(2.0 * spread, step / 12))
    if uncertainty > LEAST_CERTAIN:
        raise InputError(f"too little motion: the offset would be {1000 * seconds:+.0f} ms, give or take "
                         f"{1000 * uncertainty:.0f}; {_ADVICE}")  # fmt: skip
    return Offset(float(seconds), uncertainty, float(scores[best]))


def measure_offset(a: str, b: str | None, seconds: float, *, progress: bool = True) -> Offset:
    """Look at two cameras for some time and estimate their clocks' offset.

    Args:
        a, b: URIs, as for `runtime.stream.Stream`.
        seconds: how long to look.
        progress: show a bar on a terminal.

    Raises:
        InputError: a camera that can't be opened, too short a time, or what `estimate_offset` refuses.
    """
    if not SHORTEST <= seconds < float("inf"):
        raise InputError(f"{seconds:g} s are no time to measure the offset in; give {SHORTEST:g} or more (--duration)")
    playback = Playback()
    sources = [open_source(uri, queue_size=64, playback=playback) for uri in resolve_pair(a, b)]
    sensors = [MotionSensor() for _ in sources]
    try:
        for source in sources:
            source.begin()
        for source in sources:
            source.wait_opened()
        end = time.monotonic() + seconds
        with tqdm(total=round(seconds), desc="watching", unit="s", disable=None if progress else True) as bar:
            while time.monotonic() < end and not all(source.ended for source in sources):
                for source, sensor in zip(sources, sensors, strict=True):
                    while (frame := source.take()) is not None:
                        sensor.add(frame)
                time.sleep(0.02)
                bar.update(round(seconds - max(end - time.monotonic(), 0)) - bar.n)
    finally:
        for source in sources:
            source.close()
    return estimate_offset(*sensors)


def _on_common_grid(a: MotionSensor, b: MotionSensor) -> tuple[FloatArray, FloatArray, FloatArray, float]:
    """Times of the grid, the motion of a and of b there, and the slower camera's interval."""
    times_a, times_b = np.array(a.times), np.array(b.times)
    if min(len(times_a), len(times_b)) < 10:
        raise InputError("too few pictures came to measure the offset; is each camera on?")
    begin, end = max(times_a[0], times_b[0]), min(times_a[-1], times_b[-1])
    if end - begin < SHORTEST - 2:
        raise InputError(f"both cameras were on together for {max(end - begin, 0):.1f} s only; that is too short")
    step = max(_interval(times_a), _interval(times_b))
    grid = np.arange(begin, end, STEP)
    motions = [_motion(times, sensor, grid, step) for times, sensor in ((times_a, a), (times_b, b))]
    return grid, motions[0], motions[1], step


def _interval(times: FloatArray) -> float:
    return float(np.median(np.diff(times)))


def _motion(times: FloatArray, sensor: MotionSensor, grid: FloatArray, step: float) -> FloatArray:
    """Motion on the grid: as coarse as the slower camera sees it, without slow changes and single spikes."""
    changes = np.array(sensor.changes)
    changes = np.sqrt(np.minimum(changes, np.percentile(changes, 98)))  # the shutter of a thermal camera is a spike
    values = np.interp(grid, times, changes)
    if _interval(times) < 0.7 * step:  # a faster camera sees within what the slower one sees at once
        values = _box(values, step)
    return values - _box(values, _SLOW)


def _box(values: FloatArray, seconds: float) -> FloatArray:
    """Mean over a window of so many seconds, shorter at the ends."""
    width = max(round(seconds / STEP) | 1, 1)
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def _correlations(a: FloatArray, b: FloatArray, lags: NDArray[np.int64]) -> FloatArray:
    """Correlation of a moved earlier by each lag (in steps) with b, over where both are."""
    return np.array([_correlation(*_overlap(a, b, lag)) for lag in lags])


def _overlap(a: FloatArray, b: FloatArray, lag: int) -> tuple[FloatArray, FloatArray]:
    return (a[lag:], b[: len(b) - lag]) if lag >= 0 else (a[:lag], b[-lag:])


def _correlation(a: FloatArray, b: FloatArray) -> float:
    scale = float(np.sqrt(np.sum(a * a) * np.sum(b * b)))
    return float(np.sum(a * b)) / scale if scale > 0 else 0.0


def _peak(scores: FloatArray, best: int, lags: NDArray[np.int64]) -> float:
    """Seconds of the maximum, between steps by a parabola."""
    if best in (0, len(scores) - 1):
        return float(lags[best] * STEP)
    before, at, after = scores[best - 1 : best + 2]
    bend = before - 2 * at + after
    return float((lags[best] + (0.5 * (before - after) / bend if bend < 0 else 0)) * STEP)


def _peak_without(
    block: int, grid: FloatArray, a: FloatArray, b: FloatArray, lags: NDArray[np.int64], centre: int
) -> float:
    """The maximum near the best lag, with one block of time left out."""
    length = -(-len(grid) // BLOCKS)
    left_out = slice(block * length, (block + 1) * length)
    a, b = a.copy(), b.copy()
    a[left_out] = 0
    b[left_out] = 0
    near = lags[np.abs(lags - centre) * STEP <= NEIGHBOURHOOD]
    scores = _correlations(a, b, near)
    return _peak(scores, int(np.argmax(scores)), near)
