"""The web page: what it serves and to whom, and what a real browser shows of it.

REFUSION_SCREENSHOTS=FOLDER keeps pictures of the page.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from runtime.errors import InputError
from runtime.frames import Frame, FusedFrame
from runtime.page import server as page_server
from runtime.page.live import preview
from runtime.scenes import night_road
from runtime.sinks import open_sink
from runtime.sinks.base import Sink

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "correct-horse-battery"
JSON = {"Content-Type": "application/json"}


def frame(index: int, state: str = "fused", size: tuple[int, int] = (96, 128)) -> FusedFrame:
    infrared, visible = night_road(index, size)
    now = time.time()
    counts = infrared.astype(np.uint16) * 60
    a = Frame(counts, now, "device", time.monotonic(), index, "thermal") if state != "a_missing" else None
    b = Frame(visible, now, "device", time.monotonic(), index, "visible")
    fused = np.maximum(visible, infrared[..., None])
    return FusedFrame(fused, a, b, state, 0.5, 3.0, False, now, index, {"fuse": 0.002})


class Policy:
    """A control like a stream's."""

    def __init__(self) -> None:
        self.values = {"range": "stretch", "chroma": "auto", "tone": "percentile", "on_missing": "hold"}

    def __call__(self, change: dict[str, Any]) -> dict[str, Any]:
        unknown = set(change) - set(self.values)
        if unknown:
            raise InputError(f"there is no policy '{unknown.pop()}'")
        self.values.update(change)
        return dict(self.values)


@pytest.fixture
def policy() -> Policy:
    return Policy()


@pytest.fixture
def sink(policy) -> Iterator[Sink]:
    sink = open_sink("http://127.0.0.1:0", control=policy)
    yield sink
    sink.close()


def port_of(sink: Sink) -> int:
    return sink.output.server.port  # type: ignore[attr-defined]


def show(sink: Sink, *frames: FusedFrame) -> None:
    """Write frames, each once the one before is shown."""
    for one in frames:
        before = sink.counters()["written"]
        sink.write(one)
        while sink.counters()["written"] == before:
            time.sleep(0.001)


def ask(
    sink: Sink, path: str, method: str = "GET", body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """One request with exactly these headers; Host is ours unless given."""
    connection = http.client.HTTPConnection("127.0.0.1", port_of(sink), timeout=20)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def unpack(data: bytes) -> list[bytes]:
    blocks = []
    while data:
        (length,) = struct.unpack_from("<I", data)
        blocks.append(data[4 : 4 + length])
        data = data[4 + length :]
    return blocks


# ---- what is served


def test_the_page_loads_nothing_from_elsewhere(sink):
    for path in page_server.STATIC:
        status, headers, body = ask(sink, path)
        assert status == 200
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert b"http://" not in body and b"https://" not in body
    assert ask(sink, "/../server.py")[0] == 404


def test_frame_has_all_pictures(sink):
    show(sink, frame(0), frame(1, "held"))
    status, _, body = ask(sink, "/frame?after=0")
    assert status == 200
    head, *jpegs = unpack(body)
    assert json.loads(head) == {"number": 2, "state": "held", "skew_ms": 0.5, "age_ms": 3.0}
    fused, a, b = (cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_UNCHANGED) for jpeg in jpegs)
    expected = frame(1)
    assert np.abs(fused.astype(float) - expected.image).mean() < 4
    assert np.abs(b.astype(float) - expected.b.image).mean() < 4
    assert np.abs(a.astype(float) - preview(expected.a.image)).mean() < 4
    assert a.max() > 240  # counts of a few thousand are shown in full contrast


def test_frame_waits_for_the_next(sink):
    show(sink, frame(0))
    got = []
    asking = threading.Thread(target=lambda: got.append(ask(sink, "/frame?after=1")))
    asking.start()
    while not sink.counters()["connections"]:
        time.sleep(0.001)
    show(sink, frame(1, "a_missing"))
    asking.join()
    head, fused, a, b = unpack(got[0][2])
    assert json.loads(head)["number"] == 2
    assert a == b""
    assert fused and b


