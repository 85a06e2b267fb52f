"""`demo://`: the generated night road as two cameras that never end, to try a stream without any."""

from __future__ import annotations

import threading
import time
from functools import lru_cache

import cv2
import numpy as np

from runtime.errors import InputError
from runtime.scenes import PERIOD, SIZE, night_road
from runtime.sources.base import Capture, Source
from runtime.uri import Options

SCENES = ("night",)
CAMERAS = ("infrared", "visible")
FPS = 30.0
_RATE = 30.0  # pictures of the scene that are drawn a second; both cameras take theirs from these
_JPEG = [cv2.IMWRITE_JPEG_QUALITY, 85]


def open_demo(uri: str, address: str, options: Options, queue_size: int) -> Source:
    """One camera of the generated scene: `demo://night/infrared` or `demo://night/visible`.

    Options:
        size: WIDTHxHEIGHT, 640x480 by default. fps: pictures a second, up to 30. seed: of the scene.
        late_ms: the camera's stamps are this late, as with a clock that is ahead, to try `--estimate-offset`.

    Raises:
        InputError: another scene or camera, or a wrong option.
    """
    size = options.size("size") or SIZE
    fps, seed = options.number("fps", FPS, 0.1, _RATE), int(options.number("seed", 0, 0, 2**31))
    late = options.number("late_ms", 0, -60_000, 60_000) / 1000
    options.done()
    scene, _, camera = address.partition("/")
    if scene not in SCENES or camera not in CAMERAS:
        raise InputError(f"demo://{address} is not there; choose demo://night, or one camera: demo://night/infrared, "
                         "demo://night/visible")  # fmt: skip
    if min(size) < 32:
        raise InputError(f"the demo:// scene can't be drawn at {size[1]}x{size[0]}; give at least 32x32")
    number = CAMERAS.index(camera)
    name = f"demo://{scene}/{camera}"
    return Source(name, lambda: DemoCamera(_clip(*size, seed), number, fps, late), queue_size=queue_size)


class Clip:
    """The scene's pictures, each drawn when it is first needed and then kept as JPEG: all its cameras share them.

    Drawing takes a third of a core at 30 pictures a second; from the second round on (after 33 s) it costs a tenth.
    """

    def __init__(self, height: int, width: int, seed: int):
        self._size, self._seed = (height, width), seed
        self._kept: list[tuple[np.ndarray, np.ndarray] | None] = [None] * PERIOD
        self._drawn = (-1, night_road(0, self._size, seed))
        self._lock = threading.Lock()

    def picture(self, number: int, camera: int) -> np.ndarray:
        """Picture `number` of a camera: 0 infrared, HxW uint8; 1 visible, HxWx3 uint8."""
        number %= PERIOD
        with self._lock:
            if self._drawn[0] == number:
                return self._drawn[1][camera]
            kept = self._kept[number]
            if kept is None:
                drawn = night_road(number, self._size, self._seed)
                self._drawn = (number, drawn)
                infrared, visible = (cv2.imencode(".jpg", picture, _JPEG)[1] for picture in drawn)
                self._kept[number] = (infrared, visible)
                return drawn[camera]
        picture = cv2.imdecode(kept[camera], cv2.IMREAD_UNCHANGED)
        assert picture is not None
        return picture


@lru_cache(maxsize=2)
def _clip(height: int, width: int, seed: int) -> Clip:
    return Clip(height, width, seed)


class DemoCamera:
    """One camera of the scene. It shows what belongs to the time of now, and leaves out what it was too slow for."""

    def __init__(self, clip: Clip, camera: int, fps: float, late: float):
        self.corrupt = 0
        self._clip, self._camera, self._fps, self._late = clip, camera, fps, late

    def open(self, stop: threading.Event) -> None:
        self._stop = stop
        self._number = int(time.time() * self._fps)  # pictures since 1970: all cameras agree on what is when

    def read(self) -> Capture | None:
        self._number = max(self._number + 1, int(time.time() * self._fps))
        captured = self._number / self._fps
        if self._stop.wait(max(captured - time.time(), 0)):
            return None
        image = self._clip.picture(round(captured * _RATE), self._camera)
        return Capture(image, captured + self._late, "device")

    def close(self) -> None:
        pass
