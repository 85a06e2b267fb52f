"""Pictures in POSIX shared memory: a ring of slots that one process writes and any number read without waiting.

The segment `/dev/shm/NAME` (what `shm_open("/NAME")` opens in C) holds, little-endian, a header of 64 bytes:

| offset | type | what |
|---|---|---|
| 0 | 8 bytes | `REFUSION` |
| 8 | uint32 | version of this layout, 1 |
| 12 | uint32 | number of slots |
| 16 | uint64 | bytes of a slot, its header included |
| 24 | uint64 | frames written so far: frame n, from 0, is in slot n modulo the number of slots |
| 32 | uint32 | 1 where no more frames will come: the writer ended, or made a larger segment of the same name |
| 36 | uint32 | process id of the writer |

and then the slots, each a header of 64 bytes and the pixels, row by row, BGR where there are three channels:

| offset | type | what |
|---|---|---|
| 0 | uint64 | sequence lock: 2n + 1 while frame n is written, 2n + 2 when it is whole |
| 8 | uint64 | index of the frame in its stream |
| 16 | float64 | time of capture, Unix seconds |
| 24 | uint32 | height |
| 28 | uint32 | width |
| 32 | uint32 | channels, 1 or 3 |
| 36 | uint32 | 0 for uint8, 1 for uint16 |
| 40 | uint32 | state: 0 fused, 1 held, 2 a_missing, 3 b_missing, 4 a camera's own picture |

A reader copies the pixels and then looks at the sequence again: where it changed, the frame was overwritten meanwhile.
"""

from __future__ import annotations

import mmap
import os
import re
import secrets
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.color import check_image
from runtime.errors import InputError

FOLDER = Path("/dev/shm")
MAGIC = b"REFUSION"
VERSION = 1
STATES = ("fused", "held", "a_missing", "b_missing", "camera")

_SEGMENT = struct.Struct("<8sIIQQII")
_COUNT_AT, _CLOSED_AT = 24, 32
_SLOT = struct.Struct("<QQdIIIII")
_HEADER_SIZE = 64  # of the segment, and of each slot
_DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16))
_LONGEST_SIDE = 1 << 16
_POLL = 0.002  # seconds between two looks for a new frame
_LOOK_FOR_SUCCESSOR = 0.2  # seconds between two looks whether the name means another segment by now


@dataclass(frozen=True)
class ShmFrame:
    """A picture from shared memory: HxW or HxWx3 (BGR), uint8 or uint16, the reader's own copy."""

    image: np.ndarray
    time: float  # of capture, Unix seconds
    index: int
    state: str  # one of STATES


