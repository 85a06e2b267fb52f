"""`rtsp://`: network cameras, through PyAV, OpenCV or (with a Jetson's hardware decoder) GStreamer."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import cv2

from runtime.errors import InputError, without_credentials
from runtime.sources.base import Capture, Source, SourceLostError
from runtime.sources.decoding import frame_image, has_pyav
from runtime.sources.gstreamer import has_jetson_decoder, rtsp_reader
from runtime.uri import Options, parse_options

_PORT = 554


def open_rtsp(uri: str, queue_size: int) -> Source:
    """A network camera: `rtsp://[user:password@]host[:port]/path[?the camera's own query][#options]`.

    Its name for people has neither that user and password nor those in the path or query, as some cameras want them.

    Options, behind `#`, since what is behind `?` is the camera's:
        transport: `tcp` (default) or `udp`.
        timeout: seconds without data after which the connection counts as lost; 3 by default.
        grey: 1 takes the luma alone, which is what a thermal camera's video is.
        clock: `auto` takes the wall clock of the camera's RTCP reports where it is there and can be right; `arrival`
            takes the time of arrival.
        decoder: `pyav`, `opencv` (no wall clock) or `gstreamer`; the default is GStreamer on a Jetson, else PyAV where
            it is installed, else OpenCV.
        codec: `h264` (default) or `h265`, for a Jetson's decoder.

    Raises:
        InputError: no host, a bad port or option.
    """
    address, _, fragment = uri.partition("#")
    if "@" in fragment:
        raise InputError("an rtsp:// source has a # before its host; write # in a password as %23")
    options = Options("rtsp:// source", parse_options("rtsp:// source", fragment))
    transport = options.choice("transport", "tcp", ("tcp", "udp"))
    timeout = options.number("timeout", 3, 0.1, 60)
    grey, clock = options.flag("grey", False), options.choice("clock", "auto", ("auto", "arrival"))
    default = "gstreamer" if has_jetson_decoder() else "pyav" if has_pyav() else "opencv"
    decoder = options.choice("decoder", default, ("pyav", "opencv", "gstreamer"))
    codec = options.choice("codec", "h264", ("h264", "h265"))
    options.done()
    bare, user, password = _split_credentials(address)
    name = without_credentials(bare)
    if decoder == "pyav" and not has_pyav():
        raise InputError("decoder=pyav needs the package av: pip install 'refusion[stream]'")

    def make() -> Any:
        if decoder == "gstreamer":
            return rtsp_reader(name, bare, user, password, transport, timeout, codec, grey, clock == "auto")
        url = _with_credentials(bare, user, password)
        if decoder == "opencv":
            return OpenCvRtsp(name, url, transport, timeout, grey)
        return PyAvRtsp(name, url, transport, timeout, grey, clock == "auto")

    secrets = [password, quote(password, safe=""), user] if password else []
    if name != bare:  # the camera's own path or query has them
        secrets += [bare, bare.partition("://")[2]]
    return Source(name, make, queue_size=queue_size, secrets=[secret for secret in secrets if len(secret) > 1])


def _split_credentials(url: str) -> tuple[str, str, str]:
    """URL -> URL without user and password, user, password."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise InputError("the port of the rtsp:// source is not a number from 1 to 65535") from None
    if not parts.hostname:
        raise InputError("rtsp:// needs a host, as in rtsp://192.168.1.20/stream1")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    netloc = host if port is None else f"{host}:{port}"
    name = urlunsplit((parts.scheme, netloc, parts.path, parts.query, ""))
    return name, unquote(parts.username or ""), unquote(parts.password or "")


def _with_credentials(name: str, user: str, password: str) -> str:
    if not user and not password:
        return name
    scheme, _, rest = name.partition("://")
    return f"{scheme}://{quote(user, safe='')}:{quote(password, safe='')}@{rest}"


