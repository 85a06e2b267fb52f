"""Shared memory between processes: whole pictures only, in order, whoever comes and goes."""

from __future__ import annotations

import itertools
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from runtime import shm
from runtime.errors import InputError
from runtime.shm import STATES, ShmReader, ShmWriter

ROOT = Path(__file__).resolve().parents[2]
_numbers = itertools.count()


@pytest.fixture
def name(tmp_path) -> Iterator[str]:
    name = f"refusion_{tmp_path.parent.name}_{tmp_path.name}_{next(_numbers)}"[:100]
    yield name
    Path("/dev/shm", name).unlink(missing_ok=True)


def in_process(code: str, name: str) -> subprocess.Popen[str]:
    """Python code in a process of its own; `name` and our modules are there."""
    head = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
from runtime.shm import *
name = {name!r}
"""
    return subprocess.Popen(
        [sys.executable, "-c", head + code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (48, 64), (48, 64, 3)])
def test_pictures_come_through(name, shape, dtype):
    images = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (5, *shape), dtype=dtype)
    writer, reader = ShmWriter(name), ShmReader(name)
    for index, image in enumerate(images):
        writer.write(image, 1e9 + index / 3, 100 + index, STATES[index])
        read = reader.read(5)
        assert read is not None
        assert read.image.dtype == dtype
        np.testing.assert_array_equal(read.image, image)
        assert (read.time, read.index, read.state) == (1e9 + index / 3, 100 + index, STATES[index])
    assert reader.read(0) is None
    assert reader.missed == 0
    writer.close()
    reader.close()


def test_part_of_a_larger_picture(name):
    """Rows that are not next to each other in memory."""
    whole = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    writer, reader = ShmWriter(name), ShmReader(name)
    writer.write(whole[5:25, 10:50], 0.0, 0)
    np.testing.assert_array_equal(reader.read(5).image, whole[5:25, 10:50])
    writer.close()


def test_layout_is_as_documented(name):
    """What a reader in another language relies on, from the bytes."""
    image = np.arange(2 * 3 * 3, dtype=np.uint16).reshape(2, 3, 3)
    writer = ShmWriter(name, slots=2)
    for index in range(3):
        writer.write(image + index, 5.5 + index, 70 + index, "held")
    data = Path("/dev/shm", name).read_bytes()
    magic, version, slots, slot_size, count, closed, _ = struct.unpack_from("<8sIIQQII", data)
    assert (magic, version, slots, count, closed) == (b"REFUSION", 1, 2, 3, 0)
    at = 64 + (2 % slots) * slot_size
    assert struct.unpack_from("<QQdIIIII", data, at) == (2 * 2 + 2, 72, 7.5, 2, 3, 3, 1, 1)
    np.testing.assert_array_equal(np.frombuffer(data, "<u2", 18, at + 64), (image + 2).ravel())
    writer.close()


def test_a_slow_reader_skips_to_what_is_there(name):
    writer, reader = ShmWriter(name, slots=4), ShmReader(name)
    pictures = [np.full((4, 4), index, np.uint8) for index in range(20)]
    writer.write(pictures[0], 0.0, 0)
    assert reader.read(5).index == 0
    for index in range(1, 20):
        writer.write(pictures[index], 0.0, index)
    read = [reader.read(1).index for _ in range(3)]
    assert read == [17, 18, 19]  # the oldest slot is the one that is written next
    assert reader.missed == 16
    writer.close()


def test_whoever_comes_late_begins_with_the_newest(name):
    writer = ShmWriter(name, slots=8)
    for index in range(5):
        writer.write(np.zeros((4, 4), np.uint8), 0.0, index)
    reader = ShmReader(name)
    assert reader.read(5).index == 4
    assert reader.missed == 0
    writer.close()


@pytest.mark.slow
def test_no_torn_pictures_from_a_writer_in_haste(name):
    """Every picture is of one value, which is its index: a mix of two would show."""
    writer = in_process(
        """
image = np.zeros((480, 640, 3), np.uint8)
writer = ShmWriter(name, slots=3)
writer.write(image, 0.5, 0)
print("ready", flush=True)
input()
for index in range(1, 4000):
    image[:] = index % 251
    writer.write(image, 0.5, index)
