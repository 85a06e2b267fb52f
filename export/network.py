"""The fusion network as it is deployed: the same function as refusion.FusionNet, in the form that engines run best.

Against the network that is trained: features stay in NCHW, so that nothing is transposed; the affine part of each layer
norm is folded into the convolution after it; every split of channels is two or three convolutions instead of one and a
copy. With `half`, weights and features are float16 and what needs range or precision is computed in float32: layer norm
statistics, sums over H*W (norms and Gram matrices), softmax, the last sigmoid.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from refusion.model import (
    HEADS,
    AttentionFusion,
    ChannelAttention,
    ChannelLayerNorm,
    FusionNet,
    GatedFeedForward,
    TransformerBlock,
)


class _Branch(nn.Module):
    """1x1 and depthwise 3x3 convolution to some of the output channels, the layer norm's affine part folded in."""

    def __init__(self, point: nn.Conv2d, depth: nn.Conv2d, channels: slice, norm: ChannelLayerNorm | None):
        super().__init__()
        weight, depth_weight = point.weight.detach()[channels], depth.weight.detach()[channels]
        outputs, inputs = weight.shape[:2]
        self.point = nn.Conv2d(inputs, outputs, 1, bias=norm is not None)
        self.depth = nn.Conv2d(outputs, outputs, 3, padding=1, groups=outputs, bias=False)
        if norm is not None:
            assert self.point.bias is not None
            self.point.bias.data = weight.flatten(1) @ norm.bias.detach()
            weight = weight * norm.weight.detach()[:, None, None]
        self.point.weight.data = weight.clone()
        self.depth.weight.data = depth_weight.clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.depth(self.point(x))


def _branches(point: nn.Conv2d, depth: nn.Conv2d, parts: int, norm: ChannelLayerNorm | None = None) -> nn.ModuleList:
    size = point.out_channels // parts
    return nn.ModuleList(_Branch(point, depth, slice(i * size, (i + 1) * size), norm) for i in range(parts))


class _Normalize(nn.Module):
    """Zero mean and unit variance over the channels of each pixel.

    The mean is taken off by a 1x1 convolution, I - 1/C: it runs in the layout of the convolutions around it, where a
    mean over the channel axis costs a pass and a change of layout (a tenth of the whole network on a CPU).
    """

    def __init__(self, channels: int):
        super().__init__()
        centre = torch.eye(channels) - 1 / channels
        self.centre = nn.Conv2d(channels, channels, 1, bias=False)
        self.centre.weight.data = centre[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        centred = self.centre(x)
        wide = centred.float()
        return (wide * torch.rsqrt((wide * wide).mean(1, keepdim=True) + 1e-5)).to(x.dtype)


def _gelu(x: Tensor) -> Tensor:
    """Exact GELU, written as ONNX Runtime's optimiser recognises it."""
    return x * (torch.erf(x / 2**0.5) + 1.0) * 0.5


class _Attend(nn.Module):
    """refusion.model.attend, with the product in NCHW."""

    scale: Tensor
    mask: Tensor
    projection: Tensor

    def __init__(self, temperature: Tensor, projection: nn.Conv2d):
        super().__init__()
        channels = projection.in_channels
        head = torch.arange(channels) // (channels // HEADS)
        self.register_buffer("scale", temperature.detach().flatten()[head][:, None].clone())
        mask = torch.where(head[:, None] == head, 0.0, float("-inf"))
        self.register_buffer("mask", mask)
        self.register_buffer("projection", projection.weight.detach().flatten(1).clone())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.flatten(2).float(), k.flatten(2).float()
        gram = q @ k.transpose(1, 2)
        q_norm, k_norm = (x.square().sum(2, keepdim=True).clamp_min(1e-24).sqrt() for x in (q, k))
        attention = (gram / (q_norm * k_norm.transpose(1, 2)) * self.scale + self.mask).softmax(2)
        matrix = (self.projection @ attention).to(v.dtype)
        return (matrix @ v.flatten(2)).reshape(v.shape)


class _Attention(nn.Module):
    def __init__(self, norm: ChannelLayerNorm, attention: ChannelAttention):
        super().__init__()
        self.normalize = _Normalize(attention.qkv.in_channels)
        self.qkv = _branches(attention.qkv, attention.qkv_depthwise, 3, norm)
        self.attend = _Attend(attention.temperature, attention.projection)

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x)
        return self.attend(*(branch(x) for branch in self.qkv))


