"""The live loop, end to end, on sources that the test makes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from refusion.cli import main
from runtime.calibration import Calibration, save_calibration
from runtime.camera import Camera
from runtime.errors import InputError
from runtime.frames import Frame, FusedFrame
from runtime.health import Event, EventLog
from runtime.images import read_image, write_image
from runtime.live_fusion import Average, LiveFusion
from runtime.register import Registration
from runtime.shm import ShmWriter
from runtime.sources import Source
from runtime.sources.base import Capture
from runtime.status import NOTHING_AFTER, StreamHealth, prometheus_text
from runtime.stream import FIRST_PICTURES, Stream
from runtime.sync import Pair, Pairing

ROOT = Path(__file__).resolve().parents[2]
DEMO = "demo://night?size=96x64"
COLOUR = (60, 120, 200)


def thermal(number: int) -> np.ndarray:
    counts = np.full((64, 96), 3000 + 10 * number, np.uint16)
    counts[20:40, 4 * number : 4 * number + 12] = 3900
    return counts


def visible(number: int) -> np.ndarray:
    image = np.zeros((64, 96, 3), np.uint8)
    image[:] = COLOUR
    image[:, number * 3 : number * 3 + 2] = 0
    return image


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """A thermal folder at 9 and a visible one at 30 pictures a second, both 2 s long, read as fast as they are used."""
    for number in range(18):
        write_image(tmp_path / "thermal" / f"{number:03}.png", thermal(number))
    for number in range(60):
        write_image(tmp_path / "visible" / f"{number:03}.png", visible(number % 30))
    return f"file://{tmp_path}/thermal?fps=9&realtime=0", f"file://{tmp_path}/visible?fps=30&realtime=0"


def test_recordings_lose_nothing_and_pair_by_time(folders: tuple[str, str]):
    stream = Stream(*folders, model="average", tone="3000:4000")
    outputs = list(stream)
    stream.close()
    assert [output.index for output in outputs] == list(range(60))
    assert [output.b.index for output in outputs if output.b] == list(range(60))
    for output in outputs[:54]:
        assert output.state == "fused" and abs(output.skew_ms) <= 1000 / 9 / 2 + 1
        assert output.a is not None and output.b is not None
        assert output.a.image.dtype == np.uint16 and output.a.image.max() == 3900  # as it came
        assert output.image.shape == (64, 96, 3) and output.image.dtype == np.uint8
        assert set(output.stages) >= {"wait", "tone", "register", "fuse", "sink"}
    times = [output.time for output in outputs]
    np.testing.assert_allclose(np.diff(times), 1 / 30, atol=1e-6)
    assert sum(output.reused for output in outputs) == 60 - 18
    status = stream.status()
    assert status["frames"] == 60 and status["sources"]["b"]["dropped"] == 0


def test_the_same_twice_is_equal(folders: tuple[str, str]):
    runs = []
    for _ in range(2):
        with Stream(*folders, model="average") as stream:
            runs.append([output.image for output in stream])
    for one, other in zip(*runs, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_real_network(folders: tuple[str, str]):
    """Through runtime.Fuser; the picture is what the Fuser makes of the same two pictures."""
    from runtime import Fuser

    fuser = Fuser("ivif", model="full", threads=1, range="keep")
    with Stream(*folders, fuser=fuser, tone="3000:4000", frames=2) as stream:
        outputs = list(stream)
    reference = Fuser("ivif", model="full", threads=1, range="keep", tone="3000:4000")
    for output in outputs:
        assert output.a is not None and output.b is not None
        expected = reference(output.a.image, output.b.image)
        assert np.abs(output.image.astype(int) - expected).max() <= 1


def test_sinks_and_callbacks_get_every_picture(folders: tuple[str, str], tmp_path: Path):
    seen: list[int] = []

    def note(fused: FusedFrame) -> None:
        seen.append(fused.index)

    out = tmp_path / "out"
    with Stream(*folders, model="average", sinks=[f"file://{out}/?queue_size=1", note], frames=10) as stream:
        status = stream.run()
    assert seen == list(range(10))
    assert len(list(out.glob("*.png"))) == 10
    assert read_image(out / "00000009.png").shape == (64, 96, 3)
    assert [sink["written"] for sink in status["sinks"]] == [10, 10]


def test_a_sink_that_is_stuck_does_not_stop_the_loop():
    go_on = threading.Event()

    def stuck(fused: FusedFrame) -> None:
        go_on.wait(60)

    with Stream(DEMO, model="average", frames=40, sinks=[stuck, "null://"]) as stream:
        assert len(list(stream)) == 40
        go_on.set()
        stream.close()
        first, second = stream.status()["sinks"]
    assert first["written"] + first["dropped"] == second["written"] + second["dropped"] == 40
    assert first["dropped"] == 40 - 1 - 16  # one in work, 16 that wait


class Slow(Average):
    """A network that is too slow for the cameras."""

    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        time.sleep(0.2)
        return super().__call__(a, b)


def test_what_a_slow_network_leaves_out_is_counted():
    with Stream(DEMO, fuser=Slow(), frames=8) as stream:
        outputs = list(stream)
        status = stream.status()
    numbers = [output.b.index for output in outputs if output.b]
    left_out = int(np.sum(np.diff(numbers) - 1))
    assert left_out > 10
    assert left_out <= status["sources"]["b"]["dropped"] <= status["sources"]["b"]["frames"] - 8
    # What comes out is new all the same: the queues hold four pictures at most, and the oldest go.
    assert max(output.age_ms for output in outputs) < 2000


def test_who_iterates_to_the_end_need_not_close():
    before = threading.active_count()
    stream = Stream(DEMO, model="average", frames=5, sinks=["null://"], on_event=lambda event: None)
    assert len(list(stream)) == 5
    assert threading.active_count() == before
    assert stream.status()["frames"] == 5


def test_a_listener_may_ask_fail_and_close():
    """It has a thread of its own: what it does reaches neither the cameras nor the loop."""
    heard = []

    def listener(event: Event) -> None:
        heard.append((event.kind, stream.status()["frames"]) if started.wait(10) else None)
        if len(heard) == 1:
            raise RuntimeError("a listener's own trouble")
        if event.source == "stream":
            stream.close()

    started = threading.Event()
    stream = Stream(DEMO, model="average", duration=60, on_event=listener)
    started.set()
    outputs = list(stream)
    assert outputs and {kind for kind, _ in heard} >= {"open", "fused"}
    assert not [t.name for t in threading.enumerate() if t.name.startswith(("source", "sink", "watchdog"))]


def test_a_sink_that_is_stuck_does_not_outlast_the_duration(folders: tuple[str, str]):
    go_on = threading.Event()

    def stuck(fused: FusedFrame) -> None:
        go_on.wait(60)

    begin = time.monotonic()
    with Stream(*folders, model="average", duration=1, sinks=[stuck]) as stream:
        for _ in stream:
            if time.monotonic() > begin + 0.9:
                go_on.set()  # closing waits for it
    assert time.monotonic() - begin < 10


class LateReader:
    """A camera that is open at once and gives its first picture later, as one that waits for a key frame."""

    corrupt = 0

    def __init__(self, seconds: float):
        self._seconds = seconds

    def open(self, stop: threading.Event) -> None:
        self._stop = stop

    def read(self) -> Capture:
        self._stop.wait(self._seconds)
        self._seconds = 0.03
        return Capture(np.full((48, 64, 3), 90, np.uint8), time.time(), "device")

    def close(self) -> None:
        pass


@pytest.mark.slow
def test_the_output_has_the_size_of_a_master_that_comes_late():
    class LateMaster(Stream):
        def _make_sources(self, a: str, b: str | None, pairing: Pairing) -> dict[str, Source]:
            sources = super()._make_sources(a, b, pairing)
            sources["b"].close()
            late = Source("late", lambda: LateReader(FIRST_PICTURES + 0.8))
            late.wake = sources["a"].wake
            return {"a": sources["a"], "b": late}

    with LateMaster(DEMO, model="average", frames=3) as stream:
        shapes = {output.image.shape for output in stream}
    assert shapes == {(48, 64, 3)}


def test_nothing_that_comes_out_is_a_state():
    log = EventLog()
    health = StreamHealth(log)
    health.look(time.monotonic() + 100)  # nothing came yet
    for _ in range(3):
        health.output("fused", 40.0, 0.0, False, {})
        health.look(time.monotonic())
    assert health.snapshot(0)["state"] == "fused"
    health.look(time.monotonic() + NOTHING_AFTER + 0.1)
    assert health.snapshot(0)["state"] == "waiting"
    health.output("held", 40.0, 0.0, True, {})
    health.look(time.monotonic())
    assert health.snapshot(0)["state"] == "held"
    assert [event.kind for event in log.events()] == ["fused", "waiting", "fused"]


@pytest.mark.parametrize("limit", [{"frames": 12}, {"duration": 1.0}])
def test_it_ends_by_itself(limit: dict[str, Any]):
    with Stream(DEMO, model="average", **limit) as stream:
        status = stream.run()
    assert status["frames"] == 12 if "frames" in limit else status["frames"] > 3
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("source", "sink", "watchdog"))]


def test_stop_from_another_thread():
    stream = Stream(DEMO, model="average")
    threading.Timer(1.0, stream.stop).start()
    outputs = list(stream)
    stream.close()
    assert outputs


class FakeCamera:
    """A camera in shared memory that the test switches on and off."""

    def __init__(self, name: str, fps: float, make: Any):
        self.name, self._fps, self._make = name, fps, make
        self._writer = ShmWriter(name)
        self._stop = threading.Event()
        self.on = threading.Event()
        self.on.set()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(1 / self._fps):
            if self.on.is_set():
                self._writer.write(self._make(number), time.time(), number)
            number += 1

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._writer.close()


def wait_for(stream: Stream, outputs: list[FusedFrame], state: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    count = len(outputs)
    while not any(output.state == state for output in outputs[count:]):
        assert time.monotonic() < deadline, f"{state} did not come; {stream.events.events()}"
        time.sleep(0.02)


def test_a_camera_that_goes_and_comes_back(tmp_path: Path):
    def noisy(number: int) -> np.ndarray:
        return np.random.default_rng(number).integers(3000, 3900, (32, 48)).astype(np.uint16)

    def bright(number: int) -> np.ndarray:
        return np.random.default_rng(number).integers(100, 255, (64, 96, 3), dtype=np.uint8)

    a = FakeCamera(f"refusion-{tmp_path.name}-a", 9, noisy)
    b = FakeCamera(f"refusion-{tmp_path.name}-b", 20, bright)
    outputs: list[FusedFrame] = []
    try:
        stream = Stream(f"shm://{a.name}", f"shm://{b.name}", model="average", pairing=Pairing(max_age_ms=400))
        thread = threading.Thread(target=lambda: outputs.extend(stream))
        thread.start()
        wait_for(stream, outputs, "fused")
        a.on.clear()
        wait_for(stream, outputs, "a_missing")
        time.sleep(1.5)
        a.on.set()
        wait_for(stream, outputs, "fused")
        b.on.clear()
        wait_for(stream, outputs, "b_missing")
        time.sleep(1)
        b.on.set()
        wait_for(stream, outputs, "fused")
        stream.close()
        thread.join(20)
    finally:
        a.close()
        b.close()
    assert {output.image.shape for output in outputs} == {(64, 96, 3)}
    passed = [output for output in outputs if output.state == "a_missing" and output.b]
    np.testing.assert_array_equal(passed[-1].image, passed[-1].b.image)  # type: ignore[union-attr]
    alone = [output.image for output in outputs if output.state == "b_missing"]
    assert alone[-1].std() > 20 and np.array_equal(alone[-1][..., 0], alone[-1][..., 2])
    kinds = [(event.source.split()[0], event.kind) for event in stream.events.events()]
    for side in ("a", "b"):
        of_side = [kind for source, kind in kinds if source == side]
        assert of_side[:3] == ["open", "silent", "ok"]
    assert [kind for source, kind in kinds if source == "stream"] == [
        "fused", "a_missing", "fused", "b_missing", "fused"
    ]  # fmt: skip


def frame(image: np.ndarray, index: int = 0) -> Frame:
    return Frame(image, float(index), "device", float(index), index, "camera")


def test_the_output_keeps_its_size_and_its_colour():
    fusion = LiveFusion(Average())
    grey = np.random.default_rng(0).integers(0, 255, (30, 40), dtype=np.uint8)
    shapes = []
    for number, (a, b) in enumerate(((grey, visible(0)), (grey[::2, ::2], visible(1)[::2, ::2]), (grey, None))):
        pair = Pair(frame(a, number), None if b is None else frame(b, number), "fused")
        shapes.append(fusion(pair, {}).shape)
    assert shapes == [(64, 96, 3)] * 3
    fusion.change({"chroma": "none"})
    assert fusion(Pair(frame(grey, 9), frame(visible(2)), "fused"), {}).shape == (64, 96)


def half_as_large(reference: str = "b") -> Calibration:
    """A thermal camera of half the resolution that sees columns 20 to 80 and rows 10 to 50 of the visible one's."""
    homography = np.array([[2, 0, 20], [0, 2, 10], [0, 0, 1]], float)
    return Calibration(Camera((20, 30)), Camera((64, 96)), homography, "target", reference)


