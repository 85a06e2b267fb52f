"""Writing a file whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from runtime.errors import InputError


def check_writable(path: Path) -> None:
    """Raise the InputError that `write_whole` would raise, but for a disk that is full then; makes the folder."""
    temporary = path.with_name(f".{secrets.token_hex(6)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file under a temporary name beside it, then give it its name; makes the folder.

    Raises:
        InputError: it can't be written, a full disk among the reasons; what was there before is still there.
    """
    temporary = path.with_name(f".{secrets.token_hex(6)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
