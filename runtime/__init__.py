"""The torch-free runtime: two aligned images in, one fused picture out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.errors import InputError

if TYPE_CHECKING:
    from runtime.fuser import Fuser

__all__ = ["Fuser", "InputError"]


def __getattr__(name: str) -> object:
    # NumPy and OpenCV are imported when a Fuser is asked for, so that the command line answers --help at once.
    if name == "Fuser":
        from runtime.fuser import Fuser

        return Fuser
    raise AttributeError(f"module 'runtime' has no attribute '{name}'")
