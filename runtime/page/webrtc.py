"""The fused picture as WebRTC video, encoded once for each viewer; needs the package aiortc.

The offer comes through the page's own server, under its rules. No STUN or TURN server is asked: viewers are on this
machine or its network, whose addresses the media listens at.
"""

from __future__ import annotations

import asyncio
import threading
import time
from fractions import Fraction
from typing import Any

import av
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription, VideoStreamTrack
from aiortc.mediastreams import MediaStreamError

from runtime.errors import InputError
from runtime.page.live import LONG_POLL, Live
from runtime.sinks.video import even

MAX_PEERS = 4  # each costs an encoder
ANSWER_TIMEOUT = 10.0  # seconds
_CLOCK = 90_000  # ticks a second


class _LiveTrack(VideoStreamTrack):
    """The newest frame whenever the encoder is ready for one."""

    def __init__(self, live: Live):
        super().__init__()
        self._live = live
        self._number = 0

    async def recv(self) -> av.VideoFrame:
        loop = asyncio.get_running_loop()
        while not self._live.closed:
            shown = await loop.run_in_executor(None, self._live.wait, self._number, LONG_POLL)
            if shown is not None:
                self._number = shown.number
                image = even(shown.frame.image)
                picture = av.VideoFrame.from_ndarray(image, format="gray" if image.ndim == 2 else "bgr24")
                picture = picture.reformat(format="yuv420p")
                picture.pts, picture.time_base = round(time.monotonic() * _CLOCK), Fraction(1, _CLOCK)
                return picture
        raise MediaStreamError("the stream has ended")


class Peers:
    """The viewers' connections, in a thread with its own event loop."""

    def __init__(self, live: Live):
        self._live = live
        self._peers: set[RTCPeerConnection] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="webrtc", daemon=True)
        self._thread.start()

    def answer(self, offer: dict[str, Any]) -> dict[str, Any]:
        """The answer to a browser's offer: `type` and `sdp`, as it gives them.

        Raises:
            InputError: no offer, or too many viewers.
        """
        if offer.get("type") != "offer" or not isinstance(offer.get("sdp"), str):
            raise InputError("send an offer with type and sdp")
        if len(self._peers) >= MAX_PEERS:
            raise InputError(f"{MAX_PEERS} viewers are connected, which is the most; watch the single pictures")
        return asyncio.run_coroutine_threadsafe(self._answer(offer["sdp"]), self._loop).result(ANSWER_TIMEOUT)

    async def _answer(self, sdp: str) -> dict[str, Any]:
        peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self._peers.add(peer)

        @peer.on("connectionstatechange")
        async def changed() -> None:
            if peer.connectionState in ("failed", "closed"):
                self._peers.discard(peer)
                await peer.close()

        try:
            await peer.setRemoteDescription(RTCSessionDescription(sdp, "offer"))
            peer.addTrack(_LiveTrack(self._live))
            await peer.setLocalDescription(await peer.createAnswer())
        except ValueError as error:
            self._peers.discard(peer)
            await peer.close()
            raise InputError(f"the offer is not understood ({error})") from error
        return {"type": peer.localDescription.type, "sdp": peer.localDescription.sdp}

    def close(self) -> None:
        """End all connections and the thread."""
        asyncio.run_coroutine_threadsafe(self._close_all(), self._loop).result(ANSWER_TIMEOUT)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close_all(self) -> None:
        await asyncio.gather(*(peer.close() for peer in list(self._peers)))
        await self._loop.shutdown_default_executor()