class _Fence:
    """Keeps stores and loads on both sides of a call apart, as ARM processors would else reorder them.

    Python has no fence of its own; releasing a lock and taking it again has the effect of one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def __call__(self) -> None:
        self._lock.release()
        self._lock.acquire()


def _segment_path(name: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}", name):
        raise InputError(f"shm://{name}: a name has letters, digits, '_', '.' and '-', as in shm://fused")
    if not FOLDER.is_dir():
        raise InputError(f"shm://{name} needs {FOLDER}, which this system doesn't have")
    return FOLDER / name


def _check_owner(path: Path) -> None:
    """Refuse a name that belongs to something else, or to a writer that is alive."""
    try:
        with path.open("rb") as file:
            head = file.read(_SEGMENT.size)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"shm://{path.name} cannot be opened ({error.strerror}); take another name") from error
    if len(head) < _SEGMENT.size or not head.startswith(MAGIC):
        raise InputError(f"shm://{path.name} belongs to another program; take another name")
    closed, pid = _SEGMENT.unpack(head)[5:]
    if not closed and Path(f"/proc/{pid}").exists():
        raise InputError(f"shm://{path.name} is being written by process {pid}; take another name")


class ShmWriter:
    """Writes pictures into a segment, which appears with the first one and is removed at `close`.

    A larger picture makes a new segment of the same name; readers move over by themselves.

    Args:
        name: of the segment, without a slash.
        slots: pictures that the ring holds. A reader has `slots - 1` frames' time to copy one.

    Raises:
        InputError: a bad name, or one that another program or living process uses.
    """

    def __init__(self, name: str, slots: int = 4):
        self._path = _segment_path(name)
        self._slots = slots
        self._map: mmap.mmap | None = None
        self._slot_size = 0
        self._count = 0
        self._fence = _Fence()
        _check_owner(self._path)

    def write(self, image: np.ndarray, time: float, index: int, state: str = "camera") -> None:
        """Write one picture: HxW or HxWx3 (BGR), uint8 or uint16; never waits for readers.

        Raises:
            InputError: another type or shape, or too little shared memory.
        """
        check_image(image)
        if self._map is None or _HEADER_SIZE + image.nbytes > self._slot_size:
            self._make_segment(image.nbytes)
        assert self._map is not None
        start = _HEADER_SIZE + self._count % self._slots * self._slot_size
        height, width = image.shape[:2]
        channels = 1 if image.ndim == 2 else 3
        kind, code = _DTYPES.index(image.dtype), STATES.index(state)
        sequence = 2 * self._count
        struct.pack_into("<Q", self._map, start, sequence + 1)
        self._fence()
        _SLOT.pack_into(self._map, start, sequence + 1, index, time, height, width, channels, kind, code)
        pixels = np.frombuffer(self._map, image.dtype, image.size, start + _HEADER_SIZE)
        np.copyto(pixels.reshape(image.shape), image)
        self._fence()
        struct.pack_into("<Q", self._map, start, sequence + 2)
        self._fence()
        self._count += 1
        struct.pack_into("<Q", self._map, _COUNT_AT, self._count)

    def close(self) -> None:
        """Tell the readers that no more will come, and remove the name."""
        if self._map is not None:
            self._retire()
            self._path.unlink(missing_ok=True)

    def _retire(self) -> None:
        assert self._map is not None
        struct.pack_into("<I", self._map, _CLOSED_AT, 1)
        self._map.close()
        self._map = None

    def _make_segment(self, image_bytes: int) -> None:
        """A segment for pictures of this many bytes, complete before it has its name."""
        self._slot_size = -(-(_HEADER_SIZE + image_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        size = _HEADER_SIZE + self._slots * self._slot_size
        temporary = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}")
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            # Reserved at once: a segment that can't grow would end the process at some later write.
            os.posix_fallocate(handle, 0, size)
            segment = mmap.mmap(handle, size)
            _SEGMENT.pack_into(segment, 0, MAGIC, VERSION, self._slots, self._slot_size, 0, 0, os.getpid())
            os.replace(temporary, self._path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            need = f"{size / 1e6:.0f} MB of shared memory"
            raise InputError(f"shm://{self._path.name} needs {need}, which {FOLDER} doesn't have") from error
        finally:
            os.close(handle)
        if self._map is not None:
            self._retire()
        self._map, self._count = segment, 0


class ShmReader:
    """Reads the pictures of a segment in order, and waits for it where it isn't there yet.

    Args:
        name: of the segment, without a slash.

    Attributes:
        missed: pictures that were overwritten before they were read.
        ended: the writer closed the segment, and none of that name has come since.

    Raises:
        InputError: a bad name.
    """

    def __init__(self, name: str):
        self._path = _segment_path(name)
        self._map: mmap.mmap | None = None
        self._inode = self._slots = self._slot_size = 0
        self._next = 0
        self._fence = _Fence()
        self._looked = 0.0
        self.missed = 0
        self.ended = False

    def read(self, timeout: float) -> ShmFrame | None:
        """The oldest picture not read yet that is still there; waits up to `timeout` seconds, then gives None.

        Raises:
            InputError: the segment is of another layout.
        """
        deadline = time.monotonic() + timeout
        while True:
            frame = self._take()
            if frame is not None or time.monotonic() >= deadline:
                return frame
            time.sleep(_POLL)

    def close(self) -> None:
        """Let go of the segment."""
        if self._map is not None:
            self._map.close()
            self._map = None

    def _take(self) -> ShmFrame | None:
        if self._map is not None:
            written = struct.unpack_from("<Q", self._map, _COUNT_AT)[0]
            while self._next < written:
                # Never the oldest slot: it is the one that is written next.
                oldest = max(written - self._slots + 1, 0)
                self.missed += max(oldest - self._next, 0)
                self._next = max(self._next, oldest) + 1
                frame = self._copy(self._next - 1)
                if frame is not None:
                    return frame
                self.missed += 1
                written = struct.unpack_from("<Q", self._map, _COUNT_AT)[0]
        self._follow_name()
        return None

    def _copy(self, number: int) -> ShmFrame | None:
        """Frame `number`, or None where it was overwritten before or while it was copied."""
        assert self._map is not None
        start = _HEADER_SIZE + number % self._slots * self._slot_size
        self._fence()
        sequence, index, moment, height, width, channels, kind, state = _SLOT.unpack_from(self._map, start)
        if sequence != 2 * number + 2 or max(height, width) > _LONGEST_SIDE or kind >= len(_DTYPES):
            return None
        size = height * width * channels
        if channels not in (1, 3) or state >= len(STATES):
            return None
        if _HEADER_SIZE + size * _DTYPES[kind].itemsize > self._slot_size:
            return None
        self._fence()
        pixels = np.frombuffer(self._map, _DTYPES[kind], size, start + _HEADER_SIZE).copy()
        self._fence()
        if struct.unpack_from("<Q", self._map, start)[0] != sequence:
            return None
        shape = (height, width) if channels == 1 else (height, width, 3)
        return ShmFrame(pixels.reshape(shape), moment, index, STATES[state])

    def _follow_name(self) -> None:
        """Open the segment that the name means now, where it is another one than before."""
        closed = self._map is not None and struct.unpack_from("<I", self._map, _CLOSED_AT)[0] == 1
        now = time.monotonic()
        if not closed and now - self._looked < _LOOK_FOR_SUCCESSOR:
            return
        self._looked = now
        try:
            handle = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            self.ended = closed
            return
        except OSError as error:
            raise InputError(f"shm://{self._path.name} cannot be opened ({error.strerror})") from error
        try:
            if os.fstat(handle).st_ino != self._inode or self._map is None:
                self._open(handle)
        finally:
            os.close(handle)

    def _open(self, handle: int) -> None:
        status = os.fstat(handle)
        if status.st_size < _SEGMENT.size:
            raise InputError(f"shm://{self._path.name} was not written by refusion; give another name")
        segment = mmap.mmap(handle, status.st_size, access=mmap.ACCESS_READ)
        magic, version, slots, slot_size, count = _SEGMENT.unpack_from(segment)[:5]
        if magic != MAGIC or version != VERSION or _HEADER_SIZE + slots * slot_size > status.st_size:
            segment.close()
            raise InputError(f"shm://{self._path.name} is not of layout {VERSION} of refusion; give another name")
        # Whoever comes to a running stream begins with its newest picture, and misses nothing of a successor.
        self._next = max(count - 1, 0) if self._map is None else 0
        self.close()
        self._map, self._inode, self._slots, self._slot_size = segment, status.st_ino, slots, slot_size
        self.ended = False
