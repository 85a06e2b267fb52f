"""`mcap://`: a bag of ROS 2 messages that Foxglove, `ros2 bag` and the `mcap://` source read."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from runtime.errors import InputError
from runtime.frames import FusedFrame
from runtime.sinks.base import Output, temporary_beside
from runtime.sinks.uri import SinkOptions
from runtime.uri import local_path

IMAGE_TYPE, COMPRESSED_TYPE = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
_HEADER_DEFINITION = """
================================================================================
MSG: std_msgs/Header
builtin_interfaces/Time stamp
string frame_id
================================================================================
MSG: builtin_interfaces/Time
int32 sec
uint32 nanosec
"""
DEFINITIONS = {
    IMAGE_TYPE: "std_msgs/Header header\nuint32 height\nuint32 width\nstring encoding\nuint8 is_bigendian\n"
    f"uint32 step\nuint8[] data{_HEADER_DEFINITION}",
    COMPRESSED_TYPE: f"std_msgs/Header header\nstring format\nuint8[] data{_HEADER_DEFINITION}",
}
_NUMBER = {"type": "number"}
STATE_TYPE = "refusion.State"
STATE_SCHEMA = {
    "title": STATE_TYPE,
    "type": "object",
    "properties": {
        "index": {"type": "integer"},
        "state": {"enum": ["fused", "held", "a_missing", "b_missing"]},
        "skew_ms": _NUMBER,
        "age_ms": _NUMBER,
        "reused": {"type": "boolean"},
        "stages_ms": {"type": "object", "additionalProperties": _NUMBER},
    },
}
FUSED_TOPIC, STATE_TOPIC = "/fused/image_raw", "/fusion/state"
SOURCE_TOPICS = {"a": "/thermal/image_raw", "b": "/visible/image_raw"}


def open_bag(address: str, options: SinkOptions) -> Output:
    """Open an MCAP bag. It is written under a temporary name and gets its own when it is finished.

    Topics: `/fused/image_raw` (or `/fused/image_raw/compressed`), `/fusion/state` (JSON: state, skew, age, stages), and
    with `sources=1` also `/thermal/image_raw` and `/visible/image_raw`, each camera picture once, as it came, 16 bits
    included. Stamps are the times of capture.

    Options:
        image: of the fused pictures: `raw` (default), `jpeg` or `png`.
        sources: 1 records the cameras' pictures as well.
        compression: of the bag: `lz4` (default), `zstd` or `none`.
        frame_id: of the headers; `visible_optical_frame` by default.

    Raises:
        InputError: another suffix, a wrong option, a path that can't be written, or the package mcap missing.
    """
    image = options.choice("image", "raw", ("raw", "jpeg", "png"))
    compression = options.choice("compression", "lz4", ("lz4", "zstd", "none"))
    sources, frame_id = options.flag("sources", False), options.text("frame_id", "visible_optical_frame")
    options.done()
    path = local_path("mcap", address)
    if path.suffix.lower() != ".mcap":
        raise InputError(f"mcap://{address}: give a file with the suffix .mcap, as in mcap://night.mcap")
    try:
        import mcap  # noqa: F401
    except ImportError as error:
        raise InputError("mcap:// needs the package mcap: pip install 'refusion[mcap]'") from error
    return Bag(path, temporary_beside(path), image, compression, sources, frame_id)


class _Cdr:
    """Little-endian CDR, as ROS 2 lays out messages: every number at a multiple of its size behind four bytes."""

    def __init__(self) -> None:
        self._parts = bytearray(b"\0\1\0\0")

    def uint8(self, value: int) -> _Cdr:
        self._parts.append(value)
        return self

    def int32(self, value: int) -> _Cdr:
        return self._aligned("<i", value)

    def uint32(self, value: int) -> _Cdr:
        return self._aligned("<I", value)

    def string(self, text: str) -> _Cdr:
        data = text.encode() + b"\0"
        self.uint32(len(data))._parts.extend(data)
        return self

    def uint8_sequence(self, data: bytes) -> bytes:
        """Ends a message with its pixels."""
        self.uint32(len(data))
        return bytes(self._parts) + data

    def header(self, nanoseconds: int, frame_id: str) -> _Cdr:
        second, rest = divmod(nanoseconds, 1_000_000_000)
        return self.int32(second).uint32(rest).string(frame_id)

    def _aligned(self, kind: str, value: int) -> _Cdr:
        self._parts.extend(bytes(-len(self._parts) % 4) + struct.pack(kind, value))
        return self


def image_message(image: np.ndarray, nanoseconds: int, frame_id: str) -> bytes:
    """sensor_msgs/msg/Image in CDR of HxW or HxWx3 (BGR), uint8 or uint16: mono8, mono16, bgr8 or bgr16."""
    height, width = image.shape[:2]
    encoding = f"{'mono' if image.ndim == 2 else 'bgr'}{8 * image.itemsize}"
    message = _Cdr().header(nanoseconds, frame_id).uint32(height).uint32(width).string(encoding)
    return message.uint8(0).uint32(image.nbytes // height).uint8_sequence(image.astype(image.dtype, "C").tobytes())


def compressed_message(image: np.ndarray, nanoseconds: int, frame_id: str, kind: str) -> bytes:
    """sensor_msgs/msg/CompressedImage in CDR; kind is "jpeg" or "png"."""
    data = cv2.imencode(f".{kind}", image)[1].tobytes()
    encoding = "mono8" if image.ndim == 2 else "bgr8"
    return _Cdr().header(nanoseconds, frame_id).string(f"{encoding}; {kind} compressed {encoding}").uint8_sequence(data)


class Bag:
    """The bag, in chunks of about a megabyte: what an interrupted one holds, `mcap recover` gets back."""

    def __init__(self, path: Path, temporary: Path, image: str, compression: str, sources: bool, frame_id: str):
        from mcap.writer import CompressionType, Writer

        self.url = f"mcap://{path}"
        self._path, self._temporary = path, temporary
        self._image, self._sources, self._frame_id = image, sources, frame_id
        self._file = temporary.open("wb")
        self._writer: Any = Writer(self._file, compression=CompressionType[compression.upper()])
        self._writer.start(profile="ros2", library="refusion")
        self._channels: dict[str, int] = {}
        self._schemas: dict[str, int] = {}
        self._recorded: dict[str, int] = {}  # source -> index of its newest picture in the bag

    def write(self, frame: FusedFrame) -> None:
        moment = _nanoseconds(frame.time)
        if self._image == "raw":
            self._add(FUSED_TOPIC, IMAGE_TYPE, moment, frame.index, image_message(frame.image, moment, self._frame_id))
        else:
            data = compressed_message(frame.image, moment, self._frame_id, self._image)
            self._add(f"{FUSED_TOPIC}/compressed", COMPRESSED_TYPE, moment, frame.index, data)
        self._add(STATE_TOPIC, STATE_TYPE, moment, frame.index, json.dumps(_state(frame)).encode())
        for name, source in (("a", frame.a), ("b", frame.b)) if self._sources else ():
            if source is not None and self._recorded.get(name) != source.index:
                self._recorded[name] = source.index
                captured = _nanoseconds(source.time)
                data = image_message(source.image, captured, f"{SOURCE_TOPICS[name].split('/')[1]}_optical_frame")
                self._add(SOURCE_TOPICS[name], IMAGE_TYPE, captured, source.index, data)

    def _add(self, topic: str, kind: str, moment: int, index: int, data: bytes) -> None:
        channel = self._channel(topic, kind)
        self._writer.add_message(channel, log_time=moment, publish_time=moment, sequence=index & 0xFFFFFFFF, data=data)

    def _channel(self, topic: str, kind: str) -> int:
        """The topic's channel, registered with its schema when it is first needed."""
        if topic not in self._channels:
            ros = kind in DEFINITIONS
            if kind not in self._schemas:
                text = DEFINITIONS[kind] if ros else json.dumps(STATE_SCHEMA)
                self._schemas[kind] = self._writer.register_schema(kind, *_encoded(text, ros))
            encoding = "cdr" if ros else "json"
            self._channels[topic] = self._writer.register_channel(topic, encoding, self._schemas[kind])
        return self._channels[topic]

    def finish(self) -> None:
        self._writer.finish()
        self._file.close()
        os.replace(self._temporary, self._path)

    def counters(self) -> dict[str, Any]:
        return {}


def _encoded(text: str, ros: bool) -> tuple[str, bytes]:
    return ("ros2msg" if ros else "jsonschema"), text.encode()


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _state(frame: FusedFrame) -> dict[str, Any]:
    return {
        "index": frame.index,
        "state": frame.state,
        "skew_ms": round(frame.skew_ms, 3),
        "age_ms": round(frame.age_ms, 3),
        "reused": frame.reused,
        "stages_ms": {name: round(1000 * seconds, 3) for name, seconds in frame.stages.items()},
    }
