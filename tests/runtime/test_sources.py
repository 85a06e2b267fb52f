"""Sources by URI: what comes out is what was recorded, at the time it says; and what a bad URI gives."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from runtime.errors import InputError
from runtime.frames import Frame
from runtime.images import write_image
from runtime.shm import ShmWriter
from runtime.sources import Capture, Playback, Source, SourceLostError, open_source, resolve_pair
from runtime.sources.base import OPEN_TIMEOUT, StampCheck
from runtime.sources.decoding import planar_step, raw_image
from runtime.sources.demo import DemoCamera
from runtime.sources.gstreamer import csi_pipeline
from runtime.tone import StreamTone

SIZE = (48, 64)


def counts(number: int) -> np.ndarray:
    """A 14-bit thermal picture with values far above 255."""
    return (np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) * 13 % 16384 + number).astype(np.uint16)


def picture(number: int) -> np.ndarray:
    image = np.zeros((*SIZE, 3), np.uint8)
    image[:, 2 * number : 2 * number + 10] = (30, 200, 90)
    return image


def write_video(path: Path, images: list[np.ndarray], fps: int, codec: str, pixels: str) -> Path:
    av = pytest.importorskip("av")
    formats = {np.dtype(np.uint16): "gray16le", np.dtype(np.uint8): "gray" if images[0].ndim == 2 else "bgr24"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pixels
        for image in images:
            frame = av.VideoFrame.from_ndarray(image, format=formats[image.dtype])
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def collect(source: Source, limit: int | None = None, timeout: float = 30) -> list[Frame]:
    """Open a source and take its pictures until it ends."""
    frames: list[Frame] = []
    deadline = time.monotonic() + timeout
    source.start()
    try:
        while not source.ended and (limit is None or len(frames) < limit):
            assert time.monotonic() < deadline, f"{source.name} gave {len(frames)} pictures in {timeout} s"
            source.wake.clear()
            frame = source.take()
            if frame is None:
                source.wake.wait(0.05)
            else:
                frames.append(frame)
    finally:
        source.close()
    return frames


@pytest.mark.parametrize("reader", ["pyav", "opencv"])
def test_y16_in_ffv1_is_untouched_until_the_tone_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str):
    recorded = [counts(number) for number in range(5)]
    path = write_video(tmp_path / "thermal.mkv", recorded, 9, "ffv1", "gray16le")
    if reader == "opencv":  # as where the package av is not installed
        monkeypatch.setattr("runtime.sources.recording.has_pyav", lambda: False)
    frames = collect(open_source(f"file://{path}?realtime=0"))
    assert len(frames) == 5
    for frame, image in zip(frames, recorded, strict=True):
        assert frame.image.dtype == np.uint16 and frame.image.max() > 255
        np.testing.assert_array_equal(frame.image, image)
    steps = np.diff([frame.time for frame in frames])
    np.testing.assert_allclose(steps, 1 / 9, atol=0.002)
    toned = StreamTone("1000:5000")(frames[0].image, frames[0].time)
    expected = np.clip((recorded[0].astype(float) - 1000) / 4000, 0, 1) * 65535
    np.testing.assert_allclose(toned, expected, atol=0.51)


@pytest.mark.parametrize("reader", ["pyav", "opencv"])
def test_a_colour_video_and_its_luma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str):
    path = write_video(tmp_path / "visible.mkv", [picture(number) for number in range(4)], 30, "libx264", "yuv444p")
    if reader == "opencv":
        monkeypatch.setattr("runtime.sources.recording.has_pyav", lambda: False)
    frames = collect(open_source(f"file://{path}?realtime=0"))
    grey = collect(open_source(f"file://{path}?realtime=0&grey=1"))
    assert [frame.index for frame in frames] == [0, 1, 2, 3]
    assert frames[3].image.shape == (*SIZE, 3) and grey[3].image.shape == SIZE
    assert np.abs(frames[3].image.astype(int) - picture(3)).mean() < 8
    assert grey[3].image[:, 8:14].mean() > grey[3].image[:, 30:].mean() + 80


def test_a_folder_of_pictures_in_the_order_of_their_numbers(tmp_path: Path):
    for number in (1, 2, 10):
        write_image(tmp_path / f"frame{number}.png", counts(number))
    (tmp_path / "frame3.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (tmp_path / "notes.txt").write_text("not a picture")
    source = open_source(f"file://{tmp_path}?realtime=0&fps=10")
    frames = collect(source)
    assert [int(frame.image[0, 0]) for frame in frames] == [1, 2, 10]
    assert frames[0].clock == "file"
    # The broken one takes its time all the same, or all that follow would be early against another camera.
    np.testing.assert_allclose(np.diff([frame.time for frame in frames]), [0.1, 0.2], atol=1e-6)
    assert source.snapshot(time.monotonic())["corrupt"] == 1


def test_a_recording_begins_with_the_first_picture_that_can_be_read(tmp_path: Path):
    (tmp_path / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    write_image(tmp_path / "1.png", counts(1))
    playback = Playback()
    source = open_source(f"file://{tmp_path}?realtime=0&fps=10", playback=playback)
    (frame,) = collect(source)
    assert frame.time - playback.unix == pytest.approx(0.1) and source.snapshot(0)["corrupt"] == 1
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(InputError, match="no picture in it can be read"):
        open_source(f"file://{tmp_path}?realtime=0").start()


@pytest.mark.parametrize("kind", ["folder", "video"])
def test_recordings_of_different_length_begin_again_together(tmp_path: Path, kind: str):
    playback, starts = Playback(), {}
    sources = {}
    for name, count in (("a", 20), ("b", 23)):
        if kind == "folder":
            for number in range(count):
                write_image(tmp_path / name / f"{number}.png", counts(number))
            address = f"{tmp_path / name}?fps=20"
        else:
            path = tmp_path / f"{name}.mkv"
            address = f"{write_video(path, [picture(number) for number in range(count)], 20, 'ffv1', 'bgr0')}?"
        sources[name] = open_source(f"file://{address}&loop=1&realtime=0", playback=playback)
    for (name, source), count in zip(sources.items(), (20, 23), strict=True):
        times = [frame.time - playback.unix for frame in collect(source, limit=3 * count)]
        starts[name] = times[::count]
        assert np.all(np.diff(times) > 0)
    np.testing.assert_allclose(starts["a"], [0, 1.15, 2.3], atol=1e-3)
    np.testing.assert_allclose(starts["b"], starts["a"], atol=1e-3)


def test_a_recording_is_played_at_its_own_pace_and_begins_again(tmp_path: Path):
    for number in range(3):
        write_image(tmp_path / f"{number}.png", counts(number))
    frames = collect(open_source(f"file://{tmp_path}?fps=20&loop=1"), limit=7)
    assert [int(frame.image[0, 0]) for frame in frames] == [0, 1, 2, 0, 1, 2, 0]
    assert frames[-1].arrival - frames[0].arrival >= 0.29
    np.testing.assert_allclose(np.diff([frame.time for frame in frames]), 0.05, atol=1e-6)


def test_two_recordings_share_a_clock(tmp_path: Path):
    playback = Playback()
    for name, fps in (("a", 9), ("b", 30)):
        write_image(tmp_path / name / "0.png", counts(0))
        (frame,) = collect(open_source(f"file://{tmp_path / name}?realtime=0&fps={fps}", playback=playback))
        assert frame.time == playback.unix


def test_the_queue_drops_the_oldest_and_counts(tmp_path: Path):
    for number in range(12):
        write_image(tmp_path / f"{number:02}.png", counts(number))
    source = open_source(f"file://{tmp_path}?fps=1000", queue_size=3)
    source.start()
    deadline = time.monotonic() + 20
    while source.snapshot(0)["frames"] < 12 and time.monotonic() < deadline:
        time.sleep(0.01)
    left = [source.take() for _ in range(3)]
    assert [int(frame.image[0, 0]) for frame in left if frame] == [9, 10, 11]
    assert source.take() is None and source.ended
    assert source.dropped == 9
    source.close()


def test_a_lossless_recording_waits_for_whoever_takes(tmp_path: Path):
    for number in range(12):
        write_image(tmp_path / f"{number:02}.png", counts(number))
    source = open_source(f"file://{tmp_path}?realtime=0", queue_size=2)
    source.start()
    time.sleep(0.3)
    assert source.snapshot(0)["frames"] <= 3
    source.close()
    assert [frame.index for frame in collect(open_source(f"file://{tmp_path}?realtime=0", queue_size=2))] == [
        *range(12)
    ]


def test_shared_memory(tmp_path: Path):
    name = f"refusion-test-{tmp_path.name}"
    writer = ShmWriter(name)
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.wait(0.02):
            writer.write(counts(number), time.time(), number)
            number += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        frames = collect(open_source(f"shm://{name}"), limit=5)
    finally:
        stop.set()
        thread.join()
        writer.close()
    for frame in frames:
        assert frame.clock == "device" and frame.image.dtype == np.uint16
        np.testing.assert_array_equal(frame.image, counts(int(frame.image[0, 0])))
        assert 0 <= time.time() - frame.time < 30
    assert not any(thread.name.startswith("source") for thread in threading.enumerate())


IMAGE_DEFINITION = """std_msgs/Header header
uint32 height
uint32 width
string encoding
uint8 is_bigendian
uint32 step
uint8[] data
================================================================================
MSG: std_msgs/Header
builtin_interfaces/Time stamp
string frame_id
================================================================================
MSG: builtin_interfaces/Time
int32 sec
uint32 nanosec
"""
COMPRESSED_DEFINITION = (
    "std_msgs/Header header\nstring format\nuint8[] data\n" + IMAGE_DEFINITION.partition("data\n")[2]
)


def write_bag(path: Path) -> Path:
    """Thermal mono16 at 9 Hz and visible JPEG at 30 Hz, stamped by a common clock."""
    pytest.importorskip("mcap")
    writer_module = pytest.importorskip("mcap_ros2.writer")
    with path.open("wb") as file:
        writer = writer_module.Writer(file)
        image = writer.register_msgdef("sensor_msgs/msg/Image", IMAGE_DEFINITION)
        compressed = writer.register_msgdef("sensor_msgs/msg/CompressedImage", COMPRESSED_DEFINITION)
        for number in range(9):
            stamp = 1_700_000_000_000_000_000 + number * 1_000_000_000 // 9
            header = {"stamp": {"sec": stamp // 10**9, "nanosec": stamp % 10**9}, "frame_id": "thermal"}
            height, width = SIZE
            message = {"header": header, "height": height, "width": width, "encoding": "mono16", "is_bigendian": 0,
                       "step": 2 * width, "data": counts(number).tobytes()}  # fmt: skip
            writer.write_message("/thermal/image_raw", image, message, stamp, stamp)
        for number in range(30):
            stamp = 1_700_000_000_050_000_000 + number * 1_000_000_000 // 30
            header = {"stamp": {"sec": stamp // 10**9, "nanosec": stamp % 10**9}, "frame_id": "visible"}
            data = cv2.imencode(".png", picture(number % 20))[1].tobytes()
            message = {"header": header, "format": "png", "data": data}
            writer.write_message("/visible/image_raw/compressed", compressed, message, stamp, stamp)
        writer.finish()
    return path


def test_a_bag(tmp_path: Path):
    bag = write_bag(tmp_path / "night.mcap")
    playback = Playback()
    options = {"playback": playback, "queue_size": 4}
    thermal = collect(open_source(f"mcap://{bag}?topic=/thermal/image_raw&realtime=0", **options))
    visible = collect(open_source(f"mcap://{bag}?topic=/visible/image_raw/compressed&realtime=0", **options))
    assert len(thermal) == 9 and len(visible) == 30
    for number, frame in enumerate(thermal):
        np.testing.assert_array_equal(frame.image, counts(number))
    np.testing.assert_array_equal(visible[7].image, picture(7))
    # By the messages' own stamps, which both topics share: the visible camera began 50 ms later.
    assert visible[0].time - thermal[0].time == pytest.approx(0.05, abs=1e-6)
    assert visible[-1].time - visible[0].time == pytest.approx(29 / 30, abs=1e-6)


def test_a_bag_with_two_topics_asks_which(tmp_path: Path):
    bag = write_bag(tmp_path / "night.mcap")
    with pytest.raises(InputError, match=r"which topic\?; it has /thermal/image_raw, /visible/image_raw/compressed"):
        open_source(f"mcap://{bag}")
    with pytest.raises(InputError, match="no topic /depth"):
        open_source(f"mcap://{bag}?topic=/depth")


@pytest.mark.parametrize("content", ["half", b"", b"\x00\x01", bytes(range(256)) * 8, b"\x89MCAP0\r\n"])
def test_what_is_no_whole_bag_is_one_line(tmp_path: Path, content: str | bytes):
    broken = tmp_path / "broken.mcap"
    broken.write_bytes(write_bag(tmp_path / "night.mcap").read_bytes()[:2000] if content == "half" else content)
    with pytest.raises(InputError, match=r"not a whole bag|has no index|cannot be opened"):
        open_source(f"mcap://{broken}")


def test_a_bag_with_a_channel_that_has_no_schema(tmp_path: Path):
    from mcap.writer import Writer

    with (tmp_path / "plain.mcap").open("wb") as file:
        writer = Writer(file)
        writer.start()
        channel = writer.register_channel("/notes", "json", 0)
        writer.add_message(channel, 1, b"{}", 1)
        writer.finish()
    with pytest.raises(InputError, match="none with pictures"):
        open_source(f"mcap://{tmp_path / 'plain.mcap'}")


def test_the_demo_has_both_cameras_on_one_clock():
    uris = resolve_pair("demo://night?size=64x48&fps=15", None)
    assert uris == ("demo://night/infrared?size=64x48&fps=15", "demo://night/visible?size=64x48&fps=15")
    infrared, visible = (collect(open_source(uri), limit=6) for uri in uris)
    assert infrared[0].image.shape == (48, 64) and visible[0].image.shape == (48, 64, 3)
    for frames in (infrared, visible):
        ticks = np.array([frame.time for frame in frames]) * 15
        np.testing.assert_allclose(ticks, np.round(ticks), atol=1e-3)
        assert np.diff(ticks).min() > 0.5
        assert frames[0].clock == "device"
        assert any(np.any(frame.image != frames[0].image) for frame in frames[1:])


class _Steps:
    """A clip that tells which picture was asked for."""

    def picture(self, number: int, camera: int) -> np.ndarray:
        return np.full((2, 2), number % 200, np.uint8)


def test_demo_cameras_of_different_rates_show_the_same_moment():
    stop = threading.Event()
    shown: dict[float, list[int]] = {}

    def look(camera: DemoCamera) -> None:
        camera.open(stop)
        while not stop.is_set():
            capture = camera.read()
            if capture is not None:
                shown.setdefault(round(capture.time, 3), []).append(int(capture.image[0, 0]))

    cameras = DemoCamera(_Steps(), 0, 10, 0), DemoCamera(_Steps(), 1, 30, 0)
    threads = [threading.Thread(target=look, args=(camera,)) for camera in cameras]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while sum(len(numbers) == 2 for numbers in list(shown.values())) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    assert sum(len(numbers) == 2 for numbers in shown.values()) >= 3
    assert all(len(set(numbers)) == 1 for numbers in shown.values())


class FakeCamera:
    """A camera that gives a few pictures, then breaks, again and again."""

    def __init__(self, pictures: int):
        self.corrupt = 0
        self._left = pictures

    def open(self, stop: threading.Event) -> None:
        pass

    def read(self) -> Capture:
        if not self._left:
            raise SourceLostError("the cable of user:hunter2 was pulled")
        self._left -= 1
        time.sleep(0.01)
        return Capture(np.full((4, 4), self._left, np.uint8))

    def close(self) -> None:
        pass


def test_a_camera_that_is_lost_is_opened_again():
    events = []
    source = Source("camera", lambda: FakeCamera(3), secrets=["hunter2"])
    source.health.report = lambda kind, detail: events.append((kind, detail))
    frames = collect(source, limit=7, timeout=20)
    assert [int(frame.image[0, 0]) for frame in frames] == [2, 1, 0, 2, 1, 0, 2]
    assert [frame.index for frame in frames] == [*range(7)]
    kinds = [kind for kind, _ in events]
    assert kinds[:5] == ["open", "lost", "reconnected", "lost", "reconnected"]
    assert events[1][1] == "the cable of user:*** was pulled"


def test_empty_pictures_are_counted_and_left_out():
    class Corrupt(FakeCamera):
        def read(self) -> Capture:
            capture = super().read()
            return Capture(np.empty((0, 4), np.uint8)) if self._left == 1 else capture

    source = Source("camera", lambda: Corrupt(3), queue_size=8)
    frames = collect(source, limit=2)
    assert [int(frame.image[0, 0]) for frame in frames] == [2, 0]
    assert source.snapshot(0)["corrupt"] == 1


def test_a_stuck_reader_is_left_behind_and_ends_when_its_read_returns():
    release = threading.Event()
    made = []

    class Stuck(FakeCamera):
        def read(self) -> Capture:
            if len(made) == 1 and self._left == 1:
                release.wait(30)
            return super().read()

    def make() -> Stuck:
        made.append(Stuck(3 if not made else 1000))
        return made[-1]

    source = Source("camera", make)
    source.start()
    try:
        deadline = time.monotonic() + 20
        while len(made) < 2 and time.monotonic() < deadline:
            source.take()
            source.look(time.monotonic())
            time.sleep(0.05)
        assert len(made) == 2
        while source.snapshot(0)["state"] != "ok" and time.monotonic() < deadline:
            time.sleep(0.02)
        assert source.snapshot(0)["state"] == "ok"
        release.set()
    finally:
        source.close()
    assert not any(thread.name == "source camera" for thread in threading.enumerate())


def test_a_clock_that_was_never_set_is_refused():
    check = StampCheck()
    assert not check.believes(1000.0, 1.7e9)
    good = StampCheck()
    for k in range(300):
        assert good.believes(1.7e9 + k / 30 - 0.2, 1.7e9 + k / 30)
    assert good.believes(1.7e9 + 5, 1.7e9 + 10)  # one that was long on its way keeps its stamp
    ahead = StampCheck()
    assert not ahead.believes(1.7e9 + 3, 1.7e9)


def test_a_clock_that_runs_ahead_is_reported_though_it_is_not_believed():
    class Jumps(FakeCamera):
        def read(self) -> Capture:
            ahead = 3.0 if self._left <= 5 else 0.0
            return super().read()._replace(time=time.time() + ahead, clock="device")

    source, events = Source("jumps", lambda: Jumps(10), live=False, queue_size=16), []
    source.health.report = lambda kind, detail: events.append((kind, detail))
    frames = collect(source)
    assert [frame.clock for frame in frames] == ["device"] * 5 + ["arrival"] * 5
    jumps = [detail for kind, detail in events if kind == "clock_jump"]
    assert len(jumps) == 1 and jumps[0].startswith("its clock moved by +")
    assert source.snapshot(0)["clock_refused"] == 5


@pytest.mark.parametrize("age", [10.0, -10.0])
def test_a_picture_that_was_there_before_is_not_a_new_one(age: float):
    """Of a sender that stands still or died; what it writes from now on is taken, whatever its clock says."""
    name = f"refusion-test-{os.getpid()}-stale"
    writer = ShmWriter(name)
    try:
        writer.write(counts(1), time.time() - age, 0)
        source = open_source(f"shm://{name}?wait=0.6")
        with pytest.raises(InputError, match="nobody writes it"):
            source.start()
        source = open_source(f"shm://{name}?wait=20")
        threading.Timer(0.5, lambda: writer.write(counts(2), time.time() - age, 1)).start()
        (frame,) = collect(source, limit=1)
        assert frame.image[0, 0] == 2 and frame.clock == "arrival"
    finally:
        writer.close()


class HangsInOpen(FakeCamera):
    """Opens well once; the second time it hangs, the third time it is well again."""

    opened = 0

    def open(self, stop: threading.Event) -> None:
        type(self).opened += 1
        if type(self).opened == 2:
            stop.wait(60)


def test_a_reopening_that_hangs_is_replaced():
    HangsInOpen.opened = 0
    source = Source("camera", lambda: HangsInOpen(3))
    source.start()
    try:
        deadline = time.monotonic() + 30
        while HangsInOpen.opened < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        source.look(time.monotonic())
        assert HangsInOpen.opened == 2 and source.snapshot(0)["state"] == "lost"
        source.look(time.monotonic() + OPEN_TIMEOUT)
        while source.snapshot(0)["state"] != "ok" and time.monotonic() < deadline:
            time.sleep(0.02)
        assert HangsInOpen.opened == 3
    finally:
        source.close()


def test_a_recording_that_waits_for_a_slow_network_is_not_silent(tmp_path: Path):
    for number in range(8):
        write_image(tmp_path / f"{number}.png", counts(number))
    source, events = open_source(f"file://{tmp_path}?realtime=0", queue_size=2), []
    source.health.report = lambda kind, detail: events.append(kind)
    source.start()
    source.look(time.monotonic() + 100)
    source.close()
    assert "silent" not in events


@pytest.mark.parametrize("encoding", ["I420", "YV12", "NV12"])
@pytest.mark.parametrize("size", [(6, 8), (8, 66), (7, 9)])
def test_planes_with_padded_rows(encoding: str, size: tuple[int, int]):
    height, width = size
    rng = np.random.default_rng(0)
    luma = rng.integers(0, 256, size, dtype=np.uint8)
    u, v = rng.integers(0, 256, (2, (height + 1) // 2, (width + 1) // 2), dtype=np.uint8)

    def padded(plane: np.ndarray, step: int) -> bytes:
        return np.pad(plane, ((0, 0), (0, step - plane.shape[1])), constant_values=77).tobytes()

    step, half = -(-width // 4) * 4, -(-u.shape[1] // 4) * 4
    if encoding == "NV12":
        data = padded(luma, step) + padded(np.dstack([u, v]).reshape(len(u), -1), step)
    else:
        data = padded(luma, step) + b"".join(padded(p, half) for p in ((u, v) if encoding == "I420" else (v, u)))
    assert planar_step(encoding, height, width, len(data)) == step
    image = raw_image(data, encoding, height, width, step)
    even = height // 2 * 2, width // 2 * 2
    tight = np.concatenate([p[: even[0] // k, : even[1] // k].ravel() for p, k in ((luma, 1), (u, 2), (v, 2))])
    expected = cv2.cvtColor(tight.reshape(even[0] * 3 // 2, even[1]), cv2.COLOR_YUV2BGR_I420)
    np.testing.assert_array_equal(image, expected)


def test_raw_formats():
    rng = np.random.default_rng(0)
    bgr = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    rows = np.zeros((6, 8 * 3 + 5), np.uint8)  # rows that are padded
    rows[:, : 8 * 3] = bgr[..., ::-1].reshape(6, -1)
    np.testing.assert_array_equal(raw_image(rows.tobytes(), "rgb8", 6, 8, rows.shape[1]), bgr)
    grey = rng.integers(0, 65536, (6, 8)).astype(np.uint16)
    np.testing.assert_array_equal(raw_image(grey.astype(">u2").tobytes(), "mono16", 6, 8, 16, big_endian=True), grey)
    image = raw_image(grey.tobytes(), "GRAY16_LE", 6, 8, 16)
    np.testing.assert_array_equal(image, grey)
    assert image.flags.writeable and image.dtype.isnative


def test_the_pipeline_of_a_jetson():
    pipeline = csi_pipeline(1, (720, 1280), 30)
    assert pipeline.startswith("nvarguscamerasrc sensor-id=1 ! video/x-raw(memory:NVMM),width=1280,height=720")
    assert "appsink" in pipeline and "drop=true" in pipeline


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("night.mp4", "has no scheme"),
        ("http://127.0.0.1/x", "unknown source 'http://'"),
        ("file:///no/such/file.mp4", "no such file or folder"),
        ("file://", "no such file"),
        ("file://~nosuchuser/x.mp4", "no file can have this name"),
        (f"file:///tmp/{'x' * 300}.mp4", "no file can have this name"),
        ("file:///tmp/x%00.mp4", "no such file or folder|no file can have this name"),
        ("mcap://~nosuchuser/x.mcap", "no file can have this name"),
        ("file:///tmp?fps=0.5.1", "fps=0.5.1"),
        ("file:///tmp?speed=2", "no option 'speed'"),
        ("v4l2:///dev/video77", "no such camera"),
        ("v4l2:///dev/null?format=y17", "format=y17"),
        ("v4l2:///dev/video0?size=640", "is no size"),
        ("csi://front", "give the number of the sensor"),
        ("rtsp://", "needs a host"),
        ("rtsp://h:port/x", "port"),
        ("rtsp://admin:p#hunter2@h/x", "write # in a password as %23"),
        ("rtsp://h/x#transport=tls", "transport=tls"),
        ("shm://a/b", "a name has letters"),
        ("mcap:///no/such.mcap", "no such file"),
        ("demo://day", "choose demo://night"),
        ("demo://night/infrared?fps=300", "fps=300"),
        ("gst:", "needs a pipeline"),
    ],
)
def test_bad_uris_are_one_line(uri: str, message: str):
    with pytest.raises(InputError, match=message) as caught:
        open_source(uri)
    assert "\n" not in str(caught.value)


def test_what_can_only_be_seen_by_opening(tmp_path: Path):
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    empty = tmp_path / "empty"
    empty.mkdir()
    for uri, message in (
        (f"file://{text}", "not a video that can be read"),
        (f"file://{empty}", "no picture in it"),
        ("shm://refusion-nobody?wait=0.1", "nobody writes it"),
        ("v4l2:///dev/null", "can't be opened"),
    ):
        with pytest.raises(InputError, match=message):
            open_source(uri).start()


@pytest.mark.parametrize("decoder", ["pyav", "opencv"])
def test_a_password_is_in_no_message(decoder: str):
    if decoder == "pyav":
        pytest.importorskip("av")
    uri = f"rtsp://admin:hunter2%21@127.0.0.1:1/stream?channel=1#timeout=1&decoder={decoder}"
    command = [sys.executable, "-m", "refusion", "stream", uri, "demo://night/visible", "--model", "average"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert "rtsp://127.0.0.1:1/stream?channel=1 can't be opened" in result.stderr
    assert "hunter2" not in result.stderr + result.stdout and "admin" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


PYGOBJECT = Path("/usr/lib/python3/dist-packages/gi")


def run_with_gstreamer(code: str, folder: Path) -> None:
    """Run code with Debian's PyGObject, which is outside of this environment, in a process of its own; skip without."""
    if not PYGOBJECT.is_dir():
        pytest.skip("python3-gi is not installed")
    (folder / "gi").symlink_to(PYGOBJECT)
    check = "from runtime.sources.gstreamer import _gst; raise SystemExit(_gst() is None)"
    root = Path(__file__).resolve().parents[2]
    environment = {"PYTHONPATH": f"{folder}:{root}", "PATH": "/usr/bin:/bin"}
    if subprocess.call([sys.executable, "-c", check], env=environment, cwd=root):
        pytest.skip("PyGObject is of another Python, or GStreamer is not installed")
    command = [sys.executable, "-c", f"{code}\nprint('done')"]
    result = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.stdout.strip() == "done", result.stdout + result.stderr


