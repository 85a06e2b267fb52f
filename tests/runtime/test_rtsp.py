"""Two real RTSP cameras on loopback, and everything that cameras do to a stream."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.errors import InputError
from runtime.frames import FusedFrame
from runtime.sources import open_source
from runtime.stream import Stream
from tests.runtime.test_sources import collect, run_with_gstreamer

SYSTEM_PYTHON = "/usr/bin/python3"
CHECK = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import Gst; Gst.init(None); " \
        "assert Gst.ElementFactory.find('x264enc') and Gst.ElementFactory.find('rtph264pay')"  # fmt: skip
FPS = 15

pytestmark = pytest.mark.slow


class Camera:
    """An RTSP server in a process of its own."""

    def __init__(self, size: str, fps: int, login: str = ""):
        self._size, self._fps, self._login = size, fps, login
        self.port = 0
        self.start()

    def start(self) -> None:
        command = [SYSTEM_PYTHON, str(Path(__file__).with_name("rtsp_server.py"))]
        command += [str(self.port), self._size, str(self._fps), *filter(None, [self._login])]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = self._process.stdout.readline()
        assert line.startswith("ready"), "the RTSP server did not start"
        self.port = int(line.split()[1])

    @property
    def uri(self) -> str:
        return f"rtsp://127.0.0.1:{self.port}/camera"

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def cameras() -> Iterator[Callable[..., Camera]]:
    """Makes cameras; ends them afterwards."""
    if not Path(SYSTEM_PYTHON).exists() or subprocess.call([SYSTEM_PYTHON, "-c", CHECK], stderr=subprocess.DEVNULL):
        pytest.skip("GStreamer's RTSP server is not installed (gir1.2-gst-rtsp-server-1.0, gstreamer1.0-plugins-ugly)")
    pytest.importorskip("av")
    made: list[Camera] = []

    def make(*arguments: Any, **options: Any) -> Camera:
        made.append(Camera(*arguments, **options))
        return made[-1]

    yield make
    for camera in made:
        camera.kill()


def check_pictures(uri: str, *, wall_clock: bool) -> None:
    frames = collect(open_source(uri), limit=8 * FPS)
    assert frames[0].image.shape == (240, 320, 3)
    assert any(np.abs(frames[0].image.astype(int) - frame.image).max() > 50 for frame in frames)  # the ball moves
    if not wall_clock:
        assert {frame.clock for frame in frames} == {"arrival"}
        return
    # From the sender's reports on it is the sender's clock; on one machine both clocks are one.
    assert frames[-1].clock == "ntp"
    last = frames[-FPS:]
    delays = [frame.arrival - (frame.time - time.time() + time.monotonic()) for frame in last]
    assert min(delays) > -0.05 and np.median(delays) < 1
    assert np.median(np.diff([frame.time for frame in last])) == pytest.approx(1 / FPS, abs=0.002)


@pytest.mark.parametrize("decoder", ["pyav", "opencv"])
def test_pictures_and_their_clock(cameras: Callable[..., Camera], decoder: str):
    check_pictures(f"{cameras('320x240', FPS).uri}#decoder={decoder}", wall_clock=decoder == "pyav")


def test_through_gstreamer(cameras: Callable[..., Camera], tmp_path: Path):
    uri = f"{cameras('320x240', FPS).uri}#decoder=gstreamer"
    run_with_gstreamer(f"from {__name__} import check_pictures; check_pictures({uri!r}, wall_clock=True)", tmp_path)


def test_a_wrong_password(cameras: Callable[..., Camera]):
    camera = cameras("160x120", 5, login="viewer:hunter2")
    right = camera.uri.replace("rtsp://", "rtsp://viewer:hunter2@")
    assert len(collect(open_source(right), limit=2)) == 2
    for wrong in (camera.uri, right.replace("hunter2", "hunter3")):
        with pytest.raises(InputError, match="refused the user or password") as caught:
            open_source(wrong).start()
        assert "hunter" not in str(caught.value)
    with pytest.raises(InputError, match="can't be opened"):
        open_source(right.replace("/camera", "/other")).start()


class Watched:
    """A stream that runs in a thread of its own; keeps what came out."""

    def __init__(self, *uris: str, **options: Any):
        self.stream = Stream(*uris, model="average", **options)
        self.outputs: list[tuple[float, FusedFrame]] = []
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            for fused in self.stream:
                self.outputs.append((time.monotonic(), fused))
        except BaseException as error:
            self.error = error

    def wait(self, what: Callable[[], bool], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert self.error is None and self._thread.is_alive(), f"the loop ended: {self.error}"
            assert time.monotonic() < deadline, f"did not happen in {seconds} s; {self.stream.events.events()}"
            time.sleep(0.05)

    def newest(self, state: str) -> bool:
        return bool(self.outputs) and self.outputs[-1][1].state == state

    def count(self, since: float) -> int:
        return sum(at >= since for at, _ in self.outputs)

    def events(self, source: str) -> list[str]:
        return [event.kind for event in self.stream.events.events() if event.source.startswith(source)]

    def close(self) -> None:
        self.stream.close()
        self._thread.join(30)


def in_order(wanted: list[str], given: list[str]) -> bool:
    """Whether all of the wanted ones are among the given ones, in this order."""
    remaining = iter(given)
    return all(each in remaining for each in wanted)


def test_the_loop_outlives_its_cameras(cameras: Callable[..., Camera], tmp_path: Path):
    pytest.importorskip("mcap")
    thermal, visible = cameras("160x128", 9), cameras("320x240", FPS)
    video, bag = tmp_path / "fused.mp4", tmp_path / "fused.mcap"
    sinks = [f"file://{video}", f"mcap://{bag}"]
    run = Watched(f"{thermal.uri}#grey=1", visible.uri, sinks=sinks)
    try:
        run.wait(lambda: run.newest("fused") and len(run.outputs) > 2 * FPS)

        # The thermal camera's process stands still: its connection stays, and nothing comes.
        stopped, stopped_unix = time.monotonic(), time.time()
        thermal.signal(signal.SIGSTOP)
        time.sleep(5)
        during = run.count(stopped)
        assert during > 0.7 * 5 * FPS, "the output has the master's rate all the same"
        assert run.newest("a_missing")
        silent = next(event for event in run.stream.events.events() if event.kind == "silent")
        assert silent.source.startswith("a ") and silent.time - stopped_unix < 2
        thermal.signal(signal.SIGCONT)
        run.wait(lambda: run.newest("fused"))

        # The visible camera is switched off and on again.
        visible.kill()
        run.wait(lambda: run.newest("b_missing"))
        since = time.monotonic()
        time.sleep(2)
        assert run.count(since) > 0.7 * 2 * 9 * 0.8, "the thermal camera's pictures pass meanwhile"
        visible.start()
        run.wait(lambda: run.newest("fused"))

        # The thermal camera changes its resolution.
        thermal.signal(signal.SIGUSR1)
        run.wait(lambda: "size_changed" in run.events("a "))
        since = time.monotonic()
        run.wait(lambda: run.newest("fused") and run.count(since) > 2 * FPS)
        status = run.stream.status()
    finally:
        run.close()
    assert run.error is None

    states = ["fused", "a_missing", "fused", "b_missing", "fused"]
    assert in_order(states, run.events("stream"))
    assert in_order(states, [fused.state for _, fused in run.outputs])
    assert in_order(["open", "silent", "size_changed"], run.events("a "))
    assert in_order(["open", "lost", "reconnected"], run.events("b "))
    assert status["sources"]["a"]["size"] == "80x64" and status["sources"]["b"]["losses"] >= 1
    assert {fused.image.shape for _, fused in run.outputs} == {(240, 320, 3)}
    assert [fused.index for _, fused in run.outputs] == list(range(len(run.outputs)))
    json.dumps(status)

    written = run.stream.status()["sinks"]
    recorded = collect(open_source(f"file://{video}?realtime=0"), timeout=60)
    assert len(recorded) == written[0]["written"] > 0.9 * len(run.outputs)
    # The recording has the gaps and the pace of what happened, not a constant rate.
    length = run.outputs[-1][1].time - run.outputs[0][1].time
    assert recorded[-1].time - recorded[0].time == pytest.approx(length, abs=1)
    in_bag = collect(open_source(f"mcap://{bag}?topic=/fused/image_raw&realtime=0"), timeout=60)
    assert len(in_bag) == written[1]["written"]
    np.testing.assert_array_equal(in_bag[0].image, run.outputs[0][1].image)
