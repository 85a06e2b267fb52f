"""The torch-free runtime: two aligned images or streams in, one fused picture out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.errors import InputError

if TYPE_CHECKING:
    from runtime.fuser import Fuser
    from runtime.stream import Stream

__all__ = ["Fuser", "InputError", "Stream"]


def __getattr__(name: str) -> object:
    # NumPy and OpenCV are imported when one of these is asked for, so that the command line answers --help at once.
    if name == "Fuser":
        from runtime.fuser import Fuser

        return Fuser
    if name == "Stream":
        from runtime.stream import Stream

        return Stream
    raise AttributeError(f"module 'runtime' has no attribute '{name}'")
