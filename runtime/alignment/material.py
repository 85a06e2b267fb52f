"""Pairs of pictures for a calibration, from files, folders, videos and cameras."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from runtime.errors import InputError
from runtime.images import IMAGE_SUFFIXES, find_pairs, read_image

INTERVAL = 1.0  # seconds between the pairs that are taken from cameras
PATIENCE = 15.0  # seconds to wait for the next pair of two cameras

Progress = Callable[[float], None]

_GREY_16 = int.from_bytes(b"Y1\x00\x10", "little")  # OpenCV's name of FFmpeg's pixel format gray16le


@dataclass(frozen=True)
class Pictures:
    """N pairs: each HxW or HxWx3 (BGR), uint8 or uint16; those of a camera have one size.

    Attributes:
        a, b: of both cameras.
        names: of the pairs, for messages.
    """

    a: list[np.ndarray]
    b: list[np.ndarray]
    names: list[str]


def read_pairs(a: str, b: str, count: int, progress: Progress = lambda share: None) -> Pictures:
    """Up to `count` pairs, spread evenly over what there is.

    Args:
        a, b: two image files; two folders (matched by stem); two videos, which begin at one moment; or the URIs of two
            cameras (see `runtime.sources`), of which a pair is taken each INTERVAL.
        count: pairs at most.
        progress: is told the share of the work that was just done.

    Raises:
        InputError: missing, unreadable, of different kinds, or pictures of one camera that differ in size.
    """
    if count < 1:
        raise InputError(f"the number of frames is {count}; give 1 or more")
    kinds = _kind(a), _kind(b)
    if kinds[0] != kinds[1]:
        raise InputError(f"{a} is {kinds[0]} and {b} is {kinds[1]}; give two of one kind")
    reader = {"a folder": _from_folders, "an image": _from_images, "a video": _from_videos, "a camera": _from_cameras}
    pictures = Pictures([], [], [])
    for name, image_a, image_b in reader[kinds[0]](a, b, count):
        _check_size(pictures.a, image_a, f"{name} of camera a")
        _check_size(pictures.b, image_b, f"{name} of camera b")
        pictures.a.append(image_a)
        pictures.b.append(image_b)
        pictures.names.append(name)
        progress(1 / count)
    if not pictures.names:
        raise InputError(f"no pair of pictures could be read from {a} and {b}")
    return pictures


def _kind(source: str) -> str:
    if "://" in source or source.startswith("gst:"):
        return "a camera"
    path = Path(source)
    if not path.exists():
        raise InputError(f"{source}: no such file or folder")
    if path.is_dir():
        return "a folder"
    return "an image" if path.suffix.lower() in IMAGE_SUFFIXES else "a video"


def _check_size(before: list[np.ndarray], image: np.ndarray, name: str) -> None:
    if before and before[0].shape[:2] != image.shape[:2]:
        (height, width), (new_height, new_width) = before[0].shape[:2], image.shape[:2]
        raise InputError(
            f"{name} is {new_width}x{new_height} and the others are {width}x{height}; the pictures of a camera must "
            "have one size, uncropped"
        )


def _from_images(a: str, b: str, count: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    yield Path(a).name, read_image(a), read_image(b)


def _from_folders(a: str, b: str, count: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    pairs = find_pairs(a, b)
    for number in _spread(len(pairs), count):
        yield pairs[number].stem, read_image(pairs[number].a), read_image(pairs[number].b)


def _from_videos(a: str, b: str, count: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    captures = [_open_video(a), _open_video(b)]
    try:
        rates = [capture.get(cv2.CAP_PROP_FPS) or 25.0 for capture in captures]
        frames = [max(1.0, capture.get(cv2.CAP_PROP_FRAME_COUNT)) for capture in captures]
        seconds = min(number / rate for number, rate in zip(frames, rates, strict=True))
        for step in range(count):
            at = seconds * (step + 0.5) / count
            images = [_frame_at(capture, int(at * rate)) for capture, rate in zip(captures, rates, strict=True)]
            if images[0] is not None and images[1] is not None:
                yield f"the frame at {at:.1f} s", images[0], images[1]
    finally:
        for capture in captures:
            capture.release()


def _open_video(path: str) -> cv2.VideoCapture:
    capture = cv2.VideoCapture(path)
    if not capture.isOpened():
        raise InputError(f"{path}: neither an image nor a video that can be read")
    if int(capture.get(cv2.CAP_PROP_CODEC_PIXEL_FORMAT)) == _GREY_16:
        capture.set(cv2.CAP_PROP_CONVERT_RGB, 0)  # thermal counts would lose 8 of their bits
    return capture


def _frame_at(capture: cv2.VideoCapture, number: int) -> np.ndarray | None:
    capture.set(cv2.CAP_PROP_POS_FRAMES, number)
    done, image = capture.read()
    return image if done else None


def _from_cameras(a: str, b: str, count: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    from runtime.sources import Playback, open_source
    from runtime.sync import Pairer, Pairing

    playback = Playback()
    sources = [open_source(uri, playback=playback) for uri in (a, b)]
    pairer = Pairer(Pairing(on_missing="skip"))
    try:
        for source in sources:
            source.begin()
        for source in sources:
            source.wait_opened()
        taken, last, patience = 0, -np.inf, time.monotonic() + PATIENCE
        while taken < count and time.monotonic() < patience:
            for source, add in zip(sources, (pairer.add_a, pairer.add_b), strict=True):
                while (frame := source.take()) is not None:
                    add(frame)
            now = time.monotonic()
            while (pair := pairer.next(now)) is not None:
                if pair.a is not None and pair.b is not None and now - last >= INTERVAL and taken < count:
                    yield f"pair {taken + 1}", pair.a.image, pair.b.image
                    taken, last, patience = taken + 1, now, now + PATIENCE
            if all(source.ended for source in sources):
                break
            time.sleep(0.005)
    finally:
        for source in sources:
            source.close()


def _spread(available: int, count: int) -> list[int]:
    """Up to `count` numbers below `available`, evenly."""
    if available <= count:
        return list(range(available))
    return [int((step + 0.5) * available / count) for step in range(count)]