@pytest.mark.parametrize("counts", [False, True])
def test_registration_aligns_and_what_one_camera_alone_sees_stays(counts: bool):
    calibration, made = half_as_large(), []

    def make(size_a: tuple[int, int], size_b: tuple[int, int]) -> Registration:
        made.append((size_a, size_b))
        return Registration(calibration, size_a, size_b)

    fusion = LiveFusion(Average(range="keep", chroma="none"), make, "full")
    b = np.full((64, 96), 40, np.uint8)
    a = np.full((20, 30), 80, np.uint8)
    a[8:12, 10:14] = 240
    if counts:
        a = a.astype(np.uint16) * 257
    for number in range(3):
        fused = fusion(Pair(frame(a, number), frame(b, number), "fused"), {})
    assert made == [((20, 30), (64, 96))]
    assert (fused[:8] == 40).all() and (fused[:, :18] == 40).all() and (fused[:, 82:] == 40).all()  # not darker
    assert fused[30, 46] == 140 and fused[20, 30] == 60
    alone = fusion(Pair(frame(a, 5), None, "b_missing"), {})
    assert alone[30, 46] == 240 and alone[20, 30] == 80 and alone[0, 0] == 0
    np.testing.assert_array_equal(fusion(Pair(None, frame(b, 6), "a_missing"), {}), b)


