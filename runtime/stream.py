"""The live loop: two cameras in, one steady fused stream out, for hours, whatever the cameras do.

    for fused in Stream("rtsp://10.0.0.8/thermal", "rtsp://10.0.0.8/visible"):
        show(fused.image)

`python runtime/stream.py URI_A URI_B --sink URI` is the same as `refusion stream`.

Threads: one for each source, which reads; one for each sink, which writes; a watchdog; and the caller's, which pairs
and fuses. The loop waits for pictures alone: what it hands over it hands over without waiting.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # run as a file: its folder must not hide other packages, and ours must be found
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # before it is imported: what goes wrong is an exception

from runtime.backends import check_threads, choose_backend
from runtime.errors import InputError
from runtime.frames import Frame, FusedFrame
from runtime.health import Event, EventLog, Watchdog
from runtime.live_fusion import Average, LiveFusion, PairFuser, Register
from runtime.sources import Playback, Source, open_source, resolve_pair
from runtime.status import StreamHealth
from runtime.sync import Pair, Pairer, Pairing

if TYPE_CHECKING:
    from runtime.sinks import Sink

FIRST_PICTURES = 2.0  # seconds that the loop waits at the start for a picture of the thermal camera
IDLE = 0.1  # seconds after which the loop looks up though nothing came
SINK_POLL = 0.001  # seconds between two looks whether the sinks have room, for recordings that lose nothing


class Stream:
    """Pairs and fuses two sources; give it sinks, or iterate over it, or both.

    Example:
        with Stream("demo://night", sinks=["http://127.0.0.1:8000"]) as stream:
            stream.run()

    Args:
        a: URI of the thermal camera (the task's first source), or one that names both cameras.
        b: URI of the visible camera, the master.
        task: what is fused.
        model: "auto", a path to a model, or "average" for the mean of both pictures, without a network.
        backend: what computes it, see `runtime.Fuser`.
        threads: that compute one picture; None takes every core.
        fuser: takes the place of task, model, backend, threads, range and chroma.
        calibration: file of `refusion calibrate` or of ROS or Kalibr; None only scales a to the size of b.
        tone: of 16-bit thermal pictures, see `runtime.tone.StreamTone`.
        range, chroma: see `runtime.Fuser`.
        pairing: which pictures go together, see `runtime.sync.Pairing`.
        sinks: URIs, or functions that take a FusedFrame and are called in a thread of their own.
        duration: seconds after which the stream ends.
        frames: pictures after which it ends.
        on_event: called with every event of a camera or the stream once all are open, in a thread of its own.

    Attributes:
        events: what happened, in order.
        fusion: the pictures' way from a pair to the output.

    Raises:
        InputError: a bad URI, model, policy or number; a camera that can't be opened; a sink that can't be written.
    """

    def __init__(
        self,
        a: str,
        b: str | None = None,
        *,
        task: str = "ivif",
        model: str = "auto",
        backend: str = "auto",
        threads: int | None = None,
        fuser: PairFuser | None = None,
        calibration: str | Path | None = None,
        tone: str | tuple[float, float] = "percentile",
        range: str = "auto",
        chroma: str = "auto",
        pairing: Pairing | None = None,
        sinks: Sequence[str | Callable[[FusedFrame], object]] = (),
        duration: float | None = None,
        frames: int | None = None,
        on_event: Callable[[Event], None] | None = None,
    ):
        if duration is not None and not duration > 0:
            raise InputError(f"the duration is {duration:g} s; give more than 0")
        if frames is not None and frames < 1:
            raise InputError(f"the number of frames is {frames}; give 1 or more")
        pairing = pairing or Pairing()
        self._duration, self._frames = duration, frames
        self.events = EventLog(on_event)
        self._wake = threading.Event()
        self._stop = False
        self._sinks: list[Sink] = []
        self._watchdog: Watchdog | None = None
        self._health = StreamHealth(self.events)
        self._sources = self._make_sources(a, b, pairing)
        self._lossless = all(source.lossless for source in self._sources.values())
        self._pairer = Pairer(pairing, lossless=self._lossless)
        self.fusion = LiveFusion(
            fuser or load_fuser(task, model, backend, threads, range, chroma),
            None if calibration is None else load_registration(calibration),
            tone,
        )
        self._generator = self._run()
        try:
            self._start(sinks)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[FusedFrame]:
        """Pictures as they come out, after the sinks got them. Ends with the sources, at the limits, or by `stop`."""
        return self._generator

    def run(self) -> dict[str, Any]:
        """Run to the end, finish the sinks' files and give the last status."""
        try:
            for _ in self:
                pass
        finally:
            self.close()
        return self.status()

    def stop(self) -> None:
        """End after the picture in work; any thread or signal handler may call it."""
        self._stop = True  # the loop looks up every IDLE seconds; a signal handler must not touch the event's lock

    def close(self) -> None:
        """End the threads and finish the sinks' files. May be called again, and from within the loop or a listener."""
        self.stop()
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None
        for source in self._sources.values():
            source.close()
        self._health.look(time.monotonic())
        for sink in self._sinks:
            sink.close()
        self.events.close()

    def status(self) -> dict[str, Any]:
        """State, rates, times and counters of everything, for JSON; any thread may ask."""
        now = time.monotonic()
        pairing = self._pairer.counters()
        sources = {side: source.snapshot(now) for side, source in self._sources.items()}
        for side, source in sources.items():  # a loop that is too slow drops what waits to be paired
            source["dropped"] += pairing[f"dropped_{side}"]
        return {
            **self._health.snapshot(now),
            "model": self.fusion.fuser.model,
            "model_threads": self.fusion.fuser.threads,
            "sources": sources,
            "pairing": pairing,
            "sinks": [sink.counters() for sink in self._sinks],
            "policy": self.policy,
        }

    @property
    def policy(self) -> dict[str, str]:
        """What `control` may change: range, chroma, tone, on_missing."""
        return {**self.fusion.policy, "on_missing": self._pairer.knobs.on_missing}

    def control(self, change: Mapping[str, Any]) -> dict[str, str]:
        """Change policies while it runs; gives those that are then in effect. Any thread may call it.

        Raises:
            InputError: an unknown policy or value; nothing is changed then.
        """
        unknown = set(change) - set(self.policy)
        if unknown:
            raise InputError(f"there is no policy '{min(unknown)}'; choose from {', '.join(self.policy)}")
        knobs = self._pairer.knobs
        if "on_missing" in change:
            knobs = replace(knobs, on_missing=change["on_missing"])
        self.fusion.change({name: value for name, value in change.items() if name != "on_missing"})
        self._pairer.knobs = knobs
        return self.policy

    def _make_sources(self, a: str, b: str | None, pairing: Pairing) -> dict[str, Source]:
        playback = Playback()
        sources = {}
        for side, uri in zip("ab", resolve_pair(a, b), strict=True):
            source = sources[side] = open_source(uri, queue_size=pairing.queue_size, playback=playback)
            source.wake = self._wake
            source.health.report = partial(self.events.add, f"{side} {source.name}")
        return sources

    def _start(self, sinks: Sequence[str | Callable[[FusedFrame], object]]) -> None:
        """Open everything; cameras at the same time, since each may take seconds."""
        from runtime.sinks import open_sink

        for source in self._sources.values():
            source.begin()
        for source in self._sources.values():
            source.wait_opened()
        for uri in sinks:
            self._sinks.append(open_sink(uri, status=self.status, control=self.control))
        looks = [*(source.look for source in self._sources.values()), self._health.look]
        self._watchdog = Watchdog(looks)
        self.events.start()

    def _run(self) -> Iterator[FusedFrame]:
        """The loop."""
        pairer = self._pairer
        until = time.monotonic() + (self._duration or float("inf"))
        self._await_first_pictures(until)
        index = 0
        while not self._stop:
            now, begin = time.monotonic(), time.perf_counter()
            if now >= until:
                break
            self._wake.clear()
            self._feed()
            pair = pairer.next(now)
            if pair is None:
                if pairer.ended:
                    break
                due = pairer.due(now)
                self._wake.wait(min(IDLE if due is None else due - now, IDLE, until - now))
                continue
            if self._lossless:
                self._await_sinks(until)
            stages = {"wait": max(now - pair.master.arrival, 0.0), "pair": time.perf_counter() - begin}
            fused = self._fuse(pair, index, stages)
            yield fused
            index += 1
            if index == self._frames:
                break
        self.close()  # who iterates over the stream need not

    def _await_first_pictures(self, until: float) -> None:
        """Give every camera time for its first picture, so that the output has the master's size from the start.

        The master has until the watchdog calls it silent: a network camera's first picture waits for a key frame.
        """
        a, b = self._sources["a"], self._sources["b"]
        enough = time.monotonic() + FIRST_PICTURES
        while not self._stop and time.monotonic() < until:
            self._wake.clear()
            has_master = b.has_picture or b.ended or b.health.state in ("silent", "lost")
            if has_master and (a.has_picture or a.ended or time.monotonic() > enough):
                return
            self._wake.wait(IDLE)

    def _feed(self) -> None:
        """Hand what came to the pairer."""
        a, b, pairer = self._sources["a"], self._sources["b"], self._pairer
        frame: Frame | None
        while (not a.lossless or pairer.has_room_a()) and (frame := a.take()) is not None:
            pairer.add_a(frame)
        while (not b.lossless or pairer.has_room_b()) and (frame := b.take()) is not None:
            pairer.add_b(frame)
        if a.ended:
            pairer.end_a()
        if b.ended:
            pairer.end_b()

    def _fuse(self, pair: Pair, index: int, stages: dict[str, float]) -> FusedFrame:
        master = pair.master
        image = self.fusion(pair, stages)
        # A recording has no age but the time since it was read.
        age = time.monotonic() - master.arrival if master.clock == "file" else time.time() - master.time
        fused = FusedFrame(
            image, pair.a, pair.b, pair.state, pair.skew_ms, 1000 * age, pair.reused, master.time, index, stages
        )
        begin = time.perf_counter()
        stages["sink"] = 0.0  # there before a sink's thread may look through them
        for sink in self._sinks:
            sink.write(fused)
        stages["sink"] = time.perf_counter() - begin
        has_both = pair.a is not None and pair.b is not None
        self._health.output(pair.state, fused.age_ms, pair.skew_ms if has_both else None, pair.reused, stages)
        return fused

    def _await_sinks(self, until: float) -> None:
        """Where no recorded picture may be lost, the sinks set the pace."""
        while not self._stop and time.monotonic() < until and any(sink.counters()["queued"] for sink in self._sinks):
            time.sleep(SINK_POLL)


def load_fuser(task: str, model: str, backend: str, threads: int | None, range: str, chroma: str) -> PairFuser:
    """The network of a stream; "average" is none.

    Raises:
        InputError: no such task, model, backend or policy, or a number of threads below 1.
    """
    if model == "average":
        choose_backend(backend)
        check_threads(threads)
        fuser = Average(range, chroma)
        LiveFusion(fuser).change({})  # checks the policies
        return fuser
    from runtime.fuser import Fuser

    return Fuser(task, model=model, live=True, backend=backend, threads=threads, range=range, chroma=chroma)


def load_registration(file: str | Path) -> Callable[[tuple[int, int], tuple[int, int]], Register]:
    """What makes the registration of two sizes from a calibration file.

    Raises:
        InputError: no such file, or not a calibration.
    """
    from runtime.calibration import load_calibration
    from runtime.register import Registration

    calibration = load_calibration(file)
    return lambda size_a, size_b: Registration(calibration, size_a, size_b)


if __name__ == "__main__":
    from runtime.stream_command import main

    raise SystemExit(main())
