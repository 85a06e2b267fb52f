"""Where pictures come from, by URI: cameras, files, bags, shared memory, a generated scene.

    source = open_source("v4l2:///dev/video0?format=y16")
    source.start()
    frame = source.take()  # or None
    source.close()

| URI | comes from |
|---|---|
| `v4l2:///dev/video0` | a USB camera, frame grabber or thermal core |
| `csi://0` | a camera on a Jetson's CSI connector |
| `rtsp://USER:PASSWORD@host/path` | a network camera |
| `file:///data/a.mkv`, `file://frames/` | a video, or a folder of pictures |
| `gst:PIPELINE` | a GStreamer pipeline |
| `shm://thermal` | shared memory of another process, see `runtime.shm` |
| `mcap://night.mcap?topic=/thermal/image_raw` | a topic of a bag |
| `demo://night/infrared`, `demo://night/visible` | the generated scene |

Options follow as `?name=value&name=value` (for `rtsp://` behind `#`); each kind's function names its own.
"""

from __future__ import annotations

from runtime.errors import InputError
from runtime.sources.bag import open_bag
from runtime.sources.base import Capture, Playback, Reader, Source, SourceLostError
from runtime.sources.camera import open_v4l2
from runtime.sources.demo import CAMERAS, SCENES, open_demo
from runtime.sources.gstreamer import open_csi, open_gst
from runtime.sources.memory import open_shm
from runtime.sources.network import open_rtsp
from runtime.sources.recording import open_file
from runtime.uri import Options, parse_options

__all__ = ["Capture", "Playback", "Reader", "Source", "SourceLostError", "open_source", "resolve_pair"]

SCHEMES = ("v4l2", "csi", "rtsp", "file", "gst", "shm", "mcap", "demo")


def open_source(uri: str, *, queue_size: int = 4, playback: Playback | None = None) -> Source:
    """Make a source; `start` opens it.

    Args:
        uri: see the table above.
        queue_size: pictures that may wait; the oldest is dropped, but for recordings with realtime=0.
        playback: the clock of recordings, which both sources of a stream share; None begins a new one.

    Raises:
        InputError: an unknown scheme or option, or what can be told to be missing without opening it.
    """
    playback = playback or Playback()
    if uri.startswith("gst:"):
        return open_gst(uri, playback, queue_size)
    scheme, separator, rest = uri.partition("://")
    if not separator:
        raise InputError("a source is a URI such as file:///data/a.mp4 or rtsp://HOST/PATH; this one has no scheme://")
    if scheme not in SCHEMES:
        raise InputError(f"unknown source '{scheme}://'; choose from {', '.join(SCHEMES)}")
    if scheme == "rtsp":
        return open_rtsp(uri, queue_size)
    address, _, query = rest.partition("?")
    owner = f"{scheme}:// source"
    options = Options(owner, parse_options(owner, query))
    if scheme in ("v4l2", "shm", "demo"):
        opener = {"v4l2": open_v4l2, "shm": open_shm, "demo": open_demo}[scheme]
        return opener(uri, address, options, queue_size)
    played = {"csi": open_csi, "file": open_file, "mcap": open_bag}[scheme]
    return played(uri, address, options, playback, queue_size)


def resolve_pair(a: str, b: str | None) -> tuple[str, str]:
    """The URIs of both cameras, where one that names both may stand alone: `demo://night`.

    Raises:
        InputError: one URI that names one camera only.
    """
    if b is not None:
        return a, b
    scene, question, query = a.partition("?")
    if scene.removeprefix("demo://").rstrip("/") in SCENES and scene.startswith("demo://"):
        infrared, visible = (f"{scene.rstrip('/')}/{camera}{question}{query}" for camera in CAMERAS)
        return infrared, visible
    raise InputError("two sources are needed, the thermal camera and then the visible one; demo://night alone is both")