def test_the_thermal_camera_as_reference():
    calibration = half_as_large("a")
    fusion = LiveFusion(Average(range="keep"), partial(Registration, calibration), "full")
    fused = fusion(Pair(frame(np.full((20, 30), 80, np.uint8)), frame(visible(0)), "fused"), {})
    assert fused.shape == (20, 30, 3)


def test_a_calibration_file(folders: tuple[str, str], tmp_path: Path):
    moved = np.array([[1, 0, 12], [0, 1, 0], [0, 0, 1]], float)
    calibration = Calibration(Camera((64, 96)), Camera((64, 96)), moved, "target")
    save_calibration(tmp_path / "pair.yaml", calibration)
    options = {"model": "average", "chroma": "none", "range": "keep", "tone": "3000:4000", "frames": 1}
    images = []
    for file in (None, tmp_path / "pair.yaml"):
        with Stream(*folders, calibration=file, **options) as stream:
            images.append(next(iter(stream)).image.astype(int))
    # What is warm is 12 pixels further to the right; the visible picture, with its dark stripe at the left, is not.
    np.testing.assert_array_equal(images[1][30, 14:40], images[0][30, 2:28])
    assert images[0][30, 2] > images[0][30, 20] + 50


def test_policies_change_while_it_runs(folders: tuple[str, str]):
    with Stream(*folders, model="average", range="keep", tone="0:65535") as stream:
        pictures = iter(stream)
        dark = next(pictures)
        assert stream.control({}) == {"range": "keep", "chroma": "auto", "tone": "0:65535", "on_missing": "hold"}
        answer = stream.control({"tone": "3000:4000", "range": "stretch", "chroma": "none", "on_missing": "skip"})
        assert answer == {"range": "stretch", "chroma": "none", "tone": "3000:4000", "on_missing": "skip"}
        bright = next(pictures)
        assert dark.image.ndim == 3 and dark.image.max() < 150
        assert bright.image.ndim == 2 and (bright.image.min(), bright.image.max()) == (0, 255)
        for wrong in ({"range": "loud"}, {"tone": "5:1"}, {"on_missing": "cry"}, {"chroma": "c"}, {"speed": 2}):
            with pytest.raises(InputError):
                stream.control({"chroma": "a", **wrong})
        assert stream.control({}) == answer


