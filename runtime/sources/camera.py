"""`v4l2://`: cameras of Video4Linux, through OpenCV: USB cameras, frame grabbers, thermal cores."""

from __future__ import annotations

import os
import stat
import threading
import time

import cv2
import numpy as np

from runtime.errors import InputError
from runtime.sources.base import Capture, Source, SourceLostError
from runtime.uri import Options

# Name of a pixel format -> its code of four letters. Y16 and grey are taken as they are.
FORMATS = {"auto": "", "y16": "Y16 ", "grey": "GREY", "mjpg": "MJPG", "yuyv": "YUYV", "nv12": "NV12"}
READ_TIMEOUT = 3.0  # seconds
_CLOCK_LIMIT = 5.0  # s that a driver's stamp may be from the monotonic clock to be of that clock


def open_v4l2(uri: str, address: str, options: Options, queue_size: int) -> Source:
    """A Video4Linux camera: `v4l2:///dev/video0`.

    Options:
        size: WIDTHxHEIGHT, one that the camera has.
        fps: pictures a second.
        format: `y16` for raw thermal counts, `grey`, `mjpg`, `yuyv`, `nv12`; by default what the camera prefers.

    Raises:
        InputError: a wrong option, or no such camera.
    """
    size, fps = options.size("size"), options.number("fps", 0, 0, 1000)
    pixel_format = options.choice("format", "auto", tuple(FORMATS))
    options.done()
    path = address or "/dev/video0"
    try:
        is_device = stat.S_ISCHR(os.stat(path).st_mode)
    except FileNotFoundError:
        raise InputError(f"v4l2://{path}: no such camera; ls /dev/video* shows those that are there") from None
    except OSError as error:
        raise InputError(f"v4l2://{path}: {error.strerror}") from error
    if not is_device:
        raise InputError(f"v4l2://{path} is not a camera's device")
    name = f"v4l2://{path}"
    return Source(name, lambda: V4l2Camera(name, path, size, fps, pixel_format), queue_size=queue_size)


class V4l2Camera:
    """One camera; its driver's stamps are taken, which are of the monotonic clock."""

    def __init__(self, name: str, path: str, size: tuple[int, int] | None, fps: float, pixel_format: str):
        self.corrupt = 0
        self._name, self._path, self._size, self._fps, self._format = name, path, size, fps, pixel_format
        self._capture: cv2.VideoCapture | None = None

    def open(self, stop: threading.Event) -> None:
        self._capture = capture = cv2.VideoCapture(self._path, cv2.CAP_V4L2)
        if not capture.isOpened():
            raise InputError(f"{self._name} can't be opened: is another program using it, or are you not in 'video'?")
        if self._format != "auto":
            code = cv2.VideoWriter.fourcc(*FORMATS[self._format])
            capture.set(cv2.CAP_PROP_FOURCC, code)
            if int(capture.get(cv2.CAP_PROP_FOURCC)) != code:
                raise InputError(f"{self._name} has no format '{self._format}'; v4l2-ctl --list-formats shows its own")
        if self._format in ("y16", "grey"):
            capture.set(cv2.CAP_PROP_CONVERT_RGB, 0)
        if self._size:
            height, width = self._size
            capture.set(cv2.CAP_PROP_FRAME_WIDTH, width)
            capture.set(cv2.CAP_PROP_FRAME_HEIGHT, height)
            got = int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT)), int(capture.get(cv2.CAP_PROP_FRAME_WIDTH))
            if got != self._size:
                raise InputError(f"{self._name} has no size {width}x{height}, it gives {got[1]}x{got[0]}")
        if self._fps:
            capture.set(cv2.CAP_PROP_FPS, self._fps)
        capture.set(cv2.CAP_PROP_READ_TIMEOUT_MSEC, 1000 * READ_TIMEOUT)
        capture.set(cv2.CAP_PROP_BUFFERSIZE, 2)

    def read(self) -> Capture | None:
        assert self._capture is not None
        if not self._capture.grab():
            raise SourceLostError(f"{self._name} gives no more pictures")
        stamp = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        done, image = self._capture.retrieve()
        if not done:
            return Capture(np.empty((0, 0), np.uint8))  # counted as corrupt
        now = time.monotonic()
        if abs(now - stamp) > _CLOCK_LIMIT:
            return Capture(image)
        return Capture(image, time.time() - (now - stamp), "device")

    def close(self) -> None:
        if self._capture is not None:
            self._capture.release()
