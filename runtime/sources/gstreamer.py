"""`gst:` and `csi://`: GStreamer pipelines, through PyGObject, or through an OpenCV that was built with GStreamer."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import cv2

from runtime.errors import InputError
from runtime.sources.base import Capture, Playback, Reader, Source, SourceLostError
from runtime.sources.decoding import planar_step, raw_image
from runtime.uri import Options

INSTALL = "apt install python3-gi gir1.2-gst-plugins-base-1.0 gstreamer1.0-plugins-good"
# What our own appsink takes: everything else is converted to one of these.
_SINK_CAPS = "video/x-raw,format={BGR,GRAY8,GRAY16_LE}"
_SINK = "appsink name=refusion sync=false max-buffers=2 drop=true"
_NTP_EPOCH = 2_208_988_800  # seconds from 1900 to 1970
_POLL = 0.2  # seconds that a wait for a picture may take before the bus is looked at
_OPEN_TIMEOUT = 10  # seconds


def open_gst(uri: str, playback: Playback, queue_size: int) -> Source:
    """A pipeline in the words of gst-launch: `gst:v4l2src device=/dev/video0 ! video/x-raw,format=GRAY16_LE`.

    It ends in an appsink, or one is put behind it. Pictures of live sources carry the time at which the source captured
    them; those of others (files) play at their own pace.

    Raises:
        InputError: no pipeline, or neither PyGObject nor an OpenCV with GStreamer.
    """
    description = uri.partition(":")[2].strip()
    if not description:
        raise InputError("gst: needs a pipeline, as in 'gst:v4l2src device=/dev/video0 ! videoconvert'")
    name = f"gst:{description.split()[0]}"
    return Source(name, _pipeline_reader(name, description, playback), queue_size=queue_size)


def open_csi(uri: str, address: str, options: Options, playback: Playback, queue_size: int) -> Source:
    """A camera on a Jetson's CSI connector, through its image processor: `csi://0`.

    Options:
        size: WIDTHxHEIGHT, 1280x720 by default. fps: pictures a second, 30 by default.

    Raises:
        InputError: a wrong option, or no GStreamer.
    """
    size, fps = options.size("size") or (720, 1280), options.number("fps", 30, 1, 240)
    options.done()
    if not address.isdigit():
        raise InputError(f"csi://{address}: give the number of the sensor, as in csi://0")
    return Source(uri, _pipeline_reader(uri, csi_pipeline(int(address), size, fps), playback), queue_size=queue_size)


def csi_pipeline(sensor: int, size: tuple[int, int], fps: float) -> str:
    """NVIDIA's documented pipeline: pictures stay in the device's memory until the last conversion."""
    height, width = size
    return (
        f"nvarguscamerasrc sensor-id={sensor} ! "
        f"video/x-raw(memory:NVMM),width={width},height={height},framerate={round(fps)}/1,format=NV12 ! "
        "nvvidconv ! video/x-raw,format=BGRx ! queue leaky=downstream max-size-buffers=1 ! "
        "appsink name=refusion sync=false max-buffers=1 drop=true"
    )


def rtsp_reader(
    name: str,
    location: str,
    user: str,
    password: str,
    transport: str,
    timeout: float,
    codec: str,
    grey: bool,
    use_ntp: bool,
) -> Reader:
    """A network camera through GStreamer, with the hardware decoder where this is a Jetson.

    Args:
        name: for messages.
        location: URL without user and password, which go to the element as properties and are in no text.
        user, password: may be empty.
        transport: "tcp" or "udp".
        timeout: seconds.
        codec: "h264" or "h265".
        grey: take the luma alone.
        use_ntp: take the sender's wall clock where its reports give one.
    """
    if has_jetson_decoder():
        # NVMM is the decoder's own memory; nvvidconv brings the picture out of it.
        decode = f"rtp{codec}depay ! {codec}parse ! nvv4l2decoder ! nvvidconv ! video/x-raw,format=BGRx"
    else:
        decode = "decodebin"
    caps = "video/x-raw,format=GRAY8" if grey else _SINK_CAPS
    description = (
        f"rtspsrc name=camera latency=0 drop-on-latency=true ! {decode} ! "
        f"queue leaky=downstream max-size-buffers=2 ! videoconvert ! {caps} ! {_SINK}"
    )

    def configure(pipeline: Any) -> None:
        camera = pipeline.get_by_name("camera")
        camera.set_property("location", location)
        camera.set_property("user-id", user or None)
        camera.set_property("user-pw", password or None)
        camera.set_property("protocols", 4 if transport == "tcp" else 1)
        camera.set_property("tcp-timeout", round(1e6 * timeout))
        camera.set_property("timeout", round(1e6 * timeout))
        if camera.find_property("add-reference-timestamp-meta") is not None:  # GStreamer 1.22 and later
            camera.set_property("add-reference-timestamp-meta", True)

    _need_gstreamer()
    return GstPipeline(name, description, configure, stamps="ntp" if use_ntp else "arrival", timeout=timeout)


@lru_cache(maxsize=1)
def _gst() -> Any:
    """The initialised module Gst, or None where PyGObject or GStreamer's introspection data is missing."""
    if importlib.util.find_spec("gi") is None:
        return None
    try:
        import gi

        gi.require_version("Gst", "1.0")
        gi.require_version("GstApp", "1.0")
        from gi.repository import Gst, GstApp  # noqa: F401  (GstApp gives appsink its methods)
    except (ImportError, ValueError):
        return None
    Gst.init(None)
    return Gst