def test_a_policy_that_the_model_has_built_in_stays():
    class BuiltIn(Average):
        @property
        def range(self) -> str:
            return "keep"

        @range.setter
        def range(self, policy: str) -> None:
            if policy != "keep":
                raise InputError("range keep is built in")

    fusion = LiveFusion(BuiltIn("keep"))
    before = fusion.policy
    with pytest.raises(InputError, match="built in"):
        fusion.change({"range": "stretch", "tone": "clahe", "chroma": "a"})
    assert fusion.policy == before
    fusion.change({"tone": "clahe"})
    assert fusion.policy == {**before, "tone": "clahe"}


def test_the_status_while_it_runs():
    with Stream(DEMO, model="average", frames=20) as stream:
        for _ in stream:
            read = json.loads(json.dumps(stream.status()))
        prometheus_text(stream.status())
    assert read["sources"]["a"]["name"] == "demo://night/infrared"
    assert read["sources"]["b"]["size"] == "96x64" and read["sources"]["b"]["clock"] == "device"
    assert read["model"] == "average" and read["stages_ms"]["fuse"]["p50"] > 0
    assert read["state"] in ("fused", "held")


def command(*arguments: str, script: bool = False) -> list[str]:
    start = [str(ROOT / "runtime" / "stream.py")] if script else ["-m", "refusion", "stream"]
    return [sys.executable, *start, *arguments]


