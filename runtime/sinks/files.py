"""`file://`: a video, by its suffix, or a folder of PNG files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from runtime.errors import InputError
from runtime.frames import FusedFrame
from runtime.images import write_image
from runtime.sinks.base import Output, temporary_beside
from runtime.sinks.uri import SinkOptions
from runtime.sinks.video import VIDEO_SUFFIXES, open_video
from runtime.uri import local_path

TIMES = "frames.csv"


def open_file(address: str, options: SinkOptions) -> Output:
    """Open a video (.mp4, .mkv) or a folder of PNG files; see `runtime.sinks.video.open_video` for a video's options.

    Raises:
        InputError: another suffix, or a place that can't be written to.
    """
    if not address:
        raise InputError("file:// needs a path, as in file://night.mp4 or file://frames/")
    path = local_path("file", address)
    if path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir():
        return open_video(path, options)
    if path.suffix and not path.is_dir() and not address.endswith("/"):
        known = ", ".join(sorted(VIDEO_SUFFIXES))
        raise InputError(f"{path}: a file sink writes {known} videos, or PNG files into a folder (file://{path.stem}/)")
    options.done()
    return PngFolder(path)


class PngFolder:
    """`00000000.png` and so on by the frame's index, each written whole, and `frames.csv` with times and states."""

    def __init__(self, folder: Path):
        self.url = f"file://{folder}/"
        self._folder = folder
        try:
            occupied = folder.is_dir() and any(folder.iterdir())
        except OSError as error:
            raise InputError(f"{folder}: cannot be read ({error.strerror})") from error
        if occupied:
            raise InputError(f"{folder} is not empty; give a new folder, so that two recordings don't mix")
        self._temporary = temporary_beside(folder / TIMES)
        self._times = self._temporary.open("w", encoding="utf-8", buffering=1)
        self._times.write("file,index,time,state,skew_ms,age_ms,reused\n")

    def write(self, frame: FusedFrame) -> None:
        name = f"{frame.index:08d}.png"
        write_image(self._folder / name, frame.image)
        numbers = f"{frame.index},{frame.time:.6f},{frame.state},{frame.skew_ms:.3f},{frame.age_ms:.3f}"
        self._times.write(f"{name},{numbers},{int(frame.reused)}\n")

    def finish(self) -> None:
        self._times.close()
        os.replace(self._temporary, self._folder / TIMES)

    def counters(self) -> dict[str, Any]:
        return {}
