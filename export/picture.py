"""The whole way from two camera frames to a picture as one graph, so that who runs the model needs no image code.

It is what runtime.Fuser computes around the network: full-range BT.601 luma, the network, its range, the colour of both
sources weighted by its strength, and back, with OpenCV's coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

RANGES = ("stretch", "keep")

# Rows: what blue, green and red give to luma, Cr and Cb; and the way back.
_LUMA = torch.tensor([0.114, 0.587, 0.299])
_RED, _BLUE = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0])
_TO_YCRCB = torch.stack((_LUMA, 0.713 * (_RED - _LUMA), 0.564 * (_BLUE - _LUMA)), 1)
_TO_BGR = torch.tensor([[1.0, 1.0, 1.0], [0.0, -0.714, 1.403], [1.773, -0.344, 0.0]])


class PictureNet(nn.Module):
    """forward(a, b): two frames (N, H, W, 3) uint8 in BGR, grey ones with three equal channels -> fused, the same.

    Args:
        network: forward(a, b) of luma (N, 1, H, W) float32 in [0, 1].
        stretch: each picture's own minimum and maximum become 0 and 255; else 0 and 1 do.
    """

    to_ycrcb: Tensor
    to_bgr: Tensor

    def __init__(self, network: nn.Module, *, stretch: bool):
        super().__init__()
        self.network, self.stretch = network, stretch
        self.register_buffer("to_ycrcb", _TO_YCRCB.clone())
        self.register_buffer("to_bgr", _TO_BGR.clone())
        self.eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.float() @ self.to_ycrcb, b.float() @ self.to_ycrcb  # (N, H, W, 3)
        luma = self.network(*((x[..., :1] / 255).movedim(3, 1) for x in (a, b))).movedim(1, 3)
        if self.stretch:
            low, high = luma.amin((1, 2, 3), keepdim=True), luma.amax((1, 2, 3), keepdim=True)
            contrast = high > low  # a picture without any stays as it is
            luma = (luma - torch.where(contrast, low, 0.0)) / torch.where(contrast, high - low, 1.0)
        luma = luma.clamp(0, 1) * 255
        picture = torch.cat((luma, _mix(a[..., 1:], b[..., 1:])), 3) @ self.to_bgr
        return picture.round().clamp(0, 255).to(torch.uint8)


def _mix(c1: Tensor, c2: Tensor) -> Tensor:
    """runtime.color.mix_chroma in units of 0..255. Where one source is grey it is the other's colour."""
    s1, s2 = c1.abs(), c2.abs()
    return (c1 * s1 + c2 * s2) / (s1 + s2).clamp_min(255e-6)
