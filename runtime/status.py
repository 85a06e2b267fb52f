"""Status of a stream: what came out, how fast and how old, as JSON and as Prometheus metrics."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from runtime.health import COUNTERS, EventLog


class Recent:
    """The last values of a quantity. Adding costs no allocation and no lock; one thread adds, any may look."""

    def __init__(self, size: int = 512):
        self._values = np.full(size, np.nan)
        self._count = 0

    def add(self, value: float) -> None:
        self._values[self._count % len(self._values)] = value
        self._count += 1

    def values(self) -> np.ndarray:
        """A copy of what is there, in no order."""
        return self._values[: min(self._count, len(self._values))].copy()

    def percentiles(self) -> dict[str, float] | None:
        """p50, p90, p99 and the maximum, or None where nothing was added."""
        values = self.values()
        if not len(values):
            return None
        numbers = np.percentile(values, (50, 90, 99, 100)).tolist()
        return {name: round(number, 3) for name, number in zip(_QUANTILES, numbers, strict=True)}


NOTHING_AFTER = 2.0  # seconds without an output picture, longer where they come slowly, after which the state says so
_NOTHING_INTERVALS = 4


class StreamHealth:
    """What came out of a stream. `output` is called by its loop, everything else by anyone.

    Attributes:
        frames: pictures that came out.
        states: state -> pictures that came out in it.
    """

    def __init__(self, log_: EventLog):
        self.frames = 0
        self.states: Counter[str] = Counter()
        self.reused = 0
        self._log = log_
        self._started = time.monotonic()
        self._state = ""
        self._changes: deque[str] = deque()
        self._waiting = False
        self._last_output = (0.0, 0.0)  # when the last picture came out, and seconds after the one before
        self._at, self._age, self._skew = Recent(128), Recent(), Recent()
        self._stages: dict[str, Recent] = {}

    def output(
        self, state: str, age_ms: float, skew_ms: float | None, reused: bool, stages: Mapping[str, float]
    ) -> None:
        """A picture came out; skew_ms is None where it is made of one camera's."""
        self.frames += 1
        self.states[state] += 1
        self.reused += reused
        now = time.monotonic()
        self._at.add(now)
        last = self._last_output[0]
        self._last_output = now, now - last if last else 0.0
        self._age.add(age_ms)
        if skew_ms is not None:
            self._skew.add(abs(skew_ms))
        for name, seconds in stages.items():
            if name not in self._stages:
                self._stages[name] = Recent()
            self._stages[name].add(1000 * seconds)
        is_change = not self._state or _told(state) != _told(self._state)
        self._state = state
        if is_change:
            self._changes.append(_told(state))

    def look(self, now: float) -> None:
        """Report changes of state; called by the watchdog, since the loop itself waits for nobody."""
        while self._changes:
            self._waiting = False
            self._log.add("stream", self._changes.popleft())
        last, interval = self._last_output
        nothing_comes = bool(self.frames) and now - last > max(NOTHING_AFTER, _NOTHING_INTERVALS * interval)
        if nothing_comes and not self._waiting:
            self._log.add("stream", "waiting", f"no picture came out for {now - last:.1f} s")
        elif self._waiting and not nothing_comes:
            self._log.add("stream", _told(self._state))
        self._waiting = nothing_comes

    def fps(self, now: float) -> float:
        """Pictures a second over the last 128, or fewer where nothing came for long."""
        times = np.sort(self._at.values())
        if len(times) < 2 or now - times[-1] > 5:
            return 0.0
        return (len(times) - 1) / max(now - times[0], 1e-9)

    def snapshot(self, now: float) -> dict[str, Any]:
        """State, rates, times and counters, for JSON."""
        return {
            "state": "waiting" if self._waiting or not self._state else self._state,
            "seconds": round(now - self._started, 1),
            "frames": self.frames,
            "fps": round(self.fps(now), 2),
            "states": dict(self.states),
            "reused": self.reused,
            "age_ms": self._age.percentiles(),
            "skew_ms": self._skew.percentiles(),
            "stages_ms": {name: recent.percentiles() for name, recent in list(self._stages.items())},
            "memory_mb": round(memory_mb(), 1),
            "threads": threading.active_count(),
            "events": [asdict(event) for event in self._log.events()[-50:]],
        }