writer.close()
""",
        name,
    )
    assert writer.stdout is not None and writer.stdin is not None
    writer.stdout.readline()
    reader = ShmReader(name)
    first = reader.read(5)  # it is there before the haste begins
    assert first is not None
    indices, until = [first.index], time.monotonic() + 60
    writer.stdin.write("go\n")
    writer.stdin.flush()
    while not reader.ended:
        assert time.monotonic() < until
        frame = reader.read(0.2)
        if frame is not None:
            assert (frame.image == frame.index % 251).all()
            indices.append(frame.index)
    assert writer.wait(20) == 0
    assert len(indices) >= 10
    assert (np.diff(indices) > 0).all()
    assert len(indices) + reader.missed <= 4000


def test_a_larger_picture_moves_the_readers(name):
    writer, reader = ShmWriter(name), ShmReader(name)
    writer.write(np.zeros((8, 8), np.uint8), 0.0, 0)
    assert reader.read(5).index == 0
    writer.write(np.ones((8, 8), np.uint8), 0.0, 1)
    big = np.full((400, 600, 3), 9, np.uint8)
    writer.write(big, 0.0, 2)
    assert [reader.read(5).index for _ in range(2)] == [1, 2]  # none is lost on the way
    writer.write(np.zeros((8, 8), np.uint8), 0.0, 3)  # a smaller one stays
    assert reader.read(5).image.shape == (8, 8)
    assert not reader.ended
    writer.close()
    assert reader.read(0.5) is None
    assert reader.ended


def test_a_writer_that_was_killed_is_replaced(name):
    code = "ShmWriter(name).write(np.zeros((8, 8), np.uint8), 0.0, 0); print('written', flush=True); input()"
    dead = in_process(code, name)
    assert dead.stdout is not None
    dead.stdout.readline()
    reader = ShmReader(name)
    assert reader.read(5).index == 0
    with pytest.raises(InputError, match=f"being written by process {dead.pid}"):
        ShmWriter(name)
    dead.kill()
    dead.wait()
    writer = ShmWriter(name)
    writer.write(np.ones((8, 8), np.uint8), 0.0, 5)
    assert reader.read(5).index == 5
    writer.close()
    dead.stdin.close()  # type: ignore[union-attr]
    dead.stdout.close()


def test_only_its_owner_may_read_it(name):
    writer = ShmWriter(name)
    writer.write(np.zeros((8, 8), np.uint8), 0.0, 0)
    assert Path("/dev/shm", name).stat().st_mode & 0o777 == 0o600
    writer.close()
    assert not Path("/dev/shm", name).exists()
    writer.close()


def test_what_is_not_ours_is_left_alone(name):
    path = Path("/dev/shm", name)
    path.write_bytes(b"somebody else's")
    with pytest.raises(InputError, match="belongs to another program"):
        ShmWriter(name)
    with pytest.raises(InputError, match="not written by refusion"):
        ShmReader(name).read(1)
    path.write_bytes(b"x" * 200)
    with pytest.raises(InputError, match="not of layout 1"):
        ShmReader(name).read(1)
    assert path.read_bytes() == b"x" * 200


def test_too_little_shared_memory_is_told(name, monkeypatch):
    writer = ShmWriter(name, slots=256)

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shm.os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"needs \d+ MB of shared memory"):
        writer.write(np.zeros((480, 640, 3), np.uint8), 0.0, 0)
    assert not list(Path("/dev/shm").glob(f"*{name}*"))


def test_bad_names_and_pictures():
    for bad in ("", "a/b", "../x", ".hidden", "a b", "x" * 300):
        with pytest.raises(InputError, match="a name has letters"):
            ShmWriter(bad)
        with pytest.raises(InputError, match="a name has letters"):
            ShmReader(bad)
    with pytest.raises(InputError, match="float64"):
        ShmWriter("refusion_never_written").write(np.zeros((4, 4)), 0.0, 0)
    assert not Path("/dev/shm/refusion_never_written").exists()
