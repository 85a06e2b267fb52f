"""The page's HTTP server: bounded connections, each in its own thread, none of which the stream ever waits for.

| path | what |
|---|---|
| `/` | the page |
| `/status.json` | all numbers |
| `/metrics` | the same for Prometheus |
| `/healthz` | 200 while frames come, else 503 |
| `/fused.mjpg`, `/a.mjpg`, `/b.mjpg` | endless MJPEG, for players and other pages of this host |
| `/fused.jpg`, `/a.jpg`, `/b.jpg` | the newest picture |
| `/frame?after=N` | the pictures of the first frame after number N, as the page reads them |
| POST `/control` | JSON with the policies to change; answers with those in effect |
| POST `/offer` | a WebRTC offer, where that is on |
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import struct
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import parse_qs

from runtime.errors import InputError
from runtime.page.access import Access
from runtime.page.live import LONG_POLL, PICTURES, Live, Shown
from runtime.status import prometheus_text

MAX_CONNECTIONS = 32
IDLE_TIMEOUT = 10.0  # seconds that a client may be silent, or may leave what is sent to it unread
SILENT_AFTER = 2.0  # seconds without a frame after which the stream is not healthy
MAX_BODY = 65536
# What the kernel may hold for a client that reads slowly, in bytes: more would only make its picture older.
SEND_BUFFER = 256 * 1024

STATIC = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",  # the address may hold the token
    "X-Content-Type-Options": "nosniff",
}
_BOUNDARY = "refusion-frame"

Status = Callable[[], dict[str, Any]]
Control = Callable[[dict[str, Any]], dict[str, Any]]
Offer = Callable[[dict[str, Any]], dict[str, Any]]

log = logging.getLogger("refusion")


class PageServer:
    """Serves the page of one stream until `close`.

    Args:
        live: what is shown.
        address: host and port to listen at; port 0 takes a free one.
        access: who may ask, from the port that was bound.
        status: the stream's numbers, as `Stream.status` gives them.
        control: changes policies and returns those in effect; an empty dict changes nothing. InputError refuses.
        offer: answers a WebRTC offer.

    Attributes:
        port: that is listened at.

    Raises:
        InputError: the address can't be listened at.
    """

    def __init__(
        self,
        live: Live,
        address: tuple[str, int],
        access: Access,
        *,
        status: Status,
        control: Control | None = None,
        offer: Offer | None = None,
    ):
        self.live, self.access = live, access
        self.status, self.control, self.offer = status, control, offer
        try:
            self._server = _Server(address, self)
        except OSError as error:
            raise InputError(
                f"http://{address[0]}:{address[1]} cannot be listened at ({error.strerror or error}); "
                "give another port, as in http://127.0.0.1:8001"
            ) from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="page", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, end all connections and their threads."""
        self.live.close()
        self._server.shutdown()
        self._server.end_connections()
        self._server.server_close()
        self._thread.join()

    def connections(self) -> int:
        """Clients that are connected now."""
        return len(self._server.open)

    def numbers(self) -> dict[str, Any]:
        """What `/status.json` shows: the stream's status, with `page` and `policy`."""
        page = {
            "latency_ms": self.live.latency_ms(),
            "connections": self.connections(),
            "webrtc": self.offer is not None,
        }
        return {**self.status(), "page": page, "policy": self.control({}) if self.control else None}

    def metrics(self) -> str:
        """What `/metrics` shows."""
        lines = [prometheus_text(self.status())]
        for quantile, value in (self.live.latency_ms() or {}).items():
            lines.append(f'refusion_page_latency_ms{{quantile="0.{quantile[1:]}"}} {value}\n')
        return "".join([*lines, f"refusion_page_connections {self.connections()}\n"])


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 16

    def __init__(self, address: tuple[str, int], page: PageServer):
        self.page = page
        self.open: dict[socket.socket, threading.Thread] = {}
        self._lock = threading.Lock()
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # The parent's looks up the host's name, which may take seconds without a network.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), name="page client", daemon=True
        )
        with self._lock:
            full = len(self.open) >= MAX_CONNECTIONS
            if not full:
                self.open[request] = thread
        if full:
            request.settimeout(1)
            request.sendall(b"HTTP/1.1 503 Too many connections\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self.shutdown_request(request)
        else:
            thread.start()

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self.open.pop(request, None)
        super().shutdown_request(request)

    def end_connections(self) -> None:
        with self._lock:
            left = dict(self.open)
        for request, thread in left.items():
            with contextlib.suppress(OSError):  # where it ended by itself
                request.shutdown(socket.SHUT_RDWR)
            thread.join(IDLE_TIMEOUT)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Clients that go away in the middle are everyday life; anything else is a fault of ours.
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            log.exception("a request to the page failed")


class _RefusedError(Exception):
    """Ends a request with a status and one line."""

    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "refusion", ""
    timeout = IDLE_TIMEOUT
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    def log_message(self, format: str, *args: Any) -> None:
        pass  # request lines may hold the token

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def _answer(self, method: str) -> None:
        try:
            path, _, text = self.path.partition("?")
            query = {name: values[-1] for name, values in parse_qs(text).items()}
            # Read before anything is refused: what is left unread would be taken for the next request.
            body = self._body() if method == "POST" else b""
            refused = self.server.page.access.refusal(method, self.headers, query.get("token"))
            if refused:
                raise _RefusedError(*refused)
            if method == "POST":
                self._post(path, body)
            else:
                self._get(path, query)
        except _RefusedError as refused_now:
            self.close_connection = True
            self._send(refused_now.status, f"{refused_now}\n".encode(), "text/plain; charset=utf-8")
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _get(self, path: str, query: dict[str, str]) -> None:
        page = self.server.page
        name, _, kind = path[1:].partition(".")
        if path in STATIC:
            self._static(path, query)
        elif path == "/frame":
            self._frame(query.get("after", "0"))
        elif path == "/status.json":
            self._json(200, page.numbers())
        elif path == "/metrics":
            self._send(200, page.metrics().encode(), "text/plain; version=0.0.4; charset=utf-8")
        elif path == "/healthz":
            self._healthz()
        elif name in PICTURES and kind == "mjpg":
            self._mjpeg(name)
        elif name in PICTURES and kind == "jpg":
            shown = page.live.wait(0, LONG_POLL)
            if shown is None or not shown.jpeg(name):
                raise _RefusedError(404, "there is no picture yet")
            self._send(200, shown.jpeg(name), "image/jpeg")
        else:
            raise _RefusedError(404, "no such page")

    def _post(self, path: str, body: bytes) -> None:
        page = self.server.page
        action = {"/control": page.control, "/offer": page.offer}.get(path)
        if action is None:
            raise _RefusedError(404, "no such page, or it is switched off")
        # Other sites' pages may send forms without asking, but not this type.
        if self.headers.get_content_type() != "application/json":
            raise _RefusedError(415, "send JSON, with Content-Type: application/json")
        try:
            wish = json.loads(body)
        except (ValueError, RecursionError):
            raise _RefusedError(400, "this is not JSON") from None
        if not isinstance(wish, dict):
            raise _RefusedError(400, "send a JSON object")
        try:
            self._json(200, action(wish))
        except InputError as error:
            self._json(400, {"error": str(error)})

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY:
            raise _RefusedError(413, f"a body of 0 to {MAX_BODY} bytes with its Content-Length, please")
        return self.rfile.read(int(length))

    def _static(self, path: str, query: dict[str, str]) -> None:
        if query.get("token") and path == "/":
            # The token leaves the address bar, and with it the history and what is copied from there.
            self._send(303, b"", "text/plain", {"Location": "/", "Set-Cookie": self.server.page.access.cookie()})
            return
        file, kind = STATIC[path]
        self._send(200, (resources.files("runtime.page") / file).read_bytes(), kind)

    def _frame(self, after: str) -> None:
        if not (after.isdecimal() and len(after) < 16):
            raise _RefusedError(400, "after is the number of a frame")
        shown = self.server.page.live.wait(int(after), LONG_POLL)
        if shown is None:
            self._send(204, b"", "application/octet-stream")
        else:
            self._send(200, packed(shown), "application/octet-stream")

    def _healthz(self) -> None:
        silence = self.server.page.live.silence()
        if silence is not None and silence <= SILENT_AFTER:
            self._send(200, b"ok\n", "text/plain")
            return
        line = "no frame yet" if silence is None else f"no frame for {silence:.0f} s"
        self._send(503, f"{line}\n".encode(), "text/plain")

    def _mjpeg(self, name: str) -> None:
        """Send pictures until the client goes away. While it is slow, frames are left out: the next is the newest."""
        live = self.server.page.live
        self.close_connection = True
        self._start(200, f"multipart/x-mixed-replace; boundary={_BOUNDARY}", {})
        number = 0
        while not live.closed:
            shown = live.wait(number, LONG_POLL)
            if shown is None:
                continue
            number = shown.number
            if jpeg := shown.jpeg(name):
                head = f"--{_BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                self.wfile.write(head.encode() + jpeg + b"\r\n")

    def _json(self, status: int, value: dict[str, Any]) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self._start(status, kind, {"Content-Length": str(len(body)), **(headers or {})})
        self.wfile.write(body)

    def _start(self, status: int, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, **headers}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()


def packed(shown: Shown) -> bytes:
    """A frame as the page reads it: four blocks, each behind its length in bytes (uint32, little-endian).

    JSON with `number`, `state`, `skew_ms` and `age_ms`; then fused, a and b as JPEG, empty where there is none.
    """
    frame = shown.frame
    head = {"number": shown.number, "state": frame.state, "skew_ms": frame.skew_ms, "age_ms": frame.age_ms}
    blocks = [json.dumps(head).encode(), *(shown.jpeg(name) for name in PICTURES)]
    return b"".join(struct.pack("<I", len(block)) + block for block in blocks)
