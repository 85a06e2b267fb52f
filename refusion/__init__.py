"""ReFusion: image fusion learned from reconstruction, with a loss learned by meta-learning (IJCV 133(5), 2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refusion.lite import LiteNet
    from refusion.model import FusionNet, LossProposalNet, ReconstructionNet

__all__ = ["FusionNet", "LiteNet", "LossProposalNet", "ReconstructionNet"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # The networks need torch, which the default install does not have: import them when they are asked for.
    if name in __all__:
        from refusion import lite, model

        return getattr(lite if name == "LiteNet" else model, name)
    raise AttributeError(f"module 'refusion' has no attribute '{name}'")
