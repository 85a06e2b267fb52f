"""`file://`: a video or a folder of pictures, played back at its own pace or as fast as it is used."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from runtime.errors import InputError
from runtime.images import IMAGE_SUFFIXES, read_image
from runtime.sources.base import Capture, Playback, Source
from runtime.sources.decoding import has_pyav, packet_pictures
from runtime.uri import Options, local_path

FOLDER_FPS = 25.0

# (picture, seconds of the recording), or None for one that can't be decoded.
Pictures = Iterator[tuple[np.ndarray, float] | None]

# What OpenCV calls the pixel formats that it must not convert: 8 and 16 bits of grey.
_OPENCV_GREY = {b"Y800": np.uint8, b"Y1\x00\x10": np.uint16}


def open_file(uri: str, address: str, options: Options, playback: Playback, queue_size: int) -> Source:
    """A video or a folder of pictures, in the order of the numbers in their names.

    Options:
        fps: pictures a second; the default is the video's own times, and 25 for a folder.
        loop: 1 begins again at the end; two recordings of different length begin again together.
        realtime: 0 plays as fast as the stream takes the pictures, and loses none.
        grey: 1 takes the luma of a colour video, which is what a thermal camera's video is.

    Raises:
        InputError: a wrong option, or no such file.
    """
    path = local_path("file", address)
    fps = options.number("fps", 0, 0, 1000)
    loop, realtime, grey = (options.flag(*flag) for flag in (("loop", False), ("realtime", True), ("grey", False)))
    options.done()
    if not address or not path.exists():
        raise InputError(f"file://{address}: no such file or folder; file:///data/a.mp4 is an absolute path")

    def pictures() -> Pictures:
        return _folder_pictures(path) if path.is_dir() else _video_pictures(path, grey)

    if loop:
        playback.has_round_of(_length(path, fps))
    name = f"file://{path}"
    fixed_fps = fps or (FOLDER_FPS if path.is_dir() else None)

    def make() -> Recording:
        return Recording(name, pictures, playback, fps=fixed_fps, loop=loop, realtime=realtime)

    return Source(name, make, live=False, lossless=not realtime, queue_size=queue_size)


class Recording:
    """Plays pictures on the stream's playback clock.

    Args:
        name: for messages.
        pictures: begins to read, from the start.
        playback: the clock.
        fps: gives the pictures' times; None takes their own.
        loop: begin again at the end.
        realtime: wait for each picture's time.
        absolute: the pictures' own times are Unix times, which all recordings of a stream share.
    """

    def __init__(
        self,
        name: str,
        pictures: Callable[[], Pictures],
        playback: Playback,
        *,
        fps: float | None = None,
        loop: bool = False,
        realtime: bool = True,
        absolute: bool = False,
    ):
        self.corrupt = 0
        self._name, self._make_pictures, self._playback = name, pictures, playback
        self._fps, self._loop, self._realtime, self._absolute = fps, loop, realtime, absolute
        self._count = 0  # pictures of this round, those that can't be decoded among them
        self._round = 0
        self._base = self._last = 0.0  # s: where this round began, and the last picture's place
        self._step = 1 / FOLDER_FPS
        self._zero: float | None = None

    def open(self, stop: threading.Event) -> None:
        self._stop = stop
        self._pictures = self._make_pictures()
        self._first = self._next_good()
        if self._first is None:
            raise InputError(f"{self._name}: no picture in it can be read")

    def read(self) -> Capture | None:
        picture = self._next_picture()
        if picture is None:
            return None
        image, seconds = picture
        place = self._place((self._count - 1) / self._fps if self._fps else seconds)
        if self._realtime:
            self._playback.wait(place, self._stop)
        return Capture(image, self._playback.unix + place, "file")

    def close(self) -> None:
        self._pictures = iter(())

    def _place(self, seconds: float) -> float:
        """Seconds of the playback of a picture by its time in the recording."""
        if self._zero is None:
            self._zero = self._playback.zero(seconds) if self._absolute else 0.0 if self._fps else seconds
        place = self._base + seconds - self._zero
        if 0 < place - self._last < 1:
            self._step = place - self._last
        self._last = place
        return place

    def _next_picture(self) -> tuple[np.ndarray, float] | None:
        first, self._first = self._first, None
        while first is None and not self._stop.is_set():
            first = self._next_good()
            if first is None:
                if not self._loop:
                    return None
                self._begin_again()
        return first

    def _next_good(self) -> tuple[np.ndarray, float] | None:
        """The next picture of this round that can be decoded."""
        for picture in self._pictures:
            self._count += 1
            if picture is not None:
                return picture
            self.corrupt += 1
        return None

    def _begin_again(self) -> None:
        self._pictures = self._make_pictures()
        self._count = 0
        self._round += 1
        self._base = max(self._round * self._playback.round_seconds, self._last + self._step)


def _length(path: Path, fps: float) -> float:
    """Seconds that a folder or a video takes, about; 0 where a video doesn't tell."""
    if path.is_dir():
        return sum(file.suffix.lower() in IMAGE_SUFFIXES for file in path.iterdir()) / (fps or FOLDER_FPS)
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    try:
        rate = fps or capture.get(cv2.CAP_PROP_FPS)
        return max(capture.get(cv2.CAP_PROP_FRAME_COUNT), 0) / rate if rate > 0 else 0.0
    finally:
        capture.release()


def _folder_pictures(folder: Path) -> Pictures:
    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.name[0] != "."]
    for file in sorted(files, key=_natural_order):
        try:
            yield read_image(file), 0.0
        except InputError:
            yield None


def _natural_order(file: Path) -> list[tuple[int, str]]:
    """`9.png` before `10.png`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", file.name)]


def _video_pictures(path: Path, grey: bool) -> Pictures:
    return _pyav_pictures(path, grey) if has_pyav() else _opencv_pictures(path, grey)


def _pyav_pictures(path: Path, grey: bool) -> Pictures:
    import av

    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(f"{path}: not a video that can be read ({error.strerror})") from error
    with container:
        if not container.streams.video:
            raise InputError(f"{path}: there is no video in this file")
        stream = container.streams.video[0]
        count = 0
        for packet in container.demux(stream):
            for picture in packet_pictures(packet, grey):
                if picture is None:
                    yield None
                    continue
                image, seconds = picture
                yield image, count / float(stream.average_rate or FOLDER_FPS) if seconds is None else seconds
                count += 1


def _opencv_pictures(path: Path, grey: bool) -> Pictures:
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    try:
        if not capture.isOpened():
            raise InputError(f"{path}: not a video that can be read")
        # As it comes OpenCV makes 8-bit colour of everything, thermal counts included.
        code = int(capture.get(cv2.CAP_PROP_CODEC_PIXEL_FORMAT)) & 0xFFFFFFFF
        is_grey = code.to_bytes(4, "little") in _OPENCV_GREY
        if is_grey:
            capture.set(cv2.CAP_PROP_CONVERT_RGB, 0)
        while capture.grab():
            seconds = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            done, image = capture.retrieve()
            if not done:
                yield None
            elif grey and not is_grey:
                yield cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), seconds
            else:
                yield image, seconds
    finally:
        capture.release()
