"""Where fused frames go, by URI: files, a window, a web page, RTSP, shared memory, bags, a function.

    sink = open_sink("file://night.mp4")
    sink.write(frame)  # never waits
    sink.close()       # the file is whole

| URI | goes to |
|---|---|
| `file://night.mp4`, `file:///data/night.mkv` | a video |
| `file://frames/` | a folder of PNG files, with their times in `frames.csv` |
| `display://` | a window |
| `http://127.0.0.1:8000` | a web page with the live picture, the sources, counters and controls |
| `rtsp://127.0.0.1:8554/fused` | an RTSP server |
| `shm://fused` | shared memory, see `runtime.shm` |
| `mcap://night.mcap` | a bag of ROS 2 messages |
| `null://` | nowhere |
| a function | `function(frame)`, called in the sink's thread |

Options follow as `?name=value&name=value` or as arguments of `open_sink`; each kind's function names its own.
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.errors import InputError
from runtime.frames import FusedFrame
from runtime.page.server import Control, Status
from runtime.sinks.bag import open_bag
from runtime.sinks.base import CallbackOutput, NullOutput, Output, Sink
from runtime.sinks.display import open_display
from runtime.sinks.files import open_file
from runtime.sinks.rtsp import open_rtsp
from runtime.sinks.shm import open_shm
from runtime.sinks.uri import SinkOptions, split_uri
from runtime.sinks.web import open_page

__all__ = ["Output", "Sink", "open_sink"]

RECORDER_QUEUE = 16  # frames that may wait for a disk
LIVE_QUEUE = 1  # whoever watches wants the newest one only


def _open_null(address: str, options: SinkOptions) -> Output:
    options.done()
    return NullOutput()


# scheme -> what opens it
KINDS: dict[str, Callable[[str, SinkOptions], Output]] = {
    "file": open_file,
    "display": open_display,
    "http": open_page,
    "rtsp": open_rtsp,
    "shm": open_shm,
    "mcap": open_bag,
    "null": _open_null,
}
RECORDERS = ("file", "mcap")


def open_sink(
    uri: str | Callable[[FusedFrame], object],
    *,
    status: Status | None = None,
    control: Control | None = None,
    **options: str | float | bool,
) -> Sink:
    """Open a sink; what can go wrong goes wrong here, before the first frame.

    Args:
        uri: see the table above, or a function that is called with every frame.
        status: gives the numbers that the page shows, as `Stream.status` does.
        control: changes the fusion's policies for the page and returns those in effect.
        options: of the kind, as in the URI, over which they win. `queue_size`: frames that may wait for the sink
            before the oldest is dropped (default: 16 for files and bags, 1 for the others).

    Raises:
        InputError: an unknown scheme or option, an output that can't be written, a port that is in use, or a package
            that is missing.
    """
    given = {name: str(int(value) if isinstance(value, bool) else value) for name, value in options.items()}
    if callable(uri):
        name = getattr(uri, "__name__", type(uri).__name__)
        left = SinkOptions(f"sink '{name}'", given)
        queue_size = left.whole("queue_size", RECORDER_QUEUE, 1, 10_000)
        left.done()
        return Sink(CallbackOutput(uri, name), queue_size)
    scheme, address, in_uri = split_uri(uri)
    if scheme not in KINDS:
        raise InputError(f"unknown sink '{scheme}://'; choose from {', '.join(f'{kind}://' for kind in KINDS)}")
    merged = SinkOptions(f"{scheme}:// sink", in_uri | given)
    queue_size = merged.whole("queue_size", RECORDER_QUEUE if scheme in RECORDERS else LIVE_QUEUE, 1, 10_000)
    if scheme == "http":
        return Sink(open_page(address, merged, status, control), queue_size)
    return Sink(KINDS[scheme](address, merged), queue_size)
