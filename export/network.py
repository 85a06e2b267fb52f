"""The fusion networks as they are deployed: the same functions as those of refusion, in the form that engines run best.

Against the full network that is trained: features stay in NCHW, so that nothing is transposed; the affine part of each
layer norm is folded into the convolution after it; every split of channels is two or three convolutions instead of one
and a copy. With `half`, weights and features are float16 and what needs range or precision is an island of float32.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from refusion.lite import InvertedBlock, LiteNet
from refusion.model import (
    HEADS,
    AttentionFusion,
    ChannelAttention,
    ChannelLayerNorm,
    FusionNet,
    GatedFeedForward,
    TransformerBlock,
)

#: What a float16 network computes in float32. FusionNet: the sums over H*W are the attention's norms and Gram matrices.
ISLANDS = {
    "FusionNet": ("layer norm", "sums over H*W", "softmax", "output"),
    "LiteNet": ("mean over H*W", "output"),
}


class _Types(NamedTuple):
    """Types of the islands of the full network."""

    norm: torch.dtype
    sums: torch.dtype
    softmax: torch.dtype
    output: torch.dtype


def _island_types(network: str, half: bool, islands: Collection[str] | None) -> list[torch.dtype]:
    """Type of each of ISLANDS[network]: float32, or float16 for those left out."""
    kept = ISLANDS[network] if islands is None else islands
    return [torch.float16 if half and name not in kept else torch.float32 for name in ISLANDS[network]]


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

    def __init__(self, channels: int, statistics: torch.dtype):
        super().__init__()
        self.statistics = statistics
        centre = torch.eye(channels) - 1 / channels
        self.centre = nn.Conv2d(channels, channels, 1, bias=False)
        self.centre.weight.data = centre[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        centred = self.centre(x)
        wide = centred.to(self.statistics)
        return (wide * torch.rsqrt((wide * wide).mean(1, keepdim=True) + 1e-5)).to(x.dtype)


def _gelu(x: Tensor) -> Tensor:
    """Exact GELU, written as ONNX Runtime's optimiser recognises it."""
    return x * (torch.erf(x / 2**0.5) + 1.0) * 0.5


class _Attend(nn.Module):
    """refusion.model.attend, with the product in NCHW."""

    scale: Tensor
    mask: Tensor
    projection: Tensor

    def __init__(self, temperature: Tensor, projection: nn.Conv2d, sums: torch.dtype, softmax: torch.dtype):
        super().__init__()
        self.sums, self.softmax = sums, softmax
        channels = projection.in_channels
        head = torch.arange(channels) // (channels // HEADS)
        mask = torch.where(head[:, None] == head, 0.0, float("-inf"))
        self.register_buffer("scale", temperature.detach().flatten()[head][:, None].to(softmax, copy=True))
        self.register_buffer("mask", mask.to(softmax))
        self.register_buffer("projection", projection.weight.detach().flatten(1).to(softmax, copy=True))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.flatten(2).to(self.sums), k.flatten(2).to(self.sums)
        gram = q @ k.transpose(1, 2)
        q_norm, k_norm = (x.square().sum(2, keepdim=True).clamp_min(1e-24).sqrt() for x in (q, k))
        cosine = (gram / (q_norm * k_norm.transpose(1, 2))).to(self.softmax)
        attention = (cosine * self.scale + self.mask).softmax(2)
        matrix = (self.projection @ attention).to(v.dtype)
        return (matrix @ v.flatten(2)).reshape(v.shape)


class _Attention(nn.Module):
    def __init__(self, norm: ChannelLayerNorm, attention: ChannelAttention, types: _Types):
        super().__init__()
        self.normalize = _Normalize(attention.qkv.in_channels, types.norm)
        self.qkv = _branches(attention.qkv, attention.qkv_depthwise, 3, norm)
        self.attend = _Attend(attention.temperature, attention.projection, types.sums, types.softmax)

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x)
        return self.attend(*(branch(x) for branch in self.qkv))


class _FeedForward(nn.Module):
    def __init__(self, norm: ChannelLayerNorm, feed_forward: GatedFeedForward, types: _Types):
        super().__init__()
        self.normalize = _Normalize(feed_forward.expand.in_channels, types.norm)
        self.branches = _branches(feed_forward.expand, feed_forward.depthwise, 2, norm)
        self.projection = feed_forward.projection

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x)
        gate, value = (branch(x) for branch in self.branches)
        return self.projection(_gelu(gate) * value)


class _Block(nn.Module):
    def __init__(self, block: TransformerBlock, types: _Types):
        super().__init__()
        self.attention = _Attention(block.norm1, block.attention, types)
        self.feed_forward = _FeedForward(block.norm2, block.feed_forward, types)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.feed_forward(x)