class PyAvRtsp:
    """RTSP through PyAV, with the sender's wall clock where its RTCP reports give one."""

    def __init__(self, name: str, url: str, transport: str, timeout: float, grey: bool, use_ntp: bool):
        self.corrupt = 0
        self._name, self._url, self._timeout = name, url, timeout
        self._grey, self._use_ntp = grey, use_ntp
        self._options = {
            "rtsp_transport": transport,
            "timeout": str(round(1e6 * timeout)),  # microseconds
            "fflags": "nobuffer",
            "flags": "low_delay",
            # What the pictures are is known from the description; looking at them for long delays the start.
            "analyzeduration": "500000",
        }
        self._container: Any = None
        self._anchor: tuple[int, float] | None = None  # (pts, Unix seconds), from the newest report

    def open(self, stop: threading.Event) -> None:
        import av

        try:
            self._container = av.open(self._url, options=self._options, timeout=(2 * self._timeout, self._timeout))
        except av.error.HTTPUnauthorizedError as error:
            raise InputError(f"{self._name} refused the user or password; rtsp://USER:PASSWORD@HOST/...") from error
        except (av.error.FFmpegError, OSError) as error:
            raise InputError(f"{self._name} can't be opened: {_reason(error)}") from error
        if not self._container.streams.video:
            raise InputError(f"{self._name} sends no video")
        self._captures = self._decode(self._container.streams.video[0])

    def read(self) -> Capture | None:
        import av

        try:
            return next(self._captures)
        except StopIteration:
            raise SourceLostError(f"{self._name}: the sender ended it") from None
        except (av.error.FFmpegError, OSError) as error:
            raise SourceLostError(f"{self._name}: {_reason(error)}") from error

    def close(self) -> None:
        if self._container is not None:
            self._container.close()

    def _decode(self, stream: Any) -> Iterator[Capture]:
        import av

        for packet in self._container.demux(stream):
            if self._use_ntp:
                self._note_wall_clock(packet)
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                self.corrupt += 1
                continue
            for frame in frames:
                if frame.is_corrupt:
                    self.corrupt += 1
                    continue
                captured = self._captured(frame)
                image = frame_image(frame, self._grey)
                yield Capture(image) if captured is None else Capture(image, captured, "ntp")

    def _note_wall_clock(self, packet: Any) -> None:
        """Producer reference time: microseconds since 1970 of this packet's pts, on most packets after a report."""
        if packet.pts is not None and packet.has_sidedata("prft"):
            microseconds, _ = struct.unpack_from("=qi", bytes(packet.get_sidedata("prft")))
            self._anchor = (packet.pts, microseconds / 1e6)

    def _captured(self, frame: Any) -> float | None:
        if self._anchor is None or frame.pts is None:
            return None
        pts, unix = self._anchor
        return unix + float((frame.pts - pts) * frame.time_base)


class OpenCvRtsp:
    """RTSP through OpenCV's FFmpeg: no wall clock, so the time of arrival."""

    def __init__(self, name: str, url: str, transport: str, timeout: float, grey: bool):
        self.corrupt = 0
        self._name, self._url, self._grey = name, url, grey
        milliseconds = round(1000 * timeout)
        self._parameters = [
            *(cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, 2 * milliseconds),
            *(cv2.CAP_PROP_READ_TIMEOUT_MSEC, milliseconds),
        ]
        if transport == "udp":
            raise InputError("decoder=opencv has TCP only; take decoder=pyav for transport=udp")
        self._capture: cv2.VideoCapture | None = None

    def open(self, stop: threading.Event) -> None:
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what goes wrong comes as an exception
        self._capture = cv2.VideoCapture(self._url, cv2.CAP_FFMPEG, self._parameters)
        if not self._capture.isOpened():
            raise InputError(f"{self._name} can't be opened: no answer, a wrong path, or a wrong user or password")

    def read(self) -> Capture | None:
        assert self._capture is not None
        done, image = self._capture.read()
        if not done:
            raise SourceLostError(f"{self._name}: no more pictures came")
        return Capture(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) if self._grey else image)

    def close(self) -> None:
        if self._capture is not None:
            self._capture.release()


def _reason(error: Exception) -> str:
    """What went wrong, without the URL that errors of PyAV carry."""
    text = getattr(error, "strerror", None) or type(error).__name__
    return "it did not answer in time" if "Immediate exit" in text else text.lower()
