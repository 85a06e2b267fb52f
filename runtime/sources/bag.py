"""`mcap://`: a topic of a bag of ROS 2 messages, played back at its own pace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from runtime.errors import InputError
from runtime.sources.base import Playback, Source
from runtime.sources.decoding import raw_image
from runtime.sources.recording import Recording
from runtime.uri import Options, local_path

IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")


def open_bag(uri: str, address: str, options: Options, playback: Playback, queue_size: int) -> Source:
    """Pictures of a bag: sensor_msgs/Image and CompressedImage, by the stamps in their headers.

    Options:
        topic: which one; may be left out where the bag has only one with pictures.
        loop: 1 begins again at the end; two topics of different length begin again together.
        realtime: 0 plays as fast as the stream takes the pictures.

    Raises:
        InputError: no such file or topic, not a bag, or the packages for it missing.
    """
    topic, loop, realtime = options.text("topic"), options.flag("loop", False), options.flag("realtime", True)
    options.done()
    path = local_path("mcap", address)
    if not path.is_file():
        raise InputError(f"mcap://{address}: no such file")
    summary = _summary(path)
    topic = _find_topic(path, summary, topic)
    if loop:
        playback.has_round_of(_length(summary, topic))
    name = f"mcap://{path} {topic}"

    def make() -> Recording:
        pictures = lambda: _bag_pictures(path, topic)  # noqa: E731
        return Recording(name, pictures, playback, loop=loop, realtime=realtime, absolute=True)

    return Source(name, make, live=False, lossless=not realtime, queue_size=queue_size)


def _reader(file: Any) -> Any:
    try:
        from mcap.reader import make_reader
        from mcap_ros2.decoder import DecoderFactory
    except ImportError as error:
        raise InputError("mcap:// needs packages: pip install 'refusion[mcap]'") from error
    return make_reader(file, decoder_factories=[DecoderFactory()])


def _summary(path: Path) -> Any:
    """The bag's own index."""
    try:
        with path.open("rb") as file:
            summary = _reader(file).get_summary()
    except OSError as error:
        raise InputError(f"mcap://{path} cannot be opened ({error.strerror})") from error
    except InputError:
        raise
    except Exception as error:  # a file of another kind ends in whatever its first bytes are taken for
        raise InputError(f"mcap://{path} is not a whole bag; try `mcap recover`") from error
    if summary is None:
        raise InputError(f"mcap://{path} has no index; `mcap recover` writes one")
    return summary


def _length(summary: Any, topic: str) -> float:
    """Seconds that a topic takes, with the interval after its last picture, about."""
    statistics = summary.statistics
    if statistics is None:
        return 0.0
    counts = (statistics.channel_message_counts.get(number, 0) for number, c in summary.channels.items()
              if c.topic == topic)  # fmt: skip
    count = max(counts, default=0)
    seconds = (statistics.message_end_time - statistics.message_start_time) / 1e9
    return seconds * (count + 1) / count if count else 0.0


def _find_topic(path: Path, summary: Any, wanted: str) -> str:
    """The topic that is wanted, or the only one with pictures."""
    schemas = {number: schema.name for number, schema in summary.schemas.items()}
    kinds = {channel.topic: schemas.get(channel.schema_id) for channel in summary.channels.values()}
    pictures = sorted(topic for topic, kind in kinds.items() if kind in IMAGE_TYPES)
    if wanted in pictures or (not wanted and len(pictures) == 1):
        return wanted or pictures[0]
    has = f"it has {', '.join(pictures)}" if pictures else "it has none with pictures"
    raise InputError(
        f"mcap://{path}: {f'no topic {wanted} with pictures' if wanted else 'which topic?'}; {has} (?topic=)"
    )


def _bag_pictures(path: Path, topic: str) -> Iterator[tuple[np.ndarray, float] | None]:
    with path.open("rb") as file:
        for message in _reader(file).iter_decoded_messages(topics=[topic]):
            stamp = message.decoded_message.header.stamp
            seconds = stamp.sec + stamp.nanosec / 1e9
            image = _message_image(message.decoded_message)
            # A driver that doesn't stamp leaves zero: then it is when the message was recorded.
            yield None if image is None else (image, seconds or message.message.log_time / 1e9)


def _message_image(message: Any) -> np.ndarray | None:
    """Picture of a sensor_msgs/Image or CompressedImage, or None where it can't be decoded."""
    try:
        if hasattr(message, "encoding"):
            size = message.height, message.width
            big_endian = bool(message.is_bigendian)
            return raw_image(bytes(message.data), message.encoding, *size, message.step, big_endian=big_endian)
        return cv2.imdecode(np.frombuffer(message.data, np.uint8), cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH)
    except (KeyError, ValueError, cv2.error):
        return None