def check_pipelines() -> None:
    caps = "video/x-raw,height=40"
    y16 = collect(open_source(f"gst:videotestsrc num-buffers=4 pattern=white ! {caps},width=70,format=GRAY16_LE"))
    assert len(y16) == 4 and y16[0].image.dtype == np.uint16 and y16[0].image.shape == (40, 70)
    assert y16[0].image.min() > 255 and y16[0].clock == "file"
    test = "videotestsrc is-live=true pattern=red"
    live = collect(open_source(f"gst:{test} ! {caps},width=66,format=I420,framerate=20/1"), limit=5)
    assert live[0].clock == "device" and abs(time.time() - live[-1].time) < 5
    assert live[0].image.shape == (40, 66, 3)
    assert live[0].image[..., 2].min() > 200 and live[0].image[..., 0].max() < 60
    np.testing.assert_allclose(np.diff([frame.time for frame in live]), 0.05, atol=0.01)
    own = "videotestsrc num-buffers=2 pattern=red"
    (padded, _) = collect(open_source(f"gst:{own} ! {caps},width=66,format=I420 ! appsink"))
    assert padded.image.shape == (40, 66, 3)
    assert padded.image[..., 2].min() > 200 and padded.image[..., :2].max() < 60
    for bad in (
        "gst:nosuchelement ! fakesink",
        "gst:filesrc location=/no/such ! decodebin",
        f"gst:{own} ! {caps},width=66,format=Y444 ! appsink",
    ):
        with pytest.raises(InputError) as caught:
            open_source(bad).start()
        assert "\n" not in str(caught.value)


def test_a_gstreamer_pipeline(tmp_path: Path):
    run_with_gstreamer(f"from {__name__} import check_pipelines; check_pipelines()", tmp_path)


def test_the_pace_of_a_variable_rate(tmp_path: Path):
    """Times come from the recording, not from counting."""
    av = pytest.importorskip("av")
    path = tmp_path / "variable.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=30)
        stream.height, stream.width = SIZE
        stream.pix_fmt, stream.codec_context.time_base = "gray16le", Fraction(1, 1000)
        for number, milliseconds in enumerate((0, 30, 200, 210)):
            frame = av.VideoFrame.from_ndarray(counts(number), format="gray16le")
            frame.pts, frame.time_base = milliseconds, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    times = np.array([frame.time for frame in collect(open_source(f"file://{path}?realtime=0"))])
    np.testing.assert_allclose(times - times[0], [0, 0.03, 0.2, 0.21], atol=0.0015)