def run(*arguments: str, script: bool = False) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, script=script), capture_output=True, text=True, timeout=120, check=False, cwd=ROOT / "docs"
    )


@pytest.mark.parametrize("script", [False, True])
def test_the_command_line(tmp_path: Path, script: bool):
    out = tmp_path / "out"
    outputs = ["--sink", f"file://{out}/", "--json", f"{tmp_path}/s.json"]
    result = run(DEMO, "--model", "average", "--frames", "8", *outputs, script=script)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^8 frames in [0-9.]+ s, model average: ", result.stdout)
    assert len(list(out.glob("*.png"))) == 8
    assert json.loads((tmp_path / "s.json").read_text())["frames"] == 8
    assert "refusion: a demo://night/infrared open" in result.stderr
    assert f"refusion: model average (no network)\nrefusion: to file://{out}/\n" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_a_summary_and_whole_files(tmp_path: Path, number: signal.Signals):
    video = tmp_path / "out.mp4"
    process = subprocess.Popen(
        command(DEMO, "--model", "average", "--sink", f"file://{video}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:  # type: ignore[union-attr]
        if "stream fused" in line:
            break
    time.sleep(1)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "frames in" in output and "Traceback" not in errors
    frames = int(output.split()[0])
    capture = cv2.VideoCapture(str(video))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) >= min(frames, 3)
    assert os.listdir(tmp_path) == ["out.mp4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo://night/infrared"], "two sources are needed"),
        (["demo://day"], "two sources are needed"),
        (["v4l2:///dev/video77", "demo://night/visible"], "no such camera"),
        (["/dev/video0", "demo://night/visible"], "has no scheme"),
        ([DEMO, "--model", "average", "--sink", "ftp://x"], "unknown sink 'ftp://'"),
        ([DEMO, "--model", "average", "--sink", "file:///proc/no/out.mp4"], "cannot be written"),
        ([DEMO, "--model", "average", "--tone", "loud"], "tone 'loud'"),
        ([DEMO, "--model", "average", "--range", "loud"], "unknown range policy 'loud'"),
        ([DEMO, "--model", "average", "--frames", "0"], "number of frames is 0"),
        ([DEMO, "--model", "average", "--duration", "-1"], "duration is -1"),
        ([DEMO, "--model", "nosuch"], "unknown model 'nosuch'"),
        ([DEMO, "--max-age-ms", "1"], "max_age_ms"),
        ([DEMO, "--on-missing", "cry"], "unknown on_missing 'cry'"),
        ([DEMO, "--estimate-offset", "--duration", "1"], "give 5 or more"),
        ([DEMO, "--estimate-offset", "--duration", "nan"], "give 5 or more"),
        ([DEMO, "--model", "average", "--threads", "0"], "number of threads is 0"),
        ([DEMO, "--model", "average", "--backend", "nosuch"], "unknown backend"),
        ([DEMO, "--model", "average", "--json", "/proc/no/s.json"], "/proc/no/s.json: cannot be written"),
        ([DEMO, "--model", "average", "--json", "/tmp"], "/tmp: cannot be written"),
        ([DEMO, "--queue-size", "many"], "invalid int value"),
        ([DEMO, "--model", "average", "--calibration", "/no/such.yaml"], "/no/such.yaml"),
    ],
)
def test_bad_use_is_one_line_and_exit_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["stream", *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len([line for line in errors.splitlines() if not re.search(r" open$", line)]) == 1, errors


@pytest.mark.parametrize(
    "arguments",
    [
        ["rtsp://admin:hunter2@127.0.0.1:1/x", "demo://night/visible", "rtsp://admin:hunter2@h/x"],
        ["rtsp://admin:hunter2@127.0.0.1:1/x", "demo://night/visible"],
        ["rtsp://127.0.0.1:1/x?user=admin&password=hunter2", "demo://night/visible"],
        ["rtsp://127.0.0.1:1/user=admin_password=hunter2_channel=1", "demo://night/visible"],
        ["rtsp://admin:p#hunter2@127.0.0.1:1/x", "demo://night/visible"],
        [DEMO, "--model", "average", "--sink", "rtsp://admin:hunter2@127.0.0.1/x"],
        [DEMO, "--model", "average", "--sink", "http://0.0.0.0:1?token=hunter2"],
        [DEMO, "--frames", "rtsp://admin:hunter2@h/x"],
    ],
)
@pytest.mark.parametrize("script", [False, True])
def test_a_password_is_never_printed(arguments: list[str], script: bool):
    result = run(*arguments, script=script)
    assert result.returncode == 2
    assert "hunter2" not in result.stdout + result.stderr and "admin:" not in result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr


def test_examples_in_messages_stay(capsys: pytest.CaptureFixture[str]):
    for sink, example in (
        ("rtsp://0.0.0.0:8554/x", "rtsp://USER:PASSWORD@0.0.0.0:8554/x"),
        ("http://0.0.0.0:8000", "?token=..."),
    ):
        assert main(["stream", DEMO, "--model", "average", "--sink", sink]) == 2
        assert example in capsys.readouterr().err


def test_help_is_there_and_names_everything():
    text = run("--help").stdout
    for option in ("--sink", "--calibration", "--tone", "--max-skew-ms", "--hold-ms", "--max-age-ms", "--one-to-one",
                   "--clock-offset-ms", "--on-missing", "--queue-size", "--estimate-offset", "--duration"):  # fmt: skip
        assert option in text
