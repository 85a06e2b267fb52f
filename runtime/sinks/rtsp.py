"""`rtsp://`: a server that players and other programs pull the fused stream from, by GStreamer."""

from __future__ import annotations

import socket
import threading
from typing import Any

import numpy as np

from runtime.errors import InputError
from runtime.frames import FusedFrame
from runtime.sinks.base import Output
from runtime.sinks.uri import Endpoint, SinkOptions, parse_endpoint
from runtime.sinks.video import even

INSTALL = (
    "rtsp:// needs GStreamer's RTSP server and PyGObject: apt install python3-gi gir1.2-gst-rtsp-server-1.0 "
    "gstreamer1.0-plugins-good gstreamer1.0-plugins-ugly, and a virtual environment made with --system-site-packages"
)
# Encoders from best to worst: Jetson's own hardware, x264, OpenH264, and JPEG, which every installation has.
# element -> its settings, and the elements from its output to RTP
ENCODERS = {
    "nvv4l2h264enc": (
        "nvvidconv ! video/x-raw(memory:NVMM),format=NV12 ! nvv4l2h264enc bitrate={bits} iframeinterval={fps} "
        "insert-sps-pps=true",
        "h264parse ! rtph264pay name=pay0 pt=96 config-interval=1",
    ),
    "x264enc": (
        "video/x-raw,format=I420 ! x264enc tune=zerolatency speed-preset=veryfast bitrate={kilobits} key-int-max={fps} "
        "threads=2",
        "rtph264pay name=pay0 pt=96 config-interval=1",
    ),
    "openh264enc": (
        "video/x-raw,format=I420 ! openh264enc bitrate={bits} gop-size={fps} complexity=low",
        "h264parse ! rtph264pay name=pay0 pt=96 config-interval=1",
    ),
    "jpegenc": ("video/x-raw,format=I420 ! jpegenc quality=85", "rtpjpegpay name=pay0 pt=26"),
}


def open_rtsp(address: str, options: SinkOptions) -> Output:
    """Open a server. All players share one encoder, which works only while somebody watches.

    Beyond this machine (any address but loopback) the URI must carry a user and a password, which players then need:
    `rtsp://USER:PASSWORD@0.0.0.0:8554/fused`.

    Options:
        fps: frames/s of the stream, 30 by default: a hint for the encoder, which takes frames as they come.
        bitrate: kbit/s of H.264, 4000 by default.
        encoder: one of ENCODERS; the default is the first that is installed.

    Raises:
        InputError: GStreamer, its RTSP server or an encoder missing, a port that is in use, or an open address without
            a password.
    """
    endpoint = parse_endpoint("rtsp", address, 8554)
    fps = options.whole("fps", 30, 1, 1000)
    kilobits = options.whole("bitrate", 4000, 50, 200_000)
    encoder = options.choice("encoder", "auto", ("auto", *ENCODERS))
    options.done()
    if len(endpoint.path) < 2:
        raise InputError(f"rtsp:// needs a name for the stream, as in {endpoint.url(endpoint.port).rstrip('/')}/fused")
    if (endpoint.user is None) != (endpoint.password is None):
        raise InputError(
            "rtsp:// needs both or neither of user and password, as in rtsp://USER:PASSWORD@0.0.0.0:8554/x"
        )
    if not endpoint.loopback and not endpoint.password:
        raise InputError(
            f"rtsp://{endpoint.host} can be reached from other machines; give it a password, as in "
            f"rtsp://USER:PASSWORD@{endpoint.host}:{endpoint.port}{endpoint.path}"
        )
    return RtspServer(endpoint, fps, kilobits, encoder)


def _gstreamer() -> tuple[Any, Any, Any]:
    """The modules GLib, Gst and GstRtspServer."""
    try:
        import gi

        gi.require_version("Gst", "1.0")
        gi.require_version("GstRtspServer", "1.0")
        from gi.repository import GLib, Gst, GstRtspServer
    except (ImportError, ValueError) as error:
        raise InputError(INSTALL) from error
    Gst.init(None)
    return GLib, Gst, GstRtspServer