def _told(state: str) -> str:
    """The state that an event tells: slow cameras go to and fro between fused and held."""
    return "fused" if state == "held" else state


def memory_mb() -> float:
    """Resident memory of this process in MB (10^6 bytes); 0 where the system doesn't tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        return 0.0


# ((label, value), ...); Any, since dictionaries of tuples of one length are no dictionaries of any.
Labels = Any
_QUANTILES = {"p50": "0.5", "p90": "0.9", "p99": "0.99", "max": "1"}


class _Metrics:
    """Lines of Prometheus' text format 0.0.4."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, name: str, kind: str, text: str, samples: Mapping[Labels, float | None]) -> None:
        """One metric; samples: ((label, value), ...) -> number, left out where it is None."""
        self.lines += [f"# HELP refusion_{name} {text}", f"# TYPE refusion_{name} {kind}"]
        for labels, number in samples.items():
            if number is not None:
                inner = ",".join(f'{label}="{_escape(value)}"' for label, value in labels)
                self.lines.append(
                    f"refusion_{name}{{{inner}}} {number:.10g}" if inner else f"refusion_{name} {number:.10g}"
                )

    def quantiles(self, name: str, text: str, values: Mapping[Labels, Mapping[str, float] | None]) -> None:
        """Percentiles of one or several quantities, as gauges with the label `quantile`."""
        samples = {
            (*labels, ("quantile", _QUANTILES[key])): number
            for labels, percentiles in values.items()
            for key, number in (percentiles or {}).items()
        }
        self.add(name, "gauge", text, samples)


def prometheus_text(status: Mapping[str, Any]) -> str:
    """The snapshot of a stream, `Stream.status()`, as Prometheus metrics."""
    metrics = _Metrics()
    sources: Mapping[str, Mapping[str, Any]] = status["sources"]
    sinks: Sequence[Mapping[str, Any]] = status["sinks"]
    states = {(("state", state),): count for state, count in status["states"].items()}
    metrics.add("output_frames_total", "counter", "Pictures that came out.", states)
    metrics.add("output_fps", "gauge", "Pictures a second that come out.", {(): status["fps"]})
    metrics.quantiles("age_ms", "Age of a picture as it comes out.", {(): status["age_ms"]})
    metrics.quantiles("skew_ms", "Time between a pair's pictures, by their stamps.", {(): status["skew_ms"]})
    stages = {(("stage", stage),): values for stage, values in status["stages_ms"].items()}
    metrics.quantiles("stage_ms", "Time that a stage takes for a picture.", stages)
    metrics.add("memory_bytes", "gauge", "Resident memory.", {(): 1e6 * status["memory_mb"]})
    metrics.add("threads", "gauge", "Threads.", {(): status["threads"]})

    def of_cameras(name: str, kind: str, text: str, key: str) -> None:
        metrics.add(name, kind, text, {(("camera", side),): source[key] for side, source in sources.items()})

    up = {(("camera", side),): float(source["state"] in ("ok", "frozen")) for side, source in sources.items()}
    metrics.add("camera_up", "gauge", "1 while a camera gives pictures.", up)
    of_cameras("camera_fps", "gauge", "Pictures a second of a camera.", "fps")
    for counter in (*COUNTERS, "dropped"):
        of_cameras(f"camera_{counter}_total", "counter", f"Of a camera: {counter.replace('_', ' ')}.", counter)
    for counter in ("written", "dropped"):
        samples = {(("sink", sink["url"]),): sink[counter] for sink in sinks}
        metrics.add(f"sink_{counter}_total", "counter", f"Pictures that a sink has {counter}.", samples)
    return "\n".join(metrics.lines) + "\n"


def _escape(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