def test_mjpeg_shows_the_newest_to_a_player(sink):
    done = threading.Event()

    def feed() -> None:
        for index in range(10_000):
            if done.wait(0.01):
                return
            sink.write(FusedFrame(np.full((64, 64), index % 250, np.uint8), None, None, "fused", 0, 0, False, 0, index))

    feeder = threading.Thread(target=feed)
    feeder.start()
    capture = cv2.VideoCapture(f"{sink.url}/fused.mjpg", cv2.CAP_FFMPEG)
    values = [capture.read()[1].mean() for _ in range(10)]
    capture.release()
    done.set()
    feeder.join()
    steps = np.diff(np.round(values))
    assert (steps > 0).sum() >= 9  # every picture is a newer one, but where the grey begins anew


def test_status_counts(sink, policy):
    status = json.loads(ask(sink, "/status.json")[2])
    assert status["state"] == "waiting"
    assert status["page"]["latency_ms"] is None
    show(sink, *(frame(i) for i in range(5)), frame(5, "a_missing"))
    status = json.loads(ask(sink, "/status.json")[2])
    assert status["frames"] == 6
    assert status["states"] == {"fused": 5, "a_missing": 1}
    assert status["state"] == "a_missing"
    assert status["sources"]["a"]["frames"] == 5
    assert (
        status["sources"]["b"] | {"name": "visible", "frames": 6, "size": "128x96", "depth": 8}
        == (status["sources"]["b"])
    )
    assert status["page"]["latency_ms"]["p95"] >= status["page"]["latency_ms"]["p50"] > 0
    assert status["policy"] == policy.values


def test_status_is_the_streams_where_it_gives_one():
    given = {"state": "held", "frames": 7}
    sink = open_sink("http://127.0.0.1:0", status=lambda: dict(given))
    try:
        status = json.loads(ask(sink, "/status.json")[2])
        assert {**status, **given} == status
        assert status["policy"] is None
        assert ask(sink, "/control", "POST", b"{}", JSON)[0] == 404
    finally:
        sink.close()


