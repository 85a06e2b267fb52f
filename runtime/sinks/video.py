"""Videos: MP4 and MKV through PyAV with each frame at its own time, or through OpenCV at a constant rate."""

from __future__ import annotations

import logging
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError
from runtime.frames import FusedFrame
from runtime.sinks.base import Output, temporary_beside
from runtime.sinks.uri import SinkOptions

VIDEO_SUFFIXES = frozenset({".mkv", ".mp4"})
CODECS = {"h264": "libx264", "ffv1": "ffv1"}
TIME_BASE = Fraction(1, 90_000)
# A clock that jumps further than this between two frames was set anew; a shorter gap is one in the stream.
LONGEST_GAP = 10.0

log = logging.getLogger("refusion")


def open_video(path: Path, options: SinkOptions) -> Output:
    """Open a video. It is written under a temporary name and gets its own when it is finished.

    Options:
        encoder: `pyav` or `opencv`; the default is PyAV where it is installed. PyAV writes H.264, gives each frame the
            time of its capture, and leaves a playable part where it is interrupted. OpenCV writes MPEG-4 part 2 at a
            constant rate, repeating or leaving out frames to keep the time right, and an interrupted MP4 is lost.
        fps: frames/s of OpenCV's constant rate; a hint for PyAV. 30 by default.
        codec: PyAV: `h264`, or `ffv1` for a lossless MKV.
        crf: PyAV's quality of H.264, 0 (lossless) to 51; 20 by default.
        threads: PyAV's threads; 2 by default.

    Raises:
        InputError: a wrong option, PyAV missing where it is asked for, or a path that can't be written.
    """
    encoder = options.choice("encoder", "pyav" if _has_pyav() else "opencv", ("pyav", "opencv"))
    fps = options.number("fps", 30.0, 0.1, 1000)
    if encoder == "opencv":
        options.done()
        return OpenCvVideo(path, temporary_beside(path), fps)
    if not _has_pyav():
        raise InputError("encoder=pyav needs the package av: pip install 'refusion[stream]'")
    codec = options.choice("codec", "h264", tuple(CODECS))
    if codec == "ffv1" and path.suffix.lower() != ".mkv":
        raise InputError(f"{path}: codec=ffv1 needs an .mkv file")
    crf, threads = options.whole("crf", 20, 0, 51), options.whole("threads", 2, 1, 64)
    options.done()
    return PyAvVideo(path, temporary_beside(path), fps, codec, crf, threads)


def _has_pyav() -> bool:
    try:
        import av  # noqa: F401
    except ImportError:
        return False
    return True


class Timeline:
    """Lays frames on the time of a recording: seconds since the first, always rising, whatever the clock does.

    Where the clock goes back, or ahead by more than LONGEST_GAP, the recording goes on after one frame's time.
    """

    def __init__(self, step: float):
        self._step = step  # seconds
        self._offset = self._last_time = self._last = 0.0
        self._started = False

    def place(self, time: float) -> float:
        """Seconds into the recording of a frame captured at `time`."""
        if not self._started:
            self._started, self._offset = True, time
        elif not 0 < time - self._last_time <= LONGEST_GAP:
            self._offset = time - self._last - self._step
        self._last_time, self._last = time, time - self._offset
        return self._last


def fit(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """HxWx3 uint8 of a size (width, height): grey becomes BGR, and a picture of another shape gets black borders."""
    image = even(image)
    if image.ndim == 2:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR).astype(np.uint8, copy=False)
    (height, width), (wide, high) = image.shape[:2], size
    if (width, height) == size:
        return image
    scale = min(wide / width, high / height)
    inner = max(round(scale * width), 1), max(round(scale * height), 1)
    canvas = np.zeros((high, wide, 3), np.uint8)
    left, top = (wide - inner[0]) // 2, (high - inner[1]) // 2
    canvas[top : top + inner[1], left : left + inner[0]] = cv2.resize(image, inner, interpolation=cv2.INTER_AREA)
    return canvas