def _pipeline(gst: Any, encoder: str, fps: int, kilobits: int) -> str:
    """The launch line from raw frames to RTP, with the encoder asked for or the first there is."""
    names = list(ENCODERS) if encoder == "auto" else [encoder]
    found = next((name for name in names if gst.ElementFactory.find(name)), None)
    if found is None:
        raise InputError(f"no GStreamer encoder of {', '.join(names)}: apt install gstreamer1.0-plugins-ugly")
    encode, pay = ENCODERS[found]
    encode = encode.format(fps=fps, kilobits=kilobits, bits=1000 * kilobits)
    source = "appsrc name=frames is-live=true format=time do-timestamp=true block=false max-buffers=2 max-bytes=0"
    return f"( {source} leaky-type=downstream ! videoconvert ! {encode} ! {pay} )"


class RtspServer:
    """The server, in a thread of its own, fed by the sink's."""

    def __init__(self, endpoint: Endpoint, fps: int, kilobits: int, encoder: str):
        glib, self._gst, library = _gstreamer()
        self._fps = fps
        self._media: list[tuple[Any, Any]] = []  # each medium that is being watched, and where its frames go in
        self._lock = threading.Lock()
        factory = library.RTSPMediaFactory()
        factory.set_launch(_pipeline(self._gst, encoder, fps, kilobits))
        factory.set_shared(True)
        factory.connect("media-configure", self._begin)
        self._server = library.RTSPServer()
        self._server.set_address(endpoint.host)
        self._server.set_service(str(endpoint.port))
        if endpoint.password:
            _require_password(library, self._server, factory, endpoint)
        self._server.get_mount_points().add_factory(endpoint.path, factory)
        context = glib.MainContext()
        source: Any = self._server.create_source(None) if _is_free(endpoint) else None
        if source is None:
            raise InputError(f"{endpoint.url(endpoint.port)}: the port is in use or the address is not this machine's")
        source.attach(context)
        self._source = source
        self._remove = library.RTSPFilterResult.REMOVE
        self._loop = glib.MainLoop(context)
        self._thread = threading.Thread(target=self._loop.run, name="rtsp server", daemon=True)
        self._thread.start()
        self.url = endpoint.url(self._server.get_bound_port())

    def _begin(self, factory: Any, media: Any) -> None:
        """A first player came: called in the server's thread."""
        with self._lock:
            self._media.append((media, media.get_element().get_by_name_recurse_up("frames")))
        media.connect("unprepared", self._end)

    def _end(self, media: Any) -> None:
        with self._lock:
            self._media = [entry for entry in self._media if entry[0] is not media]

    def write(self, frame: FusedFrame) -> None:
        with self._lock:
            sources = [source for _, source in self._media]
        if not sources:
            return
        gst = self._gst
        image = even(frame.image)
        height, width = image.shape[:2]
        kind = "GRAY8" if image.ndim == 2 else "BGR"
        caps = gst.Caps.from_string(f"video/x-raw,format={kind},width={width},height={height},framerate={self._fps}/1")
        sample = gst.Sample.new(gst.Buffer.new_wrapped(_padded_rows(image)), caps, None, None)
        for source in sources:
            source.emit("push-sample", sample)

    def finish(self) -> None:
        self._server.client_filter(lambda server, client: self._remove)
        self._source.destroy()
        self._loop.quit()
        self._thread.join()
        # The listening socket closes with the last reference to it.
        self._source = self._server = None

    def counters(self) -> dict[str, Any]:
        with self._lock:
            return {"watched": bool(self._media)}


def _is_free(endpoint: Endpoint) -> bool:
    """Whether the address can be bound; asked first, since the server itself logs nothing and raises no reason."""
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((endpoint.host, endpoint.port))
        except OSError:
            return False
    return True


def _require_password(library: Any, server: Any, factory: Any, endpoint: Endpoint) -> None:
    """Only who gives the endpoint's user and password may see and play what the factory makes."""
    token = library.RTSPToken()
    token.set_string("media.factory.role", "viewer")
    auth = library.RTSPAuth()
    auth.add_basic(library.RTSPAuth.make_basic(endpoint.user, endpoint.password), token)
    server.set_auth(auth)
    permissions = library.RTSPPermissions()
    permissions.add_role("viewer")
    for right in ("media.factory.access", "media.factory.construct"):
        permissions.add_permission_for_role("viewer", right, True)
    factory.set_permissions(permissions)


def _padded_rows(image: np.ndarray) -> bytes:
    """The pixels with every row filled up to a multiple of four bytes, which is how GStreamer lays them out."""
    height = image.shape[0]
    rows = image.reshape(height, -1)
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4))).tobytes()
