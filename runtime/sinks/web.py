"""`http://`: the web page of the stream."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from runtime.errors import InputError
from runtime.frames import FusedFrame
from runtime.page.access import Access
from runtime.page.live import Live, OwnStatus
from runtime.page.server import Control, PageServer, Status
from runtime.sinks.base import Output
from runtime.sinks.uri import Endpoint, SinkOptions, parse_endpoint

if TYPE_CHECKING:
    from runtime.page.webrtc import Peers

TOKEN_VARIABLE = "REFUSION_TOKEN"
SHORTEST_TOKEN = 16


def open_page(
    address: str, options: SinkOptions, status: Status | None = None, control: Control | None = None
) -> Output:
    """Open the page at an address, see `runtime.page.server` for what it serves.

    On loopback anybody on this machine may look. Any other address, such as 0.0.0.0, needs a token, which every request
    must then show; it travels unencrypted.

    Options:
        token: of 16 characters or more; taken from the environment variable REFUSION_TOKEN where it isn't given here.
        host: a further name by which browsers reach this machine.
        webrtc: 1 sends the fused picture as WebRTC video as well (needs the extra `webrtc`).

    Args:
        status, control: see `runtime.page.server.PageServer`; without a status the page shows what the frames tell.

    Raises:
        InputError: a port in use, a path behind the address, or an open address without a token.
    """
    endpoint = parse_endpoint("http", address, 8000)
    token = options.text("token") or (None if endpoint.loopback else os.environ.get(TOKEN_VARIABLE))
    host = options.text("host")
    webrtc = options.flag("webrtc", False)
    options.done()
    if endpoint.path not in ("", "/") or endpoint.user:
        raise InputError(f"http://{endpoint.host}:{endpoint.port} takes neither a path nor a user")
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise InputError(f"the token of the page is too short; give {SHORTEST_TOKEN} characters or more")
    if token is None and not endpoint.loopback:
        raise InputError(
            f"http://{endpoint.host} can be reached from other machines; give it a token (?token=... or "
            f"{TOKEN_VARIABLE}), or listen at 127.0.0.1"
        )
    access = Access(loopback=endpoint.loopback, token=token, hosts=(host,) if host else ())
    return Page(endpoint, access, status, control, webrtc)


def _open_peers(live: Live) -> Peers:
    try:
        from runtime.page.webrtc import Peers
    except ImportError as error:
        raise InputError("webrtc=1 needs the package aiortc: pip install 'refusion[webrtc]'") from error
    return Peers(live)


class Page:
    """Hands the frames to the page and counts its visitors."""

    def __init__(
        self, endpoint: Endpoint, access: Access, status: Status | None, control: Control | None, webrtc: bool
    ):
        self._live = Live()
        self._own = OwnStatus() if status is None else None
        self._peers = _open_peers(self._live) if webrtc else None
        try:
            self.server = PageServer(
                self._live,
                (endpoint.host, endpoint.port),
                access,
                status=status or self._own_status,
                control=control,
                offer=self._peers.answer if self._peers else None,
            )
        except InputError:
            self._close_peers()
            raise
        self.url = endpoint.url(self.server.port)

    def write(self, frame: FusedFrame) -> None:
        if self._own is not None:
            self._own.update(frame)
        self._live.update(frame)

    def finish(self) -> None:
        self._close_peers()
        self.server.close()

    def counters(self) -> dict[str, Any]:
        return {"connections": self.server.connections()}

    def _own_status(self) -> dict[str, Any]:
        assert self._own is not None
        return self._own.snapshot()

    def _close_peers(self) -> None:
        if self._peers is not None:
            self._peers.close()