def test_metrics_are_prometheus_text(sink):
    show(sink, *(frame(i) for i in range(4)))
    status, headers, body = ask(sink, "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    lines = body.decode().splitlines()
    for line in lines:
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            assert name.startswith("refusion_")
            float(value)
    assert 'refusion_output_frames_total{state="fused"} 4' in lines
    assert any(line.startswith('refusion_page_latency_ms{quantile="0.95"} ') for line in lines)


def test_healthz_tells_whether_frames_come(sink, monkeypatch):
    assert ask(sink, "/healthz")[0] == 503
    show(sink, frame(0))
    assert ask(sink, "/healthz")[::2] == (200, b"ok\n")
    monkeypatch.setattr(page_server, "SILENT_AFTER", 0.01)
    time.sleep(0.05)
    status, _, body = ask(sink, "/healthz")
    assert (status, body) == (503, b"no frame for 0 s\n")


def test_control_changes_the_policy(sink, policy):
    status, _, body = ask(sink, "/control", "POST", b'{"range": "keep"}', JSON)
    assert (status, json.loads(body)["range"]) == (200, "keep")
    assert policy.values["range"] == "keep"
    status, _, body = ask(sink, "/control", "POST", b'{"speed": 3}', JSON)
    assert (status, json.loads(body)) == (400, {"error": "there is no policy 'speed'"})
    assert ask(sink, "/control", "POST", b"[1]", JSON)[0] == 400
    assert ask(sink, "/control", "POST", b"range=keep", JSON)[0] == 400
    assert ask(sink, "/control", "POST", b"[" * 60_000, JSON)[0] == 400
    assert ask(sink, "/control", "POST", b"{}", {"Content-Type": "text/plain"})[0] == 415
    assert ask(sink, "/control", "POST", b"{" + b" " * 70_000 + b"}", JSON)[0] == 413
    assert ask(sink, "/control", "GET")[0] == 404
    for after in ("x", "-1", "9" * 5000):
        assert ask(sink, f"/frame?after={after}")[0] == 400


# ---- who is served


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:{port}"}, 200),
        ({"Host": "[::1]:{port}"}, 200),
        ({"Host": "evil.example:{port}"}, 403),  # DNS rebinding
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "10.0.0.7:{port}"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "[::1"}, 403),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Origin": "http://evil.example"}, 403),  # CSRF
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "http://127.0.0.1.evil.example:{port}"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[evil"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_foreign_hosts_and_origins_are_refused(sink, policy, headers, status):
    show(sink, frame(0))
    own = {name: value.format(port=port_of(sink)) for name, value in headers.items()}
    assert ask(sink, "/control", "POST", b'{"range": "smooth"}', own | JSON)[0] == status
    assert policy.values["range"] == ("smooth" if status == 200 else "stretch")
    for path in ("/", "/fused.jpg", "/status.json"):
        assert ask(sink, path, headers=own)[0] == status


def test_a_link_to_the_page_is_followed_but_nothing_is_embedded(sink):
    show(sink, frame(0))
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document", "Sec-Fetch-Mode": "navigate"}
    assert ask(sink, "/", headers=link)[0] == 200
    assert ask(sink, "/fused.jpg", headers=link | {"Sec-Fetch-Dest": "image"})[0] == 403
    assert ask(sink, "/control", "POST", b"{}", JSON | link)[0] == 403


@pytest.fixture
def guarded(policy) -> Iterator[Sink]:
    sink = open_sink(f"http://127.0.0.1:0?token={TOKEN}", control=policy)
    yield sink
    sink.close()


def test_every_request_needs_the_token(guarded, caplog, capfd):
    show(guarded, frame(0))
    paths = ("/", "/page.js", "/frame?after=0", "/status.json", "/metrics", "/healthz", "/fused.jpg", "/fused.mjpg")
    for path in paths:
        assert ask(guarded, path)[0] == 401
        assert ask(guarded, path, headers={"Authorization": "Bearer wrong"})[0] == 401
        assert ask(guarded, path, headers={"Cookie": f"refusion_session={TOKEN}"})[0] == 401
    assert ask(guarded, "/control", "POST", b"{}", JSON)[0] == 401
    assert ask(guarded, "/?token=wrong")[0] == 401
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    assert ask(guarded, "/status.json", headers=bearer)[0] == 200
    assert ask(guarded, f"/fused.jpg?token={TOKEN}")[0] == 200
    assert ask(guarded, "/control", "POST", b"{}", JSON | bearer)[0] == 200
    assert ask(guarded, "/control", "POST", b"{}", JSON | bearer | {"Origin": "http://evil.example"})[0] == 403
    seen = "".join([guarded.url, str(guarded.counters()), caplog.text, *capfd.readouterr()])
    assert TOKEN not in seen


def test_the_first_visit_turns_the_token_into_a_cookie(guarded):
    status, headers, _ = ask(guarded, f"/?token={TOKEN}")
    assert (status, headers["Location"]) == (303, "/")
    cookie = headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert TOKEN not in cookie
    assert ask(guarded, "/", headers={"Cookie": cookie.split(";")[0]})[0] == 200
    assert ask(guarded, "/", headers={"Cookie": "refusion_session=x; =;"})[0] == 401


def test_an_open_address_knows_its_names_and_needs_the_token(policy, monkeypatch):
    monkeypatch.setenv("REFUSION_TOKEN", TOKEN)
    sink = open_sink("http://0.0.0.0:0?host=robot.lan", control=policy)
    try:
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        assert ask(sink, "/status.json")[0] == 401
        for host, status in (
            ("10.0.0.7", 200), ("robot.lan:8000", 200), (socket.gethostname(), 200), ("evil.example", 403),
        ):  # fmt: skip
            assert ask(sink, "/status.json", headers=bearer | {"Host": host})[0] == status
    finally:
        sink.close()


# ---- robustness


def test_port_in_use(sink):
    with pytest.raises(InputError, match="cannot be listened at"):
        open_sink(sink.url)


def test_a_client_that_reads_nothing_does_not_slow_the_sink(sink):
    with socket.create_connection(("127.0.0.1", port_of(sink))) as idle:
        idle.sendall(b"GET /fused.mjpg HTTP/1.1\r\nHost: localhost\r\n\r\n")
        noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
        for index in range(60):  # far more than all buffers hold
            show(sink, FusedFrame(noise, None, None, "fused", 0, 0, False, 0, index))
        assert ask(sink, "/frame?after=59")[0] == 200
        assert sink.counters()["dropped"] == 0


def test_connections_are_bounded_and_end_with_the_sink(sink):
    before = threading.active_count()
    show(sink, frame(0))
    clients = [socket.create_connection(("127.0.0.1", port_of(sink))) for _ in range(page_server.MAX_CONNECTIONS)]
    try:
        for client in clients:
            client.sendall(b"GET /fused.mjpg HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(15) == b"HTTP/1.1 200 OK"
        assert sink.counters()["connections"] == page_server.MAX_CONNECTIONS
        assert ask(sink, "/")[0] == 503
        clients.pop().close()
        while sink.counters()["connections"] == page_server.MAX_CONNECTIONS:
            show(sink, frame(1))  # its thread notices when it has something to send
        assert ask(sink, "/")[0] == 200
        sink.close()
        for client in clients:
            client.settimeout(20)
            while client.recv(65536):  # up to the end
                pass
        assert threading.active_count() <= before - 2  # the sink's own and the server's
    finally:
        for client in clients:
            client.close()


def test_garbage_is_answered_and_forgotten(sink, caplog):
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /control HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port_of(sink)), timeout=20) as client:
            client.sendall(garbage)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass
    assert ask(sink, "/")[0] == 200
    assert not caplog.records


