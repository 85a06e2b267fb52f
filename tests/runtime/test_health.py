"""Health of cameras on a fake clock, the watchdog on the real one, and the status as JSON and Prometheus metrics."""

from __future__ import annotations

import json
import re
import threading
import time

import numpy as np
import pytest

from runtime.frames import Clock, Frame
from runtime.health import Backoff, CameraHealth, EventLog, Watchdog, signature
from runtime.sources.base import REOPEN_AFTER
from runtime.status import Recent, StreamHealth, memory_mb, prometheus_text

UNIX = 1.7e9


class Feed:
    """A camera's health, fed by a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.events: list[tuple[str, str]] = []
        self.health = CameraHealth("camera", lambda kind, detail: self.events.append((kind, detail)))
        self._rng = np.random.default_rng(0)
        self._index = 0

    def frames(self, seconds: float, fps: float = 30, *, image: np.ndarray | None = None, stamp: float = 0) -> None:
        """Pictures for some time; every one is new, unless an image is given."""
        for _ in range(round(seconds * fps)):
            self.now += 1 / fps
            self.frame(image, stamp)
            self.health.look(self.now)

    def frame(self, image: np.ndarray | None = None, stamp: float = 0, clock: Clock = "device") -> None:
        picture = self._rng.integers(0, 256, (48, 64), dtype=np.uint8) if image is None else image
        own = UNIX + self.now + stamp
        self.health.seen(Frame(picture, own, clock, self.now, self._index, "camera"), own)
        self._index += 1

    def silence(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.2)):
            self.now += 0.2
            self.health.look(self.now)

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]


@pytest.fixture
def feed() -> Feed:
    feed = Feed()
    feed.health.opened(feed.now)
    return feed


def test_a_silent_camera_is_noticed_within_two_seconds_and_its_return(feed: Feed):
    feed.frames(3)
    stopped = feed.now
    while feed.health.state == "ok":
        feed.silence(0.2)
    assert 1.0 <= feed.now - stopped <= 2.0
    feed.silence(3)
    assert feed.health.look(feed.now) > 3  # the seconds of the silence
    feed.frames(1)
    assert feed.kinds() == ["open", "silent", "ok"]
    snapshot = feed.health.snapshot(feed.now)
    assert snapshot["silences"] == 1 and snapshot["state"] == "ok"
    assert snapshot["fps"] == pytest.approx(30, abs=0.1)


@pytest.mark.parametrize("seconds", [1.3, 2.5, 3.5])
def test_a_slow_camera_is_not_silent(feed: Feed, seconds: float):
    for _ in range(12):
        feed.silence(seconds)  # looks all the time
        feed.frame()
    assert feed.kinds() == ["open"]
    assert feed.health.look(feed.now) == 0
    feed.silence(5 * seconds)
    assert feed.kinds() == ["open", "silent"]


def test_a_very_slow_camera_is_known_after_its_second_picture(feed: Feed):
    """One every 6 s: silent once, and not for so long that it would be opened again."""
    overdue = []
    for _ in range(5):
        feed.frame()
        for _ in range(30):
            feed.now += 0.2
            overdue.append(feed.health.look(feed.now))
    assert feed.kinds() == ["open", "silent", "ok"]
    assert max(overdue) <= REOPEN_AFTER + 0.1


def test_the_first_picture_may_take_longer(feed: Feed):
    feed.silence(3)
    assert feed.kinds() == ["open"]
    feed.silence(2)
    assert feed.kinds() == ["open", "silent"]


def test_a_frozen_picture(feed: Feed):
    feed.frames(2)
    still = np.full((48, 64), 7, np.uint8)
    feed.frames(2.5, image=still)
    assert feed.health.state == "ok"
    feed.frames(2, image=still)
    assert feed.health.state == "frozen"
    feed.frames(0.1)
    assert feed.kinds() == ["open", "frozen", "ok"]
    assert feed.health.snapshot(feed.now)["freezes"] == 1


def test_a_slow_camera_needs_several_equal_pictures_to_be_frozen(feed: Feed):
    feed.frames(6, fps=1, image=np.zeros((4, 4), np.uint8))
    assert feed.health.state == "ok"


def test_noise_of_one_count_changes_the_signature():
    image = np.full((480, 640), 3000, np.uint16)
    other = image.copy()
    other[8::80, 16::80] += 1
    assert signature(image) == signature(image.copy()) != signature(other)
    colour = np.zeros((480, 640, 3), np.uint8)
    assert signature(colour) == signature(np.asfortranarray(colour))


def test_a_clock_that_was_set(feed: Feed):
    feed.frames(1)
    feed.frames(1, stamp=-3)
    assert feed.events[-1] == ("clock_jump", "its clock moved by -3.00 s")
    feed.silence(0.8)  # a gap is no jump: arrival and stamp move alike
    feed.frames(1, stamp=-3)
    assert feed.kinds() == ["open", "clock_jump"]
    feed.frames(1, stamp=0.7)
    assert feed.events[-1] == ("clock_jump", "its clock moved by +3.70 s")
    assert feed.health.snapshot(feed.now)["clock_jumps"] == 2


def test_another_resolution(feed: Feed):
    feed.frames(0.2, image=np.zeros((480, 640), np.uint8))
    feed.frames(0.2, image=np.zeros((240, 320, 3), np.uint16))
    assert ("size_changed", "from 640x480 to 320x240") in feed.events
    snapshot = feed.health.snapshot(feed.now)
    assert (snapshot["size"], snapshot["depth"], snapshot["size_changes"]) == ("320x240", 16, 1)


def test_lost_and_back(feed: Feed):
    feed.frames(1)
    feed.health.lost("cable", feed.now)
    feed.silence(3)  # while it is being opened again, nobody speaks of silence
    feed.health.lost("cable", feed.now)  # the same again is no news
    feed.health.lost("no route", feed.now)
    feed.health.opened(feed.now)
    feed.frames(1)
    feed.health.ended()
    assert feed.kinds() == ["open", "lost", "lost", "reconnected", "ended"]
    snapshot = feed.health.snapshot(feed.now)
    assert (snapshot["losses"], snapshot["reconnects"], snapshot["silences"]) == (3, 1, 0)


def test_backoff_doubles_to_its_limit():
    backoff = Backoff()
    assert [backoff.next() for _ in range(7)] == [0.5, 1, 2, 4, 8, 8, 8]
    backoff.reset()
    assert backoff.next() == 0.5


def test_the_watchdog_looks_though_others_wait():
    """A thread that is stuck in a read can't notice that nothing comes; the watchdog has its own."""
    log = EventLog()
    health = CameraHealth("camera", lambda kind, detail: log.add("camera", kind, detail))
    health.opened(time.monotonic() - 100)
    looked = threading.Event()

    def broken(now: float) -> None:
        looked.set()
        raise RuntimeError("one camera's trouble")

    watchdog = Watchdog([broken, health.look])
    try:
        assert looked.wait(10)
        deadline = time.monotonic() + 10
        while health.state != "silent" and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        watchdog.close()
    assert [event.kind for event in log.events()] == ["open", "silent"]
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())


