"""Every kind of sink: what comes out is read back by another program or library than the one that wrote it."""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from runtime.errors import InputError
from runtime.frames import Frame, FusedFrame
from runtime.images import read_image
from runtime.shm import ShmReader
from runtime.sinks import open_sink
from runtime.sinks.base import NullOutput, Sink
from runtime.sinks.display import captioned, has_windows
from runtime.sinks.video import LONGEST_GAP, Timeline, fit

ROOT = Path(__file__).resolve().parents[2]
START = 1_700_000_000.0
DEBIAN_PACKAGES = Path("/usr/lib/python3/dist-packages")


def picture(index: int, size: tuple[int, int] = (48, 64), colour: bool = True) -> np.ndarray:
    """Smooth, different for every index, and with a bright square whose place tells the index."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    image = np.stack([x * 2 % 256, y * 3 % 256, np.full_like(x, 60)], axis=2).astype(np.uint8)
    left = 8 * (index % (width // 8))
    image[8:16, left : left + 8] = 255
    return image if colour else image[..., 0].copy()


def square_at(image: np.ndarray) -> int:
    """The index, modulo the places, that `picture` drew."""
    row = image[8:16].reshape(8, image.shape[1], -1).min(axis=(0, 2)).astype(float)
    return int(np.convolve(row, np.ones(8), "valid").argmax() / 8 + 0.5)


def frame(index: int, at: float | None = None, image: np.ndarray | None = None, **changes) -> FusedFrame:
    moment = START + index / 30 if at is None else at
    image = picture(index) if image is None else image
    counts = np.full((24, 32), 1000 + index, np.uint16)
    a = Frame(counts, moment - 0.01, "device", time.monotonic(), index, "thermal")
    b = Frame(image, moment, "device", time.monotonic(), index, "visible")
    values = {"state": "fused", "skew_ms": -10.0, "age_ms": 20.0, "reused": False, "stages": {"fuse": 0.004}}
    return FusedFrame(image=image, a=a, b=b, time=moment, index=index, **(values | changes))


def write_all(uri: str, frames: list[FusedFrame], **options) -> dict:
    sink = open_sink(uri, queue_size=len(frames), **options)
    for one in frames:
        sink.write(one)
    sink.close()
    counters = sink.counters()
    assert counters["error"] is None
    assert (counters["written"], counters["dropped"], counters["queued"]) == (len(frames), 0, 0)
    return counters


# ---- the queue


def test_a_slow_sink_drops_the_oldest_and_never_holds_the_writer():
    got, go = [], threading.Event()

    def slow(one: FusedFrame) -> None:
        go.wait(30)
        got.append(one.index)

    sink = open_sink(slow, queue_size=3)
    sink.write(frame(0))
    while sink.counters()["queued"]:  # until the thread has taken it
        time.sleep(0.001)
    for index in range(1, 11):
        sink.write(frame(index))  # would wait for ever if it waited
    assert sink.counters()["dropped"] == 7
    assert sink.counters()["queued"] == 3
    go.set()
    sink.close()
    assert got == [0, 8, 9, 10]
    assert sink.counters() | {"write_ms": None} == {
        "url": "callback slow", "written": 4, "dropped": 7, "queued": 0, "write_ms": None, "error": None,
    }  # fmt: skip


def test_a_blocked_sink_does_not_hold_another():
    go, got = threading.Event(), []
    blocked = open_sink(lambda one: go.wait(30), queue_size=2)
    free = open_sink(got.append, queue_size=20)
    for index in range(20):
        blocked.write(frame(index))
        free.write(frame(index))
    free.close()
    assert [one.index for one in got] == list(range(20))
    go.set()
    blocked.close()
    assert blocked.counters()["written"] + blocked.counters()["dropped"] == 20


def test_a_sink_that_fails_is_given_up_with_one_line(caplog):
    def broken(one: FusedFrame) -> None:
        if one.index == 2:
            raise OSError("No space\nleft on device")

    sink = open_sink(broken, queue_size=1)
    for index in range(3):
        sink.write(frame(index))
        while sink.counters()["queued"] and not sink.counters()["error"]:
            time.sleep(0.001)
    sink.close()
    sink.write(frame(3))
    sink.close()
    counters = sink.counters()
    assert counters["error"] == "No space left on device"
    assert counters["written"] == 2
    assert counters["dropped"] == 1
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        "callback broken failed and gets no more frames: No space left on device"
    ]


def test_the_thread_ends_at_close():
    before = threading.active_count()
    sinks = [open_sink("null://") for _ in range(5)]
    assert threading.active_count() == before + 5
    for sink in sinks:
        sink.write(frame(0))
        sink.close()
    assert threading.active_count() == before
    assert all(sink.counters()["written"] == 1 for sink in sinks)


def test_what_finish_raises_is_an_error_of_the_sink():
    class Unfinished(NullOutput):
        def finish(self) -> None:
            raise OSError("the disk is gone")

    sink = Sink(Unfinished())
    sink.close()
    assert sink.counters()["error"] == "the disk is gone"


# ---- files


def test_png_folder(tmp_path):
    frames = [frame(i, state="held" if i == 3 else "fused", reused=i == 3) for i in range(5)]
    write_all(f"file://{tmp_path}/out/", frames)
    for one in frames:
        np.testing.assert_array_equal(read_image(tmp_path / "out" / f"{one.index:08d}.png"), one.image)
    rows = list(csv.DictReader((tmp_path / "out" / "frames.csv").open()))
    assert [float(row["time"]) for row in rows] == pytest.approx([one.time for one in frames], abs=1e-6)
    assert [row["state"] for row in rows] == ["fused"] * 3 + ["held", "fused"]
    assert [row["reused"] for row in rows] == list("00010")
    assert len(list((tmp_path / "out").iterdir())) == 6


def test_a_folder_with_files_is_not_written_into(tmp_path):
    (tmp_path / "old.png").write_bytes(b"x")
    with pytest.raises(InputError, match="is not empty"):
        open_sink(f"file://{tmp_path}/")
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_video_keeps_the_time_of_every_frame(tmp_path, suffix):
    av = pytest.importorskip("av", reason="PyAV is not installed (pip install 'refusion[stream]')")
    times = START + np.array([0, 0.033, 0.066, 0.3, 0.333, 0.9])
    path = tmp_path / f"out.{suffix}"
    write_all(f"file://{path}", [frame(i, at) for i, at in enumerate(times)])
    assert list(tmp_path.iterdir()) == [path]
    with av.open(str(path)) as video:
        decoded = list(video.decode(video=0))
    stamps = np.array([float(one.pts * one.time_base) for one in decoded])
    np.testing.assert_allclose(stamps - stamps[0], times - START, atol=1.1e-3)
    assert [square_at(one.to_ndarray(format="bgr24")) for one in decoded] == list(range(6))


def test_video_of_a_grey_picture_of_odd_size(tmp_path):
    pytest.importorskip("av", reason="PyAV is not installed (pip install 'refusion[stream]')")
    image = cv2.GaussianBlur(picture(1, (47, 61), colour=False), (5, 5), 0)
    write_all(f"file://{tmp_path}/out.mp4?crf=1", [frame(i, image=image) for i in range(3)])
    capture = cv2.VideoCapture(str(tmp_path / "out.mp4"))
    read, seen = capture.read()
    assert read
    assert seen.shape == (48, 62, 3)
    assert np.abs(seen[:47, :61].astype(float) - image[..., None]).mean() < 3


def test_ffv1_is_lossless(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed (pip install 'refusion[stream]')")
    frames = [frame(i) for i in range(4)]
    write_all(f"file://{tmp_path}/out.mkv?codec=ffv1", frames)
    with av.open(str(tmp_path / "out.mkv")) as video:
        for one, read in zip(frames, video.decode(video=0), strict=True):
            np.testing.assert_array_equal(read.to_ndarray(format="bgr24"), one.image)


def test_a_file_that_nobody_closed_is_whole_at_exit(tmp_path: Path):
    program = f"""