# ---- a real browser


class Browser:
    """Headless Chromium, driven through the DevTools protocol over a pair of pipes."""

    def __init__(self, program: str, profile: Path):
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]
        # It wants the pipes as descriptors 3 and 4.
        wired = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", wired, program, *flags, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._number = 0
        self._buffer = b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            if answer.get("method") == "Log.entryAdded" and answer["params"]["entry"]["level"] == "error":
                self.complaints.append(answer["params"]["entry"]["text"])
            if answer.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(str(answer["params"]["exceptionDetails"]))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._in, 1 << 20)
            assert data, "the browser ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives, its promise awaited."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, url: str, width: int, height: int, phone: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def open_when_there(self, url: str, width: int, height: int, seconds: float = 60) -> None:
        """Open a page whose server is still starting."""
        port = int(url.rpartition(":")[2].strip("/"))
        end = time.monotonic() + seconds
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < end, f"{url} never came"
            time.sleep(0.1)
        self.open(url, width, height)

    def until(self, expression: str, seconds: float = 30) -> Any:
        """Wait for an expression to be true; returns its value."""
        end = time.monotonic() + seconds
        while not (found := self.value(expression)):
            assert time.monotonic() < end, f"never came true: {expression}"
            time.sleep(0.05)
        return found

    def screenshot(self, name: str) -> np.ndarray:
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        folder = os.environ.get("REFUSION_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / f"{name}.png").write_bytes(data)
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)

    def close(self) -> None:
        os.close(self._out)  # which ends it
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)


@pytest.fixture
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium (apt install chromium)")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(program, Path(profile))
        yield browser
        browser.close()


