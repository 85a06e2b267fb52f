"""Image files: reading, writing, and matching the pairs of two folders.

Arrays are in OpenCV order: (H, W) grey or (H, W, 3) BGR, uint8 or uint16.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from runtime.color import check_image
from runtime.errors import InputError

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"})
WRITE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
WRITE_SUFFIXES_16BIT = frozenset({".png", ".tif", ".tiff"})
JPEG_QUALITY = 95

_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"BM": "BMP",
    b"RIFF": "WebP",
    b"P5": "PGM",
    b"P6": "PPM",
}

log = logging.getLogger("refusion")


def read_image(path: str | Path) -> np.ndarray:
    """Read an image as it is stored: grey or colour, 8 or 16 bits, upright.

    EXIF orientation is applied. Palettes become colours. Alpha is dropped, not blended (though OpenCV multiplies 8-bit
    TIFF with straight alpha by it). Grey with alpha, a palette of greys and grey WebP give three equal channels. Of a
    multi-page TIFF or an animation the first picture is read. Floating-point images, in [0, 1], become uint16.

    Returns:
        (H, W) or (H, W, 3) BGR, uint8 or uint16.

    Raises:
        InputError: missing, not a regular file, empty, truncated or damaged, not an image, floating-point with values
            that are not finite or outside [0, 1], or other pixel types.
    """
    path = Path(path)
    data = _read_bytes(path)
    kind = next((name for magic, name in _MAGIC.items() if data.startswith(magic)), None)
    # Not every version of OpenCV notices: some fill what is missing with grey, others ignore checksums.
    if (kind == "PNG" and not _is_whole_png(data)) or (kind == "JPEG" and not _is_whole_jpeg(data)):
        raise InputError(f"{path}: truncated or damaged {kind} file; copy or download it again")
    image = _decode(path, data)
    if image is None and kind is None:
        raise InputError(f"{path}: not an image that can be read; use PNG, JPEG, TIFF, BMP, WebP or PGM")
    if image is None:
        raise InputError(f"{path}: truncated or damaged {kind} file; copy or download it again")
    return _to_unsigned(path, image)


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write an image in the format that the suffix names, atomically: the whole file is there, or nothing changed.

    Missing parent folders are created. JPEG has quality 95; the other formats are lossless.

    Args:
        path: PNG, JPEG, TIFF, BMP or WebP file; an existing one is replaced.
        image: (H, W) or (H, W, 3) BGR; uint8, or uint16 for PNG and TIFF.

    Raises:
        InputError: unknown suffix, wrong shape or type of the image, or the file cannot be written.
    """
    path = Path(path)
    check_image(image, f"the image for {path}")
    check_writable(path, sixteen_bit=image.dtype == np.uint16)
    data = _encode(path, image)
    temporary = path.with_name(f".{secrets.token_hex(6)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def check_writable(path: Path, *, sixteen_bit: bool = False) -> None:
    """Raise InputError unless `write_image` has a format for this suffix and depth; touches no file."""
    suffix = path.suffix.lower()
    if suffix not in WRITE_SUFFIXES:
        known = ", ".join(sorted(WRITE_SUFFIXES))
        raise InputError(f"{path}: cannot write images with the suffix '{path.suffix}'; use one of {known}")
    if sixteen_bit and suffix not in WRITE_SUFFIXES_16BIT:
        raise InputError(f"{path}: 16-bit images can only be written as PNG or TIFF")


@dataclass(frozen=True)
class Pair:
    """The two files of one scene: the same stem in the folders of source A and source B."""

    stem: str
    a: Path
    b: Path


def find_pairs(a_dir: str | Path, b_dir: str | Path, *, skip_bad: bool = False) -> list[Pair]:
    """Match the images of two folders by stem (`a/01.png` and `b/01.JPG`), sorted by stem.

    Hidden files and files without an image suffix are ignored.

    Args:
        skip_bad: leave out what has no partner or no unique one, with a warning for each, instead of refusing.

    Raises:
        InputError: a folder is missing; stems without a partner or twice in a folder; no pair at all.
    """
    a_dir, b_dir = Path(a_dir), Path(b_dir)
    a_files, b_files = _images_by_stem(a_dir), _images_by_stem(b_dir)
    pairs, problems = [], []
    for stem in sorted(a_files.keys() | b_files.keys()):
        a, b = a_files.get(stem, []), b_files.get(stem, [])
        if len(a) == len(b) == 1:
            pairs.append(Pair(stem, a[0], b[0]))
        elif not a or not b:
            problems.append(f"{(a or b)[0]} has no partner in {b_dir if a else a_dir}")
        else:
            several = a if len(a) > 1 else b
            problems.append(f"{several[0].parent} has several files for '{stem}': {', '.join(f.name for f in several)}")
    refuse_or_skip(problems, skip_bad)
    if not pairs:
        raise InputError(f"no image pairs in {a_dir} and {b_dir}; the two files of a pair need the same name")
    return pairs


def refuse_or_skip(problems: list[str], skip_bad: bool) -> None:
    """With skip_bad log a warning for each problem with an input file, else raise InputError with the first three."""
    if skip_bad:
        for problem in problems:
            log.warning("skipped: %s", problem)
    elif problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise InputError(f"{'; '.join(problems[:3])}{more}; fix these files or pass --skip-bad")


def find_pair_folders(root: str | Path, a_name: str = "a", b_name: str = "b") -> list[Path]:
    """Folders that hold both sources as sub-folders with images: root itself, or all such folders below it, sorted.

    Hidden folders and pairs of folders without any image (videos, say) are passed over.

    Raises:
        InputError: root is not a folder, or there is no such folder.
    """
    root = Path(root)
    _check_folder(root)
    found: list[Path] = []
    visited = set()
    for name, subfolders, _ in os.walk(root, followlinks=True):
        folder = Path(name)
        real = folder.resolve()
        sources = (folder / a_name, folder / b_name)
        if real in visited:  # a symbolic link upwards
            subfolders.clear()
        elif all(source.is_dir() for source in sources):
            subfolders.clear()
            if any(_images_by_stem(source) for source in sources):
                found.append(folder)
        visited.add(real)
        subfolders[:] = [subfolder for subfolder in subfolders if not subfolder.startswith(".")]
    if not found:
        raise InputError(f"{root}: no folder there has sub-folders '{a_name}' and '{b_name}' with images")
    return sorted(found)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")


def _images_by_stem(folder: Path) -> dict[str, list[Path]]:
    _check_folder(folder)
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from error
    images: dict[str, list[Path]] = {}
    for file in files:
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file():
            images.setdefault(file.stem, []).append(file)
    return images


def _read_bytes(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{path}: a folder, not an image file")
        if not stat.S_ISREG(mode):
            raise InputError(f"{path}: not a regular file")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if not data:
        raise InputError(f"{path}: the file is empty (0 bytes)")
    return data


def _is_whole_png(data: bytes) -> bool:
    """Every chunk (length, type, content, CRC-32 of type and content) is there up to IEND, and undamaged."""
    position = 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 8 + length
        if end + 4 > len(data) or struct.unpack_from(">I", data, end)[0] != zlib.crc32(data[position + 4 : end]):
            return False
        if data[position + 4 : position + 8] == b"IEND":
            return True
        position = end + 4
    return False


def _is_whole_jpeg(data: bytes) -> bool:
    """The segments lead to a scan, and an end-of-image marker follows. A thumbnail's markers lie inside a segment."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xDA:  # start of scan; within a scan's data 0xFF is never followed by 0xD9
            return data.find(b"\xff\xd9", position) >= 0
        # A marker may be preceded by any number of 0xFF; 0x01 and the restart markers 0xD0 to 0xD7 have no content.
        if marker == 0xFF:
            position += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:
            position += 2
        else:
            position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    return False


# OpenCV 4 has getLogLevel and setLogLevel in cv2 itself.
_opencv_logging: Any = cv2.utils.logging if hasattr(cv2.utils, "logging") else cv2
_opencv_log_lock = threading.Lock()
_SILENT = 0


@contextmanager
def _silent_opencv() -> Iterator[None]:
    """OpenCV logs failures to stderr, which are errors with one line of their own here. The level is process-wide."""
    with _opencv_log_lock:
        level = _opencv_logging.getLogLevel()
        _opencv_logging.setLogLevel(_SILENT)
        try:
            yield
        finally:
            _opencv_logging.setLogLevel(level)


def _decode(path: Path, data: bytes) -> np.ndarray | None:
    try:
        with _silent_opencv():
            return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error as error:  # among others: more pixels than OpenCV's limit
        raise InputError(f"{path}: OpenCV cannot decode it ({error.err})") from error


def _encode(path: Path, image: np.ndarray) -> bytes:
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if path.suffix.lower() in (".jpg", ".jpeg") else []
    try:
        with _silent_opencv():
            done, data = cv2.imencode(path.suffix.lower(), np.ascontiguousarray(image), options)
    except cv2.error as error:
        raise InputError(f"{path}: OpenCV cannot encode an image of shape {image.shape} ({error.err})") from error
    if not done:  # WebP ends at 16,383 and JPEG at 65,500 pixels a side
        raise InputError(f"{path}: this format cannot hold an image of shape {image.shape}; use .png")
    return data.tobytes()


def _to_unsigned(path: Path, image: np.ndarray) -> np.ndarray:
    if image.dtype in (np.uint8, np.uint16):
        return image
    if not np.issubdtype(image.dtype, np.floating):
        raise InputError(f"{path}: {image.dtype} pixels; convert it to unsigned 8 or 16 bits")
    if not np.isfinite(image).all():
        raise InputError(f"{path}: the image has NaN or infinite pixels")
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 1:
        raise InputError(f"{path}: floating-point pixels from {low:g} to {high:g}; scale them to [0, 1] or to 16 bits")
    return np.rint(image * 65535.0).astype(np.uint16)