def test_the_event_log_keeps_the_newest():
    heard = []
    log = EventLog(heard.append)
    for number in range(300):
        log.add("camera", "silent", str(number))
    log.start()
    log.close()
    assert len(log.events()) == 200 and log.events()[-1].detail == "299"
    assert len(heard) == 300


def test_recent_values():
    recent = Recent(4)
    assert recent.percentiles() is None
    for value in range(10):
        recent.add(value)
    assert sorted(recent.values()) == [6, 7, 8, 9]
    assert recent.percentiles() == {"p50": 7.5, "p90": 8.7, "p99": 8.97, "max": 9.0}


def status() -> dict[str, object]:
    log = EventLog()
    stream = StreamHealth(log)
    for state in ("fused", "held", "fused", "a_missing", "a_missing", "held", "b_missing"):
        stream.output(state, 40.0, -20.0 if state == "fused" else None, state == "held", {"fuse": 0.01, "sink": 0.0})
    stream.look(0)
    assert [event.kind for event in log.events()] == ["fused", "a_missing", "fused", "b_missing"]
    camera = CameraHealth('rtsp://host/"a"\\b', lambda kind, detail: None)
    camera.opened(0.0)
    sources = {"a": {**camera.snapshot(0.0), "dropped": 3, "queued": 0}}
    sink = {"url": "file:///out.mp4", "written": 5, "dropped": 2}
    return {**stream.snapshot(time.monotonic()), "sources": sources, "sinks": [sink]}


def test_the_status_is_json():
    read = json.loads(json.dumps(status()))
    assert read["frames"] == 7 and read["states"] == {"fused": 2, "held": 2, "a_missing": 2, "b_missing": 1}
    assert read["state"] == "b_missing" and read["reused"] == 2
    assert read["skew_ms"]["p50"] == 20 and read["age_ms"]["p99"] == 40
    assert read["stages_ms"]["fuse"]["max"] == 10
    assert 10 < memory_mb() < 100_000 and read["memory_mb"] > 10


def test_prometheus_metrics():
    text = prometheus_text(status())
    sample = re.compile(r'(refusion_[a-z0-9_]+)(\{([a-z]+="([^"\\\n]|\\.)*",?)+\})? (-?[0-9.e+]+)')
    values, types = {}, {}
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            assert name not in types
            types[name] = kind
        elif not line.startswith("# HELP"):
            match = sample.fullmatch(line)
            assert match, line
            assert match[1] in types
            values[match[1] + (match[2] or "")] = float(match[5])
    assert values['refusion_output_frames_total{state="fused"}'] == 2
    assert values['refusion_stage_ms{stage="fuse",quantile="0.99"}'] == 10
    assert values['refusion_camera_dropped_total{camera="a"}'] == 3
    assert values['refusion_camera_up{camera="a"}'] == 1
    assert values['refusion_sink_dropped_total{sink="file:///out.mp4"}'] == 2
    assert all(kind == "counter" for name, kind in types.items() if name.endswith("_total"))