from runtime import Stream
for _ in Stream("demo://night?size=96x64", model="average", frames=5, sinks=["file://{tmp_path}/out.mp4"]):
    pass
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=ROOT)
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    assert cv2.VideoCapture(str(tmp_path / "out.mp4")).read()[0]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_an_interrupted_video_is_playable(tmp_path, suffix):
    pytest.importorskip("av", reason="PyAV is not installed (pip install 'refusion[stream]')")
    code = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
import test_sinks
sink = test_sinks.open_sink("file://{tmp_path}/out.{suffix}", queue_size=200)
for i in range(120):
    sink.write(test_sinks.frame(i))
while sink.counters()["written"] < 120:
    time.sleep(0.01)
print("written", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    (part,) = tmp_path.iterdir()
    assert part.name.startswith(".out.")
    capture = cv2.VideoCapture(str(part))
    seen = []
    while (read := capture.read())[0]:
        seen.append(square_at(read[1]))
    # The encoder looks ahead, and the last fragment may be on the disk in part.
    assert len(seen) >= 90
    assert seen[:90] == [index % 8 for index in range(90)]


def test_opencv_writes_at_a_constant_rate(tmp_path):
    times = START + np.array([0, 0.1, 0.11, 0.5])
    counters = write_all(
        f"file://{tmp_path}/out.mp4?encoder=opencv&fps=10", [frame(i, at) for i, at in enumerate(times)]
    )
    assert (counters["repeated"], counters["left_out"]) == (3, 1)
    capture = cv2.VideoCapture(str(tmp_path / "out.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
    seen = []
    while (read := capture.read())[0]:
        seen.append(square_at(read[1]))
    assert seen == [0, 1, 1, 1, 1, 3]


@pytest.mark.parametrize("encoder", ["pyav", "opencv"])
def test_another_size_in_the_middle_is_fitted_in(tmp_path, encoder, caplog):
    if encoder == "pyav":
        pytest.importorskip("av", reason="PyAV is not installed (pip install 'refusion[stream]')")
    white = np.full((96, 64), 255, np.uint8)
    counters = write_all(
        f"file://{tmp_path}/out.mkv?encoder={encoder}", [frame(0), frame(1, image=white), frame(2, image=white)]
    )
    assert counters["resized"] == 2
    assert sum("size changed" in record.getMessage() for record in caplog.records) == 1
    capture = cv2.VideoCapture(str(tmp_path / "out.mkv"))
    capture.read()
    second = capture.read()[1]
    assert second.shape == (48, 64, 3)
    assert second[:, 20:44].min() > 220  # the tall picture in the middle
    assert second[:, :12].max() < 30  # and black beside it


def test_no_frame_leaves_no_file(tmp_path, caplog):
    sink = open_sink(f"file://{tmp_path}/out.mp4")
    sink.close()
    assert not list(tmp_path.iterdir())
    assert "no frame came" in caplog.text


def test_timeline_survives_clocks_that_jump():
    timeline = Timeline(0.1)
    assert timeline.place(100.0) == 0
    assert timeline.place(100.5) == pytest.approx(0.5)
    assert timeline.place(90.0) == pytest.approx(0.6)  # set back
    assert timeline.place(90.3) == pytest.approx(0.9)
    assert timeline.place(90.3) == pytest.approx(1.0)  # a stamp that stands still
    assert timeline.place(90.3 + LONGEST_GAP) == pytest.approx(1.0 + LONGEST_GAP)
    assert timeline.place(5000.0) == pytest.approx(1.1 + LONGEST_GAP)  # set ahead


def test_fit_keeps_the_shape():
    wide = fit(np.full((10, 40, 3), 200, np.uint8), (20, 20))
    assert wide.shape == (20, 20, 3)
    rows = np.flatnonzero(wide.any(axis=(1, 2)))
    assert (rows[0], rows[-1]) == (7, 11)


# ---- bags


def test_bag_is_read_by_the_ros_decoder(tmp_path):
    reader = pytest.importorskip("mcap.reader", reason="mcap is not installed (pip install 'refusion[mcap]')")
    ros = pytest.importorskip("mcap_ros2.decoder", reason="mcap-ros2-support is not installed")
    frames = [frame(i, image=picture(i, colour=i > 0)) for i in range(4)]
    frames.append(frame(4, state="a_missing"))
    frames[4].a = None
    frames[3].a = frames[2].a  # held: recorded once
    write_all(f"mcap://{tmp_path}/out.mcap?sources=1", frames)
    with (tmp_path / "out.mcap").open("rb") as file:
        found = list(reader.make_reader(file, decoder_factories=[ros.DecoderFactory()]).iter_messages())
        decoded: dict[str, list] = {}
        factory = ros.DecoderFactory()
        for schema, channel, message in found:
            if channel.message_encoding == "cdr":
                value = factory.decoder_for("cdr", schema)(message.data)
            else:
                value = json.loads(message.data)
            decoded.setdefault(channel.topic, []).append((message.log_time, value))
    assert {topic: len(values) for topic, values in decoded.items()} == {
        "/fused/image_raw": 5, "/fusion/state": 5, "/thermal/image_raw": 3, "/visible/image_raw": 5,
    }  # fmt: skip
    for one, (log_time, message) in zip(frames, decoded["/fused/image_raw"], strict=True):
        pixels = np.frombuffer(message.data, np.uint8).reshape(one.image.shape)
        np.testing.assert_array_equal(pixels, one.image)
        assert message.encoding == ("bgr8" if one.index else "mono8")
        assert message.step * message.height == len(message.data)
        assert message.header.frame_id == "visible_optical_frame"
        assert message.header.stamp.sec + 1e-9 * message.header.stamp.nanosec == pytest.approx(one.time, abs=1e-6)
        assert log_time == pytest.approx(one.time * 1e9, abs=1e3)
    thermal = decoded["/thermal/image_raw"][2][1]
    assert thermal.encoding == "mono16"
    assert set(np.frombuffer(thermal.data, np.uint16)) == {1002}
    states = [value["state"] for _, value in decoded["/fusion/state"]]
    assert states == ["fused"] * 4 + ["a_missing"]
    assert decoded["/fusion/state"][0][1]["stages_ms"] == {"fuse": 4.0}


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_bag_of_compressed_pictures(tmp_path, kind):
    reader = pytest.importorskip("mcap.reader", reason="mcap is not installed (pip install 'refusion[mcap]')")
    ros = pytest.importorskip("mcap_ros2.decoder", reason="mcap-ros2-support is not installed")
    frames = [frame(i) for i in range(3)]
    write_all(f"mcap://{tmp_path}/out.mcap?image={kind}&compression=none", frames)
    with (tmp_path / "out.mcap").open("rb") as file:
        topics = ["/fused/image_raw/compressed"]
        decoder = reader.make_reader(file, decoder_factories=[ros.DecoderFactory()])
        messages = [message for *_, message in decoder.iter_decoded_messages(topics=topics)]
    assert len(messages) == 3
    for one, message in zip(frames, messages, strict=True):
        assert message.format == f"bgr8; {kind} compressed bgr8"
        read = cv2.imdecode(np.frombuffer(message.data, np.uint8), cv2.IMREAD_UNCHANGED)
        assert np.abs(read.astype(float) - one.image).mean() < (5 if kind == "jpeg" else 1e-9)


# ---- other programs


def test_shared_memory(tmp_path):
    name = f"refusion_test_{tmp_path.name}_{time.time_ns()}"
    sink = open_sink(f"shm://{name}?slots=8", queue_size=8)
    reader = ShmReader(name)
    frames = [frame(i, state="held" if i == 1 else "fused") for i in range(3)]
    for one in frames:
        sink.write(one)
        read = reader.read(10)
        assert read is not None
        np.testing.assert_array_equal(read.image, one.image)
        assert (read.index, read.time, read.state) == (one.index, one.time, one.state)
    sink.close()
    assert reader.read(0.5) is None
    assert reader.ended
    reader.close()
    assert not Path("/dev/shm", name).exists()


@pytest.fixture
def gi(monkeypatch, tmp_path):
    """PyGObject with GStreamer's RTSP server: this environment's own, or Debian's if it is for this Python."""
    if importlib.util.find_spec("gi") is None:
        version = f"{sys.version_info.major}{sys.version_info.minor}"
        if not list(DEBIAN_PACKAGES.glob(f"gi/_gi.cpython-{version}-*.so")):
            pytest.skip("PyGObject is not installed (apt install python3-gi)")
        (tmp_path / "gi").symlink_to(DEBIAN_PACKAGES / "gi")
        monkeypatch.syspath_prepend(tmp_path)
    import gi

    try:
        gi.require_version("GstRtspServer", "1.0")
    except ValueError:
        pytest.skip("GStreamer's RTSP server is not installed (apt install gir1.2-gst-rtsp-server-1.0)")


def pull(url: str, count: int, sink: Sink, frames: list[FusedFrame]) -> list[np.ndarray]:
    """Read `count` pictures of a stream while frames go into its sink, 25 a second."""
    done = threading.Event()

    def feed() -> None:
        index = 0
        while not done.wait(0.04):
            sink.write(frames[index % len(frames)])
            index += 1

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        capture = cv2.VideoCapture(url, cv2.CAP_FFMPEG)
        seen = []
        while len(seen) < count and (read := capture.read())[0]:
            seen.append(read[1])
        capture.release()
        return seen
    finally:
        done.set()
        feeder.join()


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["x264enc", "jpegenc"])
def test_rtsp_is_pulled_by_ffmpeg(gi, encoder):
    before = threading.active_count()
    sink = open_sink(f"rtsp://127.0.0.1:0/fused?encoder={encoder}")
    assert sink.url.startswith("rtsp://127.0.0.1:")
    big = [frame(i, image=cv2.resize(picture(i), (320, 240), interpolation=cv2.INTER_NEAREST)) for i in range(8)]
    seen = pull(sink.url, 20, sink, big)
    again = pull(sink.url, 5, sink, big)  # a second player, after the first has gone
    sink.close()
    assert len(seen) == 20
    assert len(again) == 5
    assert seen[0].shape == (240, 320, 3)
    places = [square_at(cv2.resize(image, (64, 48), interpolation=cv2.INTER_AREA)) for image in seen]
    assert len(set(places)) >= 4  # it moves
    assert np.abs(seen[-1][120:, 60:100].astype(float) - big[0].image[120:, 60:100]).mean() < 12
    assert sink.counters()["error"] is None
    assert threading.active_count() == before
    with socket.socket() as probe:
        port = int(sink.url.rpartition(":")[2].partition("/")[0])
        assert probe.connect_ex(("127.0.0.1", port)) != 0  # nobody listens any more


@pytest.mark.slow
def test_rtsp_asks_for_its_password(gi):
    sink = open_sink("rtsp://eva:secret%20word@127.0.0.1:0/fused?encoder=jpegenc")
    assert "secret" not in sink.url
    host = sink.url.removeprefix("rtsp://")
    still = [frame(0, image=cv2.resize(picture(0), (320, 240)))]
    try:
        assert pull(sink.url, 1, sink, still) == []
        assert pull(f"rtsp://eva:wrong@{host}", 1, sink, still) == []
        assert len(pull(f"rtsp://eva:secret%20word@{host}", 2, sink, still)) == 2
    finally:
        sink.close()


def test_rtsp_port_in_use(gi):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="port is in use"):
            open_sink(f"rtsp://127.0.0.1:{taken.getsockname()[1]}/fused")


def test_display_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(
        InputError, match="needs a desktop" if has_windows(cv2.getBuildInformation()) else "with windows"
    ):
        open_sink("display://")


@pytest.mark.parametrize(
    ("text", "windows"),
    [
        ("  GUI:                           NONE\n\n  Media I/O:\n    ZLib:  YES\n", False),
        ("  GUI:                           QT5\n    QT:  YES\n\n  Media I/O:\n", True),
        ("  GUI: \n    GTK+:                        YES (ver 3.24.20)\n    VTK support:  NO\n\n  Media I/O:\n", True),
        ("  GUI: \n    GTK+:                        NO\n\n  Media I/O:\n    ZLib:  YES\n", False),
        ("", False),
    ],
)
def test_windows_by_build_information(text, windows):
    assert has_windows(text) is windows


def test_caption_marks_what_is_not_fused():
    np.testing.assert_array_equal(captioned(frame(0)), frame(0).image)
    marked = captioned(frame(0, state="a_missing"))
    assert (marked != frame(0).image).any()


# ---- bad use


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("night.mp4", "has no scheme"),
        ("ftp://host/x", "unknown sink 'ftp://'"),
        ("null://?speed=3", "no option 'speed'; it has queue_size"),
        ("null://?queue_size=0", "queue_size=0 of the null:// sink must be a number from 1"),
        ("null://?queue_size=1.5", "must be a whole number"),
        ("null://?queue_size", "needs one value"),
        ("file://", "needs a path"),
        ("file://{tmp}/out.avi", "writes .mkv, .mp4 videos"),
        ("file://{tmp}/file/out.mp4", "cannot be written"),
        ("file://{tmp}/file/frames/", "cannot be"),
        ("file:///proc/nowhere/out.mp4", "cannot be written"),
        ("file://{tmp}/out.mp4?encoder=x", "choose from pyav, opencv"),
        ("file://{tmp}/out.mp4?crf=99", "from 0 to 51"),
        ("file://{tmp}/out.mp4?codec=ffv1", "needs an .mkv file"),
        ("mcap://{tmp}/out.bag", "suffix .mcap"),
        ("mcap://{tmp}/file/out.mcap", "cannot be written"),
        ("shm://a/b", "a name has letters"),
        ("display://host", "has no address"),
        ("http://127.0.0.1:99999", "port"),
        ("http://127.0.0.1:0/path", "takes neither a path"),
        ("http://0.0.0.0:0", "give it a token"),
        ("http://192.0.2.1:0?token=0123456789abcdef", "cannot be listened at"),
        ("http://127.0.0.1:0?token=short", "16 characters"),
        ("rtsp://127.0.0.1:0", "name for the stream"),
        ("rtsp://0.0.0.0:8554/x", "give it a password"),
        ("rtsp://eva@127.0.0.1/x", "both or neither"),
    ],
)
def test_bad_uris_are_one_line(tmp_path, uri, words, monkeypatch):
    if "ffv1" in uri or "crf" in uri:
        pytest.importorskip("av", reason="PyAV is not installed (pip install 'refusion[stream]')")
    if uri.startswith("mcap"):
        pytest.importorskip("mcap", reason="mcap is not installed (pip install 'refusion[mcap]')")
    monkeypatch.delenv("REFUSION_TOKEN", raising=False)
    (tmp_path / "file").write_bytes(b"")
    before = threading.active_count()
    with pytest.raises(InputError) as caught:
        open_sink(uri.format(tmp=tmp_path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert threading.active_count() == before
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_message_holds_a_password():
    for uri in ("rtsp://eva:hunter2@0.0.0.0/", "rtsp://eva:hunter2@127.0.0.1:0/x?fps=-1", "eva:hunter2@x"):
        with pytest.raises(InputError) as caught:
            open_sink(uri)
        assert "hunter2" not in str(caught.value)
