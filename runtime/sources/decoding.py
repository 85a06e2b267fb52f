"""Pictures of encoded video and of raw bytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np

# PyAV's names of grey formats whose numbers are taken as they are.
_COUNTS = ("gray16le", "gray16be", "gray14le", "gray12le", "gray10le", "gray9le")
_GREY = ("gray", "gray8")

# Raw formats, by the names of ROS and GStreamer -> (dtype, channels of the bytes, conversion to what we use or None).
RAW_FORMATS: dict[str, tuple[str, int, int | None]] = {
    "mono8": ("u1", 1, None),
    "8UC1": ("u1", 1, None),
    "GRAY8": ("u1", 1, None),
    "mono16": ("<u2", 1, None),
    "16UC1": ("<u2", 1, None),
    "GRAY16_LE": ("<u2", 1, None),
    "GRAY16_BE": (">u2", 1, None),
    "bgr8": ("u1", 3, None),
    "8UC3": ("u1", 3, None),
    "BGR": ("u1", 3, None),
    "bgr16": ("<u2", 3, None),
    "16UC3": ("<u2", 3, None),
    "rgb8": ("u1", 3, cv2.COLOR_RGB2BGR),
    "RGB": ("u1", 3, cv2.COLOR_RGB2BGR),
    "rgb16": ("<u2", 3, cv2.COLOR_RGB2BGR),
    "bgra8": ("u1", 4, cv2.COLOR_BGRA2BGR),
    "BGRA": ("u1", 4, cv2.COLOR_BGRA2BGR),
    "BGRx": ("u1", 4, cv2.COLOR_BGRA2BGR),
    "rgba8": ("u1", 4, cv2.COLOR_RGBA2BGR),
    "RGBA": ("u1", 4, cv2.COLOR_RGBA2BGR),
    "RGBx": ("u1", 4, cv2.COLOR_RGBA2BGR),
    "yuv422": ("u1", 2, cv2.COLOR_YUV2BGR_UYVY),
    "uyvy": ("u1", 2, cv2.COLOR_YUV2BGR_UYVY),
    "UYVY": ("u1", 2, cv2.COLOR_YUV2BGR_UYVY),
    "yuv422_yuy2": ("u1", 2, cv2.COLOR_YUV2BGR_YUYV),
    "yuyv": ("u1", 2, cv2.COLOR_YUV2BGR_YUYV),
    "YUY2": ("u1", 2, cv2.COLOR_YUV2BGR_YUYV),
    "bayer_rggb8": ("u1", 1, cv2.COLOR_BayerRGGB2BGR),
    "bayer_bggr8": ("u1", 1, cv2.COLOR_BayerBGGR2BGR),
    "bayer_gbrg8": ("u1", 1, cv2.COLOR_BayerGBRG2BGR),
    "bayer_grbg8": ("u1", 1, cv2.COLOR_BayerGRBG2BGR),
}
# 4:2:0 formats: one plane of luma, 1.5 times the height in all.
_PLANAR = {"I420": cv2.COLOR_YUV2BGR_I420, "YV12": cv2.COLOR_YUV2BGR_YV12, "NV12": cv2.COLOR_YUV2BGR_NV12}


def raw_image(
    data: Any, encoding: str, height: int, width: int, step: int | None = None, *, big_endian: bool = False
) -> np.ndarray:
    """Picture of raw bytes: HxW or HxWx3 (BGR), uint8 or uint16, a copy of its own.

    Args:
        data: bytes or a buffer.
        encoding: a name of RAW_FORMATS, or I420, YV12, NV12.
        height, width: in pixels.
        step: bytes from row to row, of 4:2:0 formats in the plane of luma; None where rows follow closely.
        big_endian: of 16-bit ROS encodings, whose name doesn't tell.

    Raises:
        KeyError: an encoding that isn't known.
        ValueError: too few bytes.
    """
    if encoding in _PLANAR:
        return _planar_image(np.frombuffer(data, np.uint8), encoding, height, width, step or width)
    kind, channels, conversion = RAW_FORMATS[encoding]
    dtype = np.dtype(kind.replace("<", ">") if big_endian else kind)
    step = step or width * channels * dtype.itemsize
    rows_of_bytes = np.frombuffer(data, np.uint8, height * step).reshape(height, step)
    pixels = np.ascontiguousarray(rows_of_bytes[:, : width * channels * dtype.itemsize]).view(dtype)
    image = pixels.astype(dtype.newbyteorder("="), copy=True)
    image = image if channels == 1 else image.reshape(height, width, channels)
    return image if conversion is None else cv2.cvtColor(image, conversion)


def planar_step(encoding: str, height: int, width: int, size: int) -> int | None:
    """Bytes from row to row of luma in a 4:2:0 picture of so many bytes, None for other formats.

    GStreamer pads rows to multiples of 4; hardware gives them close together.
    """
    if encoding not in _PLANAR:
        return None
    return width if size <= height * width + 2 * ((height + 1) // 2) * ((width + 1) // 2) else -(-width // 4) * 4


def _planar_image(data: np.ndarray, encoding: str, height: int, width: int, step: int) -> np.ndarray:
    """HxWx3 (BGR) of 4:2:0 planes whose rows may be padded; an odd last row or column has no colour and is cut."""
    rows, columns, colour_rows = height // 2, width // 2, (height + 1) // 2
    luma = data[: height * step].reshape(height, step)[: 2 * rows, : 2 * columns]
    rest = data[height * step :]
    if encoding == "NV12":
        colour = rest[: colour_rows * step].reshape(colour_rows, step)[:rows, : 2 * columns]
    else:
        colour_step = len(rest) // (2 * colour_rows)
        colour = rest[: 2 * colour_rows * colour_step].reshape(2, colour_rows, colour_step)[:, :rows, :columns]
    close = np.concatenate([luma.ravel(), colour.ravel()]).reshape(3 * rows, 2 * columns)
    return cv2.cvtColor(close, _PLANAR[encoding])


def has_pyav() -> bool:
    """Whether the package `av` is installed."""
    return importlib.util.find_spec("av") is not None


def packet_pictures(packet: Any, grey: bool) -> Iterator[tuple[np.ndarray, float | None] | None]:
    """Pictures in a packet of PyAV with their times in seconds of the stream, None for one that can't be decoded.

    Args:
        packet: as `demux` gives it.
        grey: take the luma of colour video.
    """
    import av

    try:
        frames = packet.decode()
    except av.error.InvalidDataError:
        yield None
        return
    for frame in frames:
        yield frame_image(frame, grey), frame.time


def frame_image(frame: Any, grey: bool) -> np.ndarray:
    """HxW uint8, uint16 (grey formats of more than 8 bits, as they are) or HxWx3 (BGR) uint8 of a frame of PyAV."""
    name = frame.format.name
    if name in _COUNTS:
        return frame.to_ndarray().astype(np.uint16, copy=False)
    return frame.to_ndarray(format="gray" if grey or name in _GREY else "bgr24")
