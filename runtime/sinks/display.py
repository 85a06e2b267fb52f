"""`display://`: a window on the desktop."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError
from runtime.frames import FusedFrame
from runtime.sinks.base import Output
from runtime.sinks.uri import SinkOptions

_CLOSE_KEYS = (27, ord("q"))  # Escape
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_CAPTIONS = {"held": "thermal held", "a_missing": "thermal missing", "b_missing": "visible missing"}


def open_display(address: str, options: SinkOptions) -> Output:
    """Open a window; q, Escape or its close button close it, and the stream goes on.

    Options:
        fullscreen: 1 for the whole screen.

    Raises:
        InputError: an address, no desktop, or an OpenCV without windows.
    """
    fullscreen = options.flag("fullscreen", False)
    options.done()
    if address:
        raise InputError(f"display://{address}: it has no address; give display://")
    if not has_windows(cv2.getBuildInformation()):
        raise InputError(
            "display:// needs an OpenCV with windows: pip uninstall opencv-python-headless, pip install opencv-python; "
            "or watch in a browser with http://127.0.0.1:8000"
        )
    # Without a desktop to connect to, some of OpenCV's window systems end the whole process.
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise InputError("display:// needs a desktop, and DISPLAY is not set; watch with http://127.0.0.1:8000")
    return Display(fullscreen)


def has_windows(build_information: str) -> bool:
    """Whether an OpenCV can open windows, by its `cv2.getBuildInformation()`.

    Its part GUI names the window system, or NONE; older versions name none there and list what they have below.
    """
    part = re.search(r"^ *GUI:(?P<name>.*)(?P<list>(?:\n {4}.*)*)", build_information, re.MULTILINE)
    if part is None or part["name"].strip() == "NONE":
        return False
    return bool(part["name"].strip()) or "YES" in part["list"]


def captioned(frame: FusedFrame) -> NDArray[np.uint8]:
    """The picture, with a word in its corner where it is not made of both cameras' newest pictures."""
    caption = _CAPTIONS.get(frame.state)
    if caption is None:
        return frame.image
    picture = frame.image.copy()
    for colour, thickness in (((0, 0, 0), 4), ((255, 255, 255), 1)):
        cv2.putText(picture, caption, (10, 24), _FONT, 0.6, colour, thickness, cv2.LINE_AA)
    return picture


class Display:
    """The window. OpenCV wants all that concerns it to come from one thread, the sink's."""

    TITLE = "refusion"

    def __init__(self, fullscreen: bool):
        self.url = "display://"
        self._fullscreen = fullscreen
        self._open = self._closed = False

    def write(self, frame: FusedFrame) -> None:
        if self._closed:
            return
        if not self._open:
            cv2.namedWindow(self.TITLE, cv2.WINDOW_NORMAL | cv2.WINDOW_GUI_NORMAL)
            if self._fullscreen:
                cv2.setWindowProperty(self.TITLE, cv2.WND_PROP_FULLSCREEN, cv2.WINDOW_FULLSCREEN)
            else:
                cv2.resizeWindow(self.TITLE, frame.image.shape[1], frame.image.shape[0])
            self._open = True
        cv2.imshow(self.TITLE, captioned(frame))
        key = cv2.waitKey(1) & 0xFF
        if key in _CLOSE_KEYS or cv2.getWindowProperty(self.TITLE, cv2.WND_PROP_VISIBLE) < 1:
            self._closed = True
            self._destroy()

    def finish(self) -> None:
        if self._open and not self._closed:
            self._destroy()

    def _destroy(self) -> None:
        cv2.destroyWindow(self.TITLE)
        cv2.waitKey(1)

    def counters(self) -> dict[str, Any]:
        return {"closed_by_user": self._closed}