class _FeedForward(nn.Module):
    def __init__(self, norm: ChannelLayerNorm, feed_forward: GatedFeedForward):
        super().__init__()
        self.normalize = _Normalize(feed_forward.expand.in_channels)
        self.branches = _branches(feed_forward.expand, feed_forward.depthwise, 2, norm)
        self.projection = feed_forward.projection

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x)
        gate, value = (branch(x) for branch in self.branches)
        return self.projection(_gelu(gate) * value)


class _Block(nn.Module):
    def __init__(self, block: TransformerBlock):
        super().__init__()
        self.attention = _Attention(block.norm1, block.attention)
        self.feed_forward = _FeedForward(block.norm2, block.feed_forward)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.feed_forward(x)


class _Fusion(nn.Module):
    def __init__(self, fusion: AttentionFusion):
        super().__init__()
        self.qkv1 = _branches(fusion.qkv1, fusion.qkv1_depthwise, 3)
        self.qkv2 = _branches(fusion.qkv2, fusion.qkv2_depthwise, 3)
        self.attend1 = _Attend(fusion.temperature1, fusion.projection1)
        self.attend2 = _Attend(fusion.temperature2, fusion.projection2)
        self.gates = _branches(fusion.gate, fusion.gate_depthwise, 2)
        self.expand1 = _branches(fusion.expand1, fusion.expand1_depthwise, 1)[0]
        self.expand2 = _branches(fusion.expand2, fusion.expand2_depthwise, 1)[0]
        self.output1, self.output2 = fusion.output1, fusion.output2

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        q1, k1, v1 = (branch(x1) for branch in self.qkv1)
        q2, k2, v2 = (branch(x2) for branch in self.qkv2)
        x1 = x1 + self.attend1(q2, k1, v1)
        x2 = x2 + self.attend2(q1, k2, v2)
        x = torch.cat((x1, x2), 1)
        gate1, gate2 = (branch(x) for branch in self.gates)
        y1 = _gelu(gate1) * self.expand1(x1)
        y2 = _gelu(gate2) * self.expand2(x2)
        return x + self.output1(y1) + self.output2(y2)


class DeployedNet(nn.Module):
    """forward(a, b): (N, 1, H, W) float32 in [0, 1] -> fused (N, 1, H, W) float32 in (0, 1), as `net` computes it.

    half: float16 weights and features with the float32 islands named above; inputs and output stay float32.
    """

    def __init__(self, net: FusionNet, *, half: bool = False):
        super().__init__()
        net = copy.deepcopy(net)
        self.dtype = torch.float16 if half else torch.float32
        self.stem1, self.stem2 = net.stem1, net.stem2
        self.encoder1, self.encoder2, self.decoder = (
            nn.Sequential(*(_Block(block) for block in blocks))  # type: ignore[arg-type]
            for blocks in (net.encoder1, net.encoder2, net.decoder)
        )
        self.fusion = _Fusion(net.fusion)
        self.reduce, self.output = net.reduce, net.output
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # what the attention holds beside them stays float32
                module.to(self.dtype)
        self.eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x1, x2 = self.stem1(a.to(self.dtype)), self.stem2(b.to(self.dtype))
        x = self.decoder(self.fusion(self.encoder1(x1), self.encoder2(x2)))
        x = nn.functional.leaky_relu(self.reduce(x), 0.01)
        return self.output(x).float().sigmoid()
