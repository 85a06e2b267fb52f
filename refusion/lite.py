"""refusion-lite: a small network that fuses live video on a bare CPU, distilled from the full one.

It does not draw the fused image: it decides, pixel by pixel, how much of each source goes in and how far the detail of
each is raised or lowered. So every structure of the output is one of a source, and none is invented.

    fused = w a + (1 - w) b + sum over bands k of c_ak h_k(a) + c_bk h_k(b)
    w = sigmoid(l + s (a - b)),  c_ak = g_ak e_k(a)^2 / (e_k(a)^2 + e_k(b)^2),  |g| < 2

h_k(x) are bands of detail: x less its 3x3 binomial blur, and that blur less a wider one. e_k is a band's energy, its
square blurred: detail comes from the source that has more of it, which a network at low resolution cannot tell to the
pixel. The maps l, s and g come from a network that works at a half and a quarter of the resolution, with depthwise and
1x1 convolutions and global means; they and the shares of energy are interpolated to full resolution.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BANDS = 2  # of detail; the blur of band k has taps 2^k pixels apart
MAPS = 2 + 2 * BANDS  # l, s, then for each band g_a and g_b
# A source of weight 0 needs 1 to keep its detail; the full network raises it beyond that where the other one has none.
LARGEST_GAIN = 2.0


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
        self.narrow = nn.Conv2d(wide, channels, 1)
        self.after = InvertedBlock(channels)
        self.head = nn.Conv2d(channels, MAPS, 1)
        nn.init.zeros_(self.head.weight)
        # At first: the average, with the stronger detail in full.
        nn.init.zeros_(self.head.bias[:2])  # type: ignore[index]
        nn.init.constant_(self.head.bias[2:], math.atanh(0.5 / LARGEST_GAIN))  # type: ignore[index]
        blur = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("blur", torch.outer(blur, blur).expand(2 * BANDS, 1, 3, 3).clone(), persistent=False)

    blur: Tensor

    def bands(self, a: Tensor, b: Tensor) -> Tensor:
        """h_k of a and of b, band by band: (N, 2 BANDS, H, W). Edges are repeated, else borders would be detail."""
        x, bands = torch.cat((a, b), 1), []
        for k in range(BANDS):
            reach = 2**k
            padded = F.pad(x, (reach,) * 4, mode="replicate")
            blurred = F.conv2d(padded, self.blur[:2], groups=2, dilation=reach)
            bands.append(x - blurred)
            x = blurred
        return torch.cat(bands, 1)

    def shares(self, bands: Tensor) -> Tensor:
        """Share of each source in a band's energy, (N, 2 BANDS, H/2, W/2) rounded up, in [0, 1]; 0 without detail."""
        energy = F.conv2d(bands * bands, self.blur, stride=2, padding=1, groups=2 * BANDS)
        squared = (energy * energy).unflatten(1, (BANDS, 2))
        # A floor, not a sum: the ONNX optimiser takes 1e-12 for 0 and drops its addition.
        return (squared / squared.sum(2, keepdim=True).clamp_min(1e-12)).flatten(1, 2)

    def maps(self, a: Tensor, b: Tensor) -> Tensor:
        """l, s and the gains g, (N, MAPS, H/2, W/2) rounded up."""
        x = self.before(self.stem(torch.cat((a, b), 1)).relu())  # (N, C, H/2, W/2), rounded up
        y = self.body(self.widen(self.down(x)).relu())  # (N, wide, H/4, W/4)
        x = x + F.interpolate(self.narrow(y), size=x.shape[2:], mode="bilinear")
        x = self.head(self.after(x))
        return torch.cat((x[:, :2], LARGEST_GAIN * x[:, 2:].tanh()), 1)

    def decide(self, maps: Tensor, a: Tensor, b: Tensor, bands: Tensor) -> tuple[Tensor, Tensor]:
        """Weight of a, (N, 1, H, W) in (0, 1), and factors c of the bands, (N, 2 BANDS, H, W) in (-2, 2)."""
        half = torch.cat((maps[:, :2], maps[:, 2:] * self.shares(bands)), 1)
        full = F.interpolate(half, size=a.shape[2:], mode="bilinear")
        return (full[:, :1] + full[:, 1:2] * (10 * (a - b))).sigmoid(), full[:, 2:]

    def mix(self, maps: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The fused image that the maps ask for, from the sources and their detail."""
        bands = self.bands(a, b)
        weight, factors = self.decide(maps, a, b, bands)
        return (b + weight * (a - b) + (factors * bands).sum(1, keepdim=True)).clamp(0, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.mix(self.maps(a, b), a, b)

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