class _Fusion(nn.Module):
    def __init__(self, fusion: AttentionFusion, types: _Types):
        super().__init__()
        self.qkv1 = _branches(fusion.qkv1, fusion.qkv1_depthwise, 3)
        self.qkv2 = _branches(fusion.qkv2, fusion.qkv2_depthwise, 3)
        self.attend1 = _Attend(fusion.temperature1, fusion.projection1, types.sums, types.softmax)
        self.attend2 = _Attend(fusion.temperature2, fusion.projection2, types.sums, types.softmax)
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

    half: float16 weights and features with islands of float32, those of ISLANDS or some of them; inputs and output stay
        float32.
    """

    def __init__(self, net: FusionNet, *, half: bool = False, islands: Collection[str] | None = None):
        super().__init__()
        net = copy.deepcopy(net)
        self.dtype = torch.float16 if half else torch.float32
        types = _Types(*_island_types("FusionNet", half, islands))
        self.output_type = types.output
        self.stem1, self.stem2 = net.stem1, net.stem2
        self.encoder1, self.encoder2, self.decoder = (
            nn.Sequential(*(_Block(block, types) for block in blocks))  # type: ignore[arg-type]
            for blocks in (net.encoder1, net.encoder2, net.decoder)
        )
        self.fusion = _Fusion(net.fusion, types)
        self.reduce, self.output = net.reduce, net.output
        _convert_convolutions(self, self.dtype)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x1, x2 = self.stem1(a.to(self.dtype)), self.stem2(b.to(self.dtype))
        x = self.decoder(self.fusion(self.encoder1(x1), self.encoder2(x2)))
        x = nn.functional.leaky_relu(self.reduce(x), 0.01)
        return self.output(x).to(self.output_type).sigmoid().float()


def _convert_convolutions(net: nn.Module, dtype: torch.dtype) -> None:
    """Convolutions alone: what stands beside them has the type of its island."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.to(dtype)
    net.eval()


class _LiteBlock(nn.Module):
    """refusion.lite.InvertedBlock with the type of its mean chosen."""

    def __init__(self, block: InvertedBlock, mean: torch.dtype):
        super().__init__()
        self.mean = mean
        self.depthwise, self.expand, self.project = block.depthwise, block.expand, block.project
        self.context = block.context

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.depthwise(x)).relu()
        if self.context is not None:
            mean = y.to(self.mean).mean((2, 3), keepdim=True).to(y.dtype)
            y = y * (2 * self.context(mean).sigmoid())
        return x + self.project(y)


class DeployedLite(nn.Module):
    """forward(a, b): (N, 1, H, W) float32 in [0, 1] -> fused (N, 1, H, W) float32 in [0, 1], as `net` computes it.

    half: as in DeployedNet; the island "output" is what is made of the maps: energies, weights, and their sum.
    """

    def __init__(self, net: LiteNet, *, half: bool = False, islands: Collection[str] | None = None):
        super().__init__()
        self.net = copy.deepcopy(net)
        self.dtype = torch.float16 if half else torch.float32
        mean, self.output_type = _island_types("LiteNet", half, islands)
        for name, block in list(self.net.named_modules()):
            if isinstance(block, InvertedBlock):
                self.net.set_submodule(name, _LiteBlock(block, mean))
        self.net.blur = self.net.blur.to(self.output_type)
        _convert_convolutions(self, self.dtype)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        maps = self.net.maps(a.to(self.dtype), b.to(self.dtype)).to(self.output_type)
        return self.net.mix(maps, a.to(self.output_type), b.to(self.output_type)).float()


def deploy(net: FusionNet | LiteNet, *, half: bool = False, islands: Collection[str] | None = None) -> nn.Module:
    """The network as it is deployed: forward(a, b) -> fused, see DeployedNet and DeployedLite."""
    if isinstance(net, FusionNet):
        return DeployedNet(net, half=half, islands=islands)
    return DeployedLite(net, half=half, islands=islands)


def quantizable(net: nn.Module) -> dict[str, list[str]]:
    """Units of convolutions that INT8 may take, by name -> the names of their modules.

    The branches that share an input are one unit, as engines merge them. The layer norm's centring and what works on
    one mean of the whole image are no candidates: they are arithmetic and next to nothing.
    """
    units: dict[str, list[str]] = {}
    for name, module in net.named_modules():
        if not isinstance(module, nn.Conv2d) or name.endswith((".centre", ".context")):
            continue
        *path, last = name.split(".")
        branch = len(path) > 1 and isinstance(net.get_submodule(".".join(path[:-1])), nn.ModuleList)
        units.setdefault(".".join([*path[:-1], last]) if branch else name, []).append(name)
    return units


def rescalable(net: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.Conv2d]]:
    """Pairs of convolutions between which a channel may be scaled: what the first gives, the second gets in proportion.

    So its weights in the first may be multiplied by any positive number and those in the second divided by it.
    """
    for module in net.modules():
        if isinstance(module, _Branch):
            yield module.point, module.depth
        elif isinstance(module, _FeedForward):
            value = module.branches[1]
            assert isinstance(value, _Branch)
            yield value.depth, module.projection
        elif isinstance(module, _Fusion):
            for expand, output in ((module.expand1, module.output1), (module.expand2, module.output2)):
                assert isinstance(expand, _Branch)
                yield expand.depth, output
        elif isinstance(module, _LiteBlock):
            yield module.depthwise, module.expand
            if module.context is None:
                yield module.expand, module.project  # ReLU keeps proportions
