"""refusion-lite: a small network that fuses live video on a bare CPU, distilled from the full one.

It does not draw the fused image: it decides, pixel by pixel, how much of each source goes in and how far the detail of
each is raised or lowered. So every structure of the output is one of a source, and none is invented.

    fused = w a + (1 - w) b + g_a h(a) + g_b h(b),  w = sigmoid(l + s (a - b)),  g in (-1, 1)

h(x) is x less its 3x3 binomial blur. The maps l, s, g_a, g_b come from a network that works at a half and a quarter of
the resolution, with depthwise and 1x1 convolutions and one global mean, and are brought to full resolution by
pixel-shuffle.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAPS = 4  # l, s, g_a, g_b


class InvertedBlock(nn.Module):
    """x += 1x1(ReLU(1x1(depthwise 3x3(x)))), C -> 2C -> C; with context, scaled by what the whole image holds."""

    def __init__(self, channels: int, *, context: bool = False):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.expand = nn.Conv2d(channels, 2 * channels, 1)
        self.project = nn.Conv2d(2 * channels, channels, 1)
        self.context = nn.Conv2d(2 * channels, 2 * channels, 1) if context else None
        if self.context is not None:
            nn.init.zeros_(self.context.weight)
            nn.init.zeros_(self.context.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.depthwise(x)).relu()
        if self.context is not None:
            y = y * (2 * self.context(y.mean((2, 3), keepdim=True)).sigmoid())
        return x + self.project(y)


class LiteNet(nn.Module):
    """The lite fusion network.

    forward(a, b): two images (N, 1, H, W) in [0, 1], any H and W from 1 up -> fused image (N, 1, H, W) in [0, 1].
    """

    def __init__(self, channels: int = 16, wide: int = 40, depth: int = 3):
        super().__init__()
        self.stem = nn.Conv2d(2, channels, 5, stride=2, padding=2)
        self.before = InvertedBlock(channels)
        self.down = nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels)
        self.widen = nn.Conv2d(channels, wide, 1)
        self.body = nn.Sequential(*(InvertedBlock(wide, context=i < depth - 1) for i in range(depth)))
        self.up = nn.Conv2d(wide, 4 * channels, 1)
        self.after = InvertedBlock(channels)
        self.head = nn.Conv2d(channels, 4 * MAPS, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        blur = torch.tensor([1.0, 2.0, 1.0])
        high_pass = -torch.outer(blur, blur) / 16
        high_pass[1, 1] += 1
        self.register_buffer("high_pass", high_pass.expand(2, 1, 3, 3).clone(), persistent=False)

    high_pass: Tensor

    def maps(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weight of a, (N, 1, H, W) in (0, 1), and gains of the detail of a and of b, (N, 1, H, W) in (-1, 1)."""
        height, width = a.shape[2:]
        sources = torch.cat((a, b), 1)
        x = self.before(self.stem(sources).relu())  # (N, C, H/2, W/2), rounded up
        y = self.body(self.widen(self.down(x)).relu())  # (N, wide, H/4, W/4)
        x = x + F.pixel_shuffle(self.up(y), 2)[..., : x.shape[2], : x.shape[3]]
        x = F.pixel_shuffle(self.head(self.after(x)), 2)[..., :height, :width]  # (N, MAPS, H, W)
        logit, slope, gain_a, gain_b = x.chunk(MAPS, 1)
        weight = (logit + slope * (10 * (a - b))).sigmoid()
        return weight, gain_a.tanh(), gain_b.tanh()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        weight, gain_a, gain_b = self.maps(a, b)
        # Edges are repeated, or the border would look like detail.
        sources = F.pad(torch.cat((a, b), 1), (1, 1, 1, 1), mode="replicate")
        detail_a, detail_b = F.conv2d(sources, self.high_pass, groups=2).chunk(2, 1)
        fused = b + weight * (a - b) + gain_a * detail_a + gain_b * detail_b
        return fused.clamp(0, 1)

    @staticmethod
    def from_pretrained(name: str | Path) -> LiteNet:
        """The network with weights by name ("ivif-lite") or .safetensors path, in eval mode.

        Raises runtime.errors.InputError where there are no such weights.
        """
        from refusion.weights import load_network

        net = load_network(name)[0]
        if not isinstance(net, LiteNet):
            from runtime.errors import InputError

            raise InputError(f"{name}: the weights of a {type(net).__name__}, not of a LiteNet")
        return net