def has_jetson_decoder() -> bool:
    """Whether PyGObject and a Jetson's decoder are here."""
    gst = _gst()
    return gst is not None and gst.ElementFactory.find("nvv4l2decoder") is not None


def _opencv_has_gstreamer() -> bool:
    return cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER)


def _need_gstreamer() -> Any:
    gst = _gst()
    if gst is None:
        raise InputError(f"this needs GStreamer and PyGObject: {INSTALL}")
    return gst


def _pipeline_reader(name: str, description: str, playback: Playback) -> Callable[[], Reader]:
    if _gst() is not None:
        if "appsink" not in description:
            description = f"{description} ! videoconvert ! {_SINK_CAPS} ! {_SINK}"
        return lambda: GstPipeline(name, description, playback=playback)
    if not _opencv_has_gstreamer():
        raise InputError(f"{name} needs GStreamer and PyGObject: {INSTALL}")
    if "appsink" not in description:
        description = f"{description} ! videoconvert ! appsink sync=false max-buffers=2 drop=true"
    return lambda: OpenCvPipeline(name, description)


class GstPipeline:
    """A pipeline with an appsink.

    Args:
        name: for messages.
        description: in the words of gst-launch.
        configure: called with the pipeline before it starts.
        stamps: "pipeline" takes the capture time of a live source, and the place on `playback` of another. "ntp" takes
            the sender's wall clock, "arrival" none.
        playback: for pipelines that are not live.
        timeout: seconds without a picture after which the source is lost; None waits, and the watchdog watches.
    """

    def __init__(
        self,
        name: str,
        description: str,
        configure: Callable[[Any], None] | None = None,
        *,
        stamps: str = "pipeline",
        playback: Playback | None = None,
        timeout: float | None = None,
    ):
        self.corrupt = 0
        self._name, self._description, self._configure = name, description, configure
        self._stamps, self._playback, self._timeout = stamps, playback, timeout
        self._gst = _need_gstreamer()
        self._pipeline: Any = None
        self._first: Capture | None = None
        self._first_pts: int | None = None

    def open(self, stop: threading.Event) -> None:
        from gi.repository import GLib

        gst = self._gst
        self._stop = stop
        try:
            self._pipeline = gst.parse_launch(self._description)
        except GLib.Error as error:
            raise InputError(f"{self._name}: not a pipeline: {_text(error)}") from error
        self._sink = self._pipeline.get_by_name("refusion") or self._find_appsink()
        if self._configure is not None:
            self._configure(self._pipeline)
        # In PAUSED a live source says so by having no picture.
        change = self._pipeline.set_state(gst.State.PAUSED)
        if change == gst.StateChangeReturn.ASYNC:
            change = self._pipeline.get_state(_OPEN_TIMEOUT * gst.SECOND)[0]
        self._live = change == gst.StateChangeReturn.NO_PREROLL
        if not self._live:
            self._sink.set_property("sync", True)  # a file is played at its pace
        self._pipeline.set_state(gst.State.PLAYING)
        try:
            sample = self._pull(_OPEN_TIMEOUT)
        except SourceLostError as error:
            raise InputError(f"{self._name} can't be opened: {error}") from error
        if sample is None:
            raise InputError(f"{self._name} has no picture")
        self._first = self._capture(sample)  # which tells of a format that isn't read

    def read(self) -> Capture | None:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        try:
            sample = self._pull(self._timeout)
        except SourceLostError as error:
            raise SourceLostError(f"{self._name}: {error}") from error
        return None if sample is None else self._capture(sample)

    def _pull(self, timeout: float | None) -> Any:
        """The next sample; None at the end. SourceLostError says what went wrong."""
        waited = 0.0
        while not self._stop.is_set():
            sample = self._sink.try_pull_sample(round(_POLL * self._gst.SECOND))
            if sample is not None:
                return sample
            error = self._error()
            if error:
                raise SourceLostError(error)
            if self._sink.get_property("eos"):
                return None
            waited += _POLL
            if timeout is not None and waited > timeout:
                raise SourceLostError(f"no picture came for {waited:.0f} s")
        return None

    def close(self) -> None:
        if self._pipeline is not None:
            self._pipeline.set_state(self._gst.State.NULL)
            self._pipeline = None

    def _find_appsink(self) -> Any:
        sinks = self._pipeline.iterate_sinks()
        while True:
            result, element = sinks.next()
            if result != self._gst.IteratorResult.OK:
                raise InputError(f"{self._name}: the pipeline has no appsink at its end")
            if element.get_factory() is not None and element.get_factory().get_name() == "appsink":
                return element

    def _error(self) -> str:
        """What the pipeline complains of, or nothing."""
        message = self._pipeline.get_bus().pop_filtered(self._gst.MessageType.ERROR)
        return _text(message.parse_error()[0]) if message is not None else ""

    def _capture(self, sample: Any) -> Capture:
        buffer, structure = sample.get_buffer(), sample.get_caps().get_structure(0)
        encoding = structure.get_string("format") or ""
        height, width = structure.get_value("height"), structure.get_value("width")
        done, memory = buffer.map(self._gst.MapFlags.READ)
        if not done:
            raise SourceLostError(f"{self._name}: a picture's memory can't be read; end the pipeline in video/x-raw")
        try:
            step = planar_step(encoding, height, width, memory.size) or memory.size // height
            image = raw_image(memory.data, encoding, height, width, step)
        except KeyError:
            raise InputError(f"{self._name}: format {encoding} is not read; put videoconvert before the end") from None
        finally:
            buffer.unmap(memory)
        return self._stamped(image, buffer)

    def _stamped(self, image: Any, buffer: Any) -> Capture:
        none = self._gst.CLOCK_TIME_NONE
        if self._stamps == "arrival" or buffer.pts == none:
            return Capture(image)
        if self._stamps == "ntp":
            meta = buffer.get_reference_timestamp_meta(self._gst.Caps.from_string("timestamp/x-ntp"))
            return Capture(image) if meta is None else Capture(image, meta.timestamp / 1e9 - _NTP_EPOCH, "ntp")
        if not self._live and self._playback is not None:
            if self._first_pts is None:
                self._first_pts = buffer.pts
            return Capture(image, self._playback.unix + (buffer.pts - self._first_pts) / 1e9, "file")
        # A live source stamps its pictures in the pipeline's running time.
        age = self._pipeline.get_clock().get_time() - self._pipeline.get_base_time() - buffer.pts
        return Capture(image, time.time() - age / 1e9, "device")


class OpenCvPipeline:
    """A pipeline in an OpenCV that was built with GStreamer, as JetPack's is; no stamps."""

    def __init__(self, name: str, description: str):
        self.corrupt = 0
        self._name, self._description = name, description
        self._capture: cv2.VideoCapture | None = None

    def open(self, stop: threading.Event) -> None:
        self._capture = cv2.VideoCapture(self._description, cv2.CAP_GSTREAMER)
        if not self._capture.isOpened():
            raise InputError(f"{self._name}: the pipeline did not start; try it with gst-launch-1.0")

    def read(self) -> Capture | None:
        assert self._capture is not None
        done, image = self._capture.read()
        if not done:
            raise SourceLostError(f"{self._name} gives no more pictures")
        if image.ndim == 3 and image.shape[2] == 4:
            image = cv2.cvtColor(image, cv2.COLOR_BGRA2BGR)
        return Capture(image)

    def close(self) -> None:
        if self._capture is not None:
            self._capture.release()


def _text(error: Any) -> str:
    return " ".join(str(getattr(error, "message", None) or error).split())