PIXELS = """(() => {
  const canvas = document.getElementById("fused-picture");
  return Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data);
})()"""


@pytest.fixture
def running(sink) -> Iterator[Sink]:
    """A page that shows the night road at 20 frames/s."""
    frames = [frame(i, "held" if i % 12 == 11 else "fused", (240, 320)) for i in range(24)]
    done = threading.Event()

    def feed() -> None:
        index = 0
        while not done.wait(0.05):
            one = frames[index % len(frames)]
            for source in (one.a, one.b):
                source.time, source.arrival = time.time(), time.monotonic() - 0.004  # type: ignore[union-attr]
            sink.write(one)
            index += 1

    feeder = threading.Thread(target=feed)
    feeder.start()
    yield sink
    done.set()
    feeder.join()


def test_scene_moves() -> None:
    assert (frame(0).image != frame(12).image).mean() > 0.1


@pytest.mark.slow
def test_browser_shows_moving_pictures_and_counters(running, browser, policy):
    browser.open(running.url, 1440, 900)
    browser.until("document.getElementById('state').textContent === 'fused'")
    browser.until("document.getElementById('fused-picture').width === 320")
    count = "+document.querySelector('#counters tr:last-child td:nth-child(2)').textContent.replaceAll(',', '')"
    frames = browser.until(count)
    reads = []
    for _ in range(4):  # two may meet the same picture of the loop
        reads.append(np.array(browser.value(PIXELS)))
        time.sleep(0.2)
    assert max((np.abs(reads[0] - later) > 16).mean() for later in reads[1:]) > 0.01  # the picture moves
    browser.until(f"{count} > {frames + 20}")
    shown = reads[0].reshape(240, 320, 4)[..., 2::-1].astype(float)
    errors = [np.abs(shown - frame(i, size=(240, 320)).image).mean() for i in range(24)]
    assert min(errors) < 5  # and is one of those that were sent
    fps, p50 = (browser.until(f"+document.getElementById('{name}').textContent") for name in ("fps", "p50"))
    assert fps > 1
    assert p50 >= 4
    assert browser.value("document.querySelector('#source-a b').textContent") == "thermal"
    assert browser.value("document.querySelector('#source-b .badge').textContent") == "ok"
    browser.value("document.querySelector('[data-policy=chroma] button[value=none]').click()")
    browser.until("document.querySelector('[data-policy=chroma] button[value=none]').ariaPressed === 'true'")
    assert policy.values["chroma"] == "none"
    wide = browser.screenshot("desktop")
    assert wide.shape == (900, 1440, 3)
    assert wide.std() > 20
    assert browser.value("document.documentElement.scrollWidth") <= 1440  # nothing sticks out
    browser.open(running.url, 390, 844, phone=True)
    browser.until(
        "document.getElementById('fused-picture').width === 320 && +document.getElementById('fps').textContent"
    )
    browser.screenshot("phone")
    assert browser.value("document.documentElement.scrollWidth") <= 390
    assert not browser.complaints
    running.close()
    browser.until("document.getElementById('state').textContent === 'not connected'")


@pytest.mark.slow
def test_browser_cannot_be_used_by_another_site(running, browser, policy):
    """A foreign page in the same browser tries to change the policy and to read the picture."""
    foreign = open_sink("http://127.0.0.1:0")
    try:
        browser.open(f"http://localhost:{port_of(foreign)}", 800, 600)
        attempt = "fetch('{url}/{path}', {options}).then(r => r.text()).catch(() => 'blocked')"
        wish = """{method: 'POST', mode: '%s', body: '{"range": "keep"}', headers: {'Content-Type': '%s'}}"""
        # Our own policy for page contents would stop these requests already; a foreign page has none.
        browser.call("Page.setBypassCSP", enabled=True)
        browser.call("Page.reload")
        browser.until("document.readyState === 'complete'")
        for mode, kind in (("cors", "application/json"), ("no-cors", "text/plain"), ("cors", "text/plain")):
            browser.value(attempt.format(url=running.url, path="control", options=wish % (mode, kind)))
        assert policy.values["range"] == "stretch"
        assert browser.value(attempt.format(url=running.url, path="status.json", options="{}")) == "blocked"
        load = f"""new Promise((done) => {{
          const picture = new Image();
          picture.onload = () => done("shown");
          picture.onerror = () => done("blocked");
          picture.src = "{running.url}/fused.jpg";
        }})"""
        assert browser.value(load) == "blocked"
    finally:
        foreign.close()


