"""Hot paths of ReFusion's training and inference: Triton kernels on a GPU, plain PyTorch elsewhere.

`kernels.dispatch` says how the choice is made and forced, `kernels.reference` has every operation in plain PyTorch.
"""

import sys
import types
from typing import Any

from kernels.dispatch import (
    backend_for,
    chosen,
    fusion_loss,
    fusion_meta_grad,
    max_normalized_update,
    reconstruction_loss,
)
from kernels.reference import gradient, sobel

__all__ = [
    "backend_for",
    "chosen",
    "fusion_loss",
    "fusion_meta_grad",
    "gradient",
    "max_normalized_update",
    "reconstruction_loss",
    "sobel",
]


class _Package(types.ModuleType):
    """An operation and its file have one name: importing kernels/fusion_loss.py must not replace the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
