"""A sink: one thread and one bounded queue in front of an output, so that a slow one never slows the stream."""

from __future__ import annotations

import atexit
import logging
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from runtime.errors import InputError
from runtime.frames import FusedFrame

CLOSE_TIMEOUT = 15.0  # seconds that an output may take to write what waits and to finish

log = logging.getLogger("refusion")
_sinks: weakref.WeakSet[Sink] = weakref.WeakSet()


class Output(Protocol):
    """What a kind of sink implements. `write` and `finish` are called in the sink's thread, one at a time.

    Attributes:
        url: what it is called in messages and summaries; never holds a password or token.
    """

    url: str

    def write(self, frame: FusedFrame) -> None:
        """Take one frame; may wait."""

    def finish(self) -> None:
        """Write what is left and close. Called once, also after `write` failed."""

    def counters(self) -> dict[str, Any]:
        """Numbers of its own, for the summary."""


class Sink:
    """Frames go in without waiting; the sink's own thread hands them to the output.

    An output that fails (a full disk, say) is given up with one line in the log: frames for it count as dropped, and
    the stream and the other sinks go on.

    Attributes:
        url: what it is called in messages; holds no password or token.
        output: what the frames are handed to.
    """

    def __init__(self, output: Output, queue_size: int = 1):
        self.output = output
        self.url = output.url
        self._frames: deque[FusedFrame] = deque()
        self._queue_size = queue_size
        self._changed = threading.Condition()
        self._closing = False
        self._written = self._dropped = 0
        self._busy_seconds = 0.0
        self._error: str | None = None
        self._thread = threading.Thread(target=self._run, name=f"sink {self.url}", daemon=True)
        _sinks.add(self)
        self._thread.start()

    def write(self, frame: FusedFrame) -> None:
        """Hand over one frame. Never waits: where the queue is full the oldest frame in it is dropped."""
        with self._changed:
            if self._closing or self._error:
                self._dropped += 1
                return
            if len(self._frames) >= self._queue_size:
                self._frames.popleft()
                self._dropped += 1
            self._frames.append(frame)
            self._changed.notify()

    def close(self) -> None:
        """Write the frames that wait, finish the file and end the thread. May be called again."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is threading.current_thread():  # its own function closes the stream
            return
        self._thread.join(CLOSE_TIMEOUT)
        if self._thread.is_alive():
            log.warning("%s did not finish within %.0f s and is left behind", self.url, CLOSE_TIMEOUT)

    def counters(self) -> dict[str, Any]:
        """`url`, frames `written`, `dropped`, `queued`, mean `write_ms`, `error` (or None), and the kind's own."""
        with self._changed:
            return {
                "url": self.url,
                "written": self._written,
                "dropped": self._dropped,
                "queued": len(self._frames),
                "write_ms": round(1000 * self._busy_seconds / self._written, 3) if self._written else None,
                "error": self._error,
                **self.output.counters(),
            }

    def _run(self) -> None:
        while (frame := self._next()) is not None:
            start = time.perf_counter()
            try:
                self.output.write(frame)
            except Exception as error:  # whatever it is, it must not reach the stream
                self._give_up(error)
                break
            with self._changed:
                self._written += 1
                self._busy_seconds += time.perf_counter() - start
        try:
            self.output.finish()
        except Exception as error:
            self._give_up(error)

    def _next(self) -> FusedFrame | None:
        with self._changed:
            while not self._frames and not self._closing:
                self._changed.wait()
            return self._frames.popleft() if self._frames else None

    def _give_up(self, error: Exception) -> None:
        line = " ".join(str(error).split()) or type(error).__name__
        with self._changed:
            self._error = self._error or line
            self._dropped += len(self._frames)
            self._frames.clear()
        log.error("%s failed and gets no more frames: %s", self.url, line)
        log.debug("the failure of %s", self.url, exc_info=error)


@atexit.register
def _finish_files() -> None:
    """What nobody closed is whole all the same."""
    for sink in list(_sinks):
        sink.close()


def temporary_beside(path: Path) -> Path:
    """An empty file beside the one that it will become, with the same suffix; makes the folder where there is none.

    Raises:
        InputError: it can't be made.
    """
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise InputError(f"{path} is a folder; give the name of a file")
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    return temporary


class NullOutput:
    """Takes every frame and keeps none."""

    url = "null://"

    def write(self, frame: FusedFrame) -> None:
        pass

    def finish(self) -> None:
        pass

    def counters(self) -> dict[str, Any]:
        return {}


class CallbackOutput:
    """Calls a function with every frame; what it raises ends the sink, not the stream."""

    def __init__(self, function: Callable[[FusedFrame], object], name: str):
        self.url = f"callback {name}"
        self._function = function

    def write(self, frame: FusedFrame) -> None:
        self._function(frame)

    def finish(self) -> None:
        pass

    def counters(self) -> dict[str, Any]:
        return {}