@pytest.mark.slow
def test_browser_with_a_token(guarded, browser):
    show(guarded, frame(0))
    browser.open(f"{guarded.url}/?token={TOKEN}", 800, 600)
    browser.until("document.getElementById('fused-picture')?.width === 128")
    assert browser.value("location.search") == ""
    assert browser.value("document.cookie") == ""  # scripts don't see it


@pytest.mark.slow
def test_browser_plays_webrtc(browser):
    pytest.importorskip("aiortc", reason="aiortc is not installed (pip install 'refusion[webrtc]')")
    before = threading.active_count()
    sink = open_sink("http://127.0.0.1:0?webrtc=1")
    done = threading.Event()

    def feed() -> None:
        frames, index = [frame(i, size=(240, 320)) for i in range(20)], 0
        while not done.wait(0.05):
            sink.write(frames[index % 20])
            index += 1

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        browser.open(sink.url, 1000, 700)
        browser.until("!document.getElementById('video-toggle').hidden")
        browser.value("document.getElementById('video-toggle').click()")
        video = "document.getElementById('fused-video')"
        browser.until(f"{video}.videoWidth === 320 && {video}.videoHeight === 240")
        begun = browser.value(f"{video}.currentTime")
        browser.until(f"{video}.currentTime > {begun} + 0.5")
        answer = ask(sink, "/offer", "POST", b'{"type": "offer", "sdp": "nonsense"}', JSON)
        assert answer[0] == 400
    finally:
        done.set()
        feeder.join()
        sink.close()
    assert threading.active_count() == before


@pytest.mark.slow
def test_browser_watches_a_stream(browser):
    """The whole way: cameras of the generated scene, the live loop, the page; and its controls back to the loop."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "refusion", "stream", "demo://night", "--sink", url]
    stream = subprocess.Popen(
        [*command, "--duration", "120"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        browser.open_when_there(f"{url}/", 1440, 900)
        browser.until("!document.getElementById('controls').hidden", 60)
        count = "+document.querySelector('#counters tr:nth-child(3) td:nth-child(2)')?.textContent.replaceAll(',', '')"
        frames = browser.until(count)
        first = np.array(browser.value(PIXELS))
        browser.until(f"{count} > {frames + 20}", 60)
        second = np.array(browser.value(PIXELS))
        assert (np.abs(first - second) > 16).mean() > 0.001
        colour = second.reshape(480, 640, 4)[..., :3].astype(int)
        assert np.ptp(colour, axis=2).mean() > 3
        for side, name in (("a", "infrared"), ("b", "visible")):
            assert browser.value(f"document.querySelector('#source-{side} b').textContent").endswith(name)
        browser.screenshot("stream")
        browser.value("document.querySelector('[data-policy=chroma] button[value=none]').click()")
        grey = """(() => {
          const data = document.getElementById("fused-picture").getContext("2d").getImageData(0, 0, 640, 480).data;
          return data.every((value, i) => i % 4 === 3 || value === data[i - i % 4]);
        })()"""
        browser.until(grey)
        assert not browser.complaints
        stream.send_signal(signal.SIGINT)
        out, err = stream.communicate(timeout=60)
        assert stream.returncode == 0, err
        assert f"sink {url}" in out
        browser.until("document.getElementById('state').textContent === 'not connected'")
    finally:
        stream.kill()
        stream.communicate()