def even(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture with its last row and column repeated where needed: encoders halve the colour's resolution."""
    height, width = image.shape[:2]
    if height % 2 == width % 2 == 0:
        return image
    padded = cv2.copyMakeBorder(image, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
    return padded.astype(np.uint8, copy=False)


def _even_size(image: np.ndarray) -> tuple[int, int]:
    """(width, height) of a picture after `even`."""
    height, width = image.shape[:2]
    return width + width % 2, height + height % 2


class _Video:
    """What both encoders share: the temporary file, the size of the first frame, and the end."""

    def __init__(self, path: Path, temporary: Path):
        self.url = f"file://{path}"
        self._path, self._temporary = path, temporary
        self._size: tuple[int, int] | None = None
        self._resized = 0

    def _fitted(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        assert self._size is not None
        if _even_size(image) != self._size:
            if not self._resized:
                log.warning("%s: the frames' size changed; they are fitted into %dx%d", self.url, *self._size)
            self._resized += 1
        return fit(image, self._size)

    def _end(self) -> None:
        if self._size is None:
            self._temporary.unlink(missing_ok=True)
            log.warning("%s: no frame came, so there is no file", self.url)
        else:
            os.replace(self._temporary, self._path)

    def counters(self) -> dict[str, Any]:
        return {"resized": self._resized}


class PyAvVideo(_Video):
    """Every frame at the time of its capture. An MP4 is fragmented until it is finished, so that a part is playable."""

    def __init__(self, path: Path, temporary: Path, fps: float, codec: str, crf: int, threads: int):
        super().__init__(path, temporary)
        self._fps, self._codec = fps, codec
        quality = {"crf": str(crf), "preset": "veryfast"} if codec == "h264" else {}
        self._codec_options = {**quality, "threads": str(threads)}
        self._timeline = Timeline(1 / fps)
        self._last_pts = -1
        self._container: Any = None
        self._stream: Any = None

    def write(self, frame: FusedFrame) -> None:
        import av

        if self._container is None:
            self._open(frame.image)
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(self._fitted(frame.image)), format="bgr24")
        self._last_pts = max(self._last_pts + 1, round(self._timeline.place(frame.time) / TIME_BASE))
        picture.pts, picture.time_base = self._last_pts, TIME_BASE
        self._container.mux(self._stream.encode(picture))

    def _open(self, image: NDArray[np.uint8]) -> None:
        import av

        self._size = _even_size(image)
        options = {"fflags": "flush_packets"}
        if self._path.suffix.lower() == ".mp4":
            options |= {"movflags": "hybrid_fragmented", "frag_duration": "500000"}  # microseconds
        self._container = av.open(str(self._temporary), "w", options=options)
        rate = Fraction(self._fps).limit_denominator(1001)
        self._stream = self._container.add_stream(CODECS[self._codec], rate=rate, options=self._codec_options)
        self._stream.width, self._stream.height = self._size
        self._stream.pix_fmt = "yuv420p" if self._codec == "h264" else "bgr0"
        self._stream.codec_context.time_base = TIME_BASE
        # A key frame a second: what an interruption costs at most, and how finely a player can seek.
        self._stream.codec_context.gop_size = max(round(self._fps), 1)

    def finish(self) -> None:
        if self._container is not None:
            self._container.mux(self._stream.encode(None))
            self._container.close()
        self._end()


class OpenCvVideo(_Video):
    """A constant rate: a frame is repeated until the next one's time has come, or left out where two share a place."""

    FOURCC = cv2.VideoWriter.fourcc(*"mp4v")

    def __init__(self, path: Path, temporary: Path, fps: float):
        super().__init__(path, temporary)
        self._fps = fps
        self._timeline = Timeline(1 / fps)
        self._writer: cv2.VideoWriter | None = None
        self._places = 0  # frames of the video so far
        self._repeated = self._left_out = 0
        self._last: NDArray[np.uint8] | None = None

    def write(self, frame: FusedFrame) -> None:
        if self._writer is None:
            self._size = _even_size(frame.image)
            self._writer = cv2.VideoWriter(str(self._temporary), cv2.CAP_FFMPEG, self.FOURCC, self._fps, self._size)
            if not self._writer.isOpened():
                raise InputError(f"{self._path}: this OpenCV cannot write videos; pip install 'refusion[stream]'")
        place = round(self._timeline.place(frame.time) * self._fps)
        if place < self._places:
            self._left_out += 1
            return
        while self._last is not None and self._places < place:
            self._writer.write(self._last)
            self._places += 1
            self._repeated += 1
        self._last = self._fitted(frame.image)
        self._writer.write(self._last)
        self._places += 1

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.release()
        self._end()

    def counters(self) -> dict[str, Any]:
        return {**super().counters(), "repeated": self._repeated, "left_out": self._left_out}
