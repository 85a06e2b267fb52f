"""The three networks of ReFusion (section 3 of the paper): fusion, loss proposal, source reconstruction.

Images are (N, 1, H, W) in [0, 1], any H and W from 1 up; features are (N, C, H, W). No convolution has a bias; all have
stride 1 and zero padding, so H and W never change. A is the infrared / CT, PET or SPECT / near-focus / under-exposed
source, B the visible / MRI / far-focus / over-exposed one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from kernels import backend_for, gradient

HEADS = 8


def conv1x1(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, bias=False)


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)


def depthwise3x3(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)


class ChannelLayerNorm(nn.Module):
    """Layer norm over the channels of each pixel: biased variance, eps 1e-5, affine."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # (N, H, W, C): a view, as features are channels_last
        x = F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-5)
        return x.permute(0, 3, 1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, projection: nn.Conv2d) -> Tensor:
    """Transposed attention between the channels of each head, and its output projection (MDTA, Restormer section 3.1).

    projection(softmax(temperature * q^ k^^T) v), with q^ and k^ normalised over H*W. q, k, v: (N, C, H, W);
    temperature: (heads, 1, 1). Attention and projection are one (C, C) matrix an image, applied to v in one pass, and
    the Gram matrix is divided by the norms instead of q and k. Sums over H*W are float32 where the input is narrower.
    """
    n, channels, height, width = v.shape
    heads = temperature.shape[0]
    q, k, v = q.flatten(2), k.flatten(2), v.flatten(2)  # (N, C, H*W)
    if q.dtype in (torch.float16, torch.bfloat16):
        q, k = q.float(), k.float()
    gram = q @ k.transpose(1, 2)  # (N, C, C), of which the heads' diagonal blocks count
    q_norm = q.square().sum(2, keepdim=True).clamp_min(1e-24).sqrt()
    k_norm = k.square().sum(2, keepdim=True).clamp_min(1e-24).sqrt()
    head = torch.arange(channels, device=v.device) // (channels // heads)
    other_head = head[:, None] != head
    scores = gram / (q_norm * k_norm.transpose(1, 2)) * temperature.flatten()[head][:, None]
    attention = scores.masked_fill(other_head, float("-inf")).softmax(2)
    matrix = (projection.weight.flatten(1).to(attention.dtype) @ attention).to(v.dtype)
    # (H*W, C) @ (C, C): the result is channels_last again.
    return (v.transpose(1, 2) @ matrix.transpose(1, 2)).transpose(1, 2).reshape(n, -1, height, width)


class ChannelAttention(nn.Module):
    """MDTA: 1x1 and depthwise 3x3 convolution to q, k, v; attention between channels; 1x1 projection."""

    def __init__(self, channels: int):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))
        self.qkv = conv1x1(channels, 3 * channels)
        self.qkv_depthwise = depthwise3x3(3 * channels)
        self.projection = conv1x1(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv_depthwise(self.qkv(x)).chunk(3, dim=1)
        return attend(q, k, v, self.temperature, self.projection)


class GatedFeedForward(nn.Module):
    """GDFN: 1x1 to 4C, depthwise 3x3, GELU(first half) * second half, 1x1 back to C."""

    def __init__(self, channels: int):
        super().__init__()
        self.expand = conv1x1(channels, 4 * channels)
        self.depthwise = depthwise3x3(4 * channels)
        self.projection = conv1x1(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.depthwise(self.expand(x)).chunk(2, dim=1)
        return self.projection(F.gelu(gate) * value)


class TransformerBlock(nn.Module):
    """x += MDTA(LN(x)); x += GDFN(LN(x))."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = ChannelLayerNorm(channels)
        self.attention = ChannelAttention(channels)
        self.norm2 = ChannelLayerNorm(channels)
        self.feed_forward = GatedFeedForward(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class AttentionFusion(nn.Module):
    """Attention fusion module: cross attention with swapped queries, then a gated feed-forward of each source.

    x1, x2: (N, C, H, W) -> (N, 2C, H, W).
    """

    def __init__(self, channels: int):
        super().__init__()
        c = channels
        self.temperature1 = nn.Parameter(torch.ones(HEADS, 1, 1))
        self.temperature2 = nn.Parameter(torch.ones(HEADS, 1, 1))
        self.qkv1, self.qkv2 = conv1x1(c, 3 * c), conv1x1(c, 3 * c)
        self.qkv1_depthwise, self.qkv2_depthwise = depthwise3x3(3 * c), depthwise3x3(3 * c)
        self.projection1, self.projection2 = conv1x1(c, c), conv1x1(c, c)
        self.gate, self.gate_depthwise = conv1x1(2 * c, 8 * c), depthwise3x3(8 * c)
        self.expand1, self.expand1_depthwise = conv1x1(c, 4 * c), depthwise3x3(4 * c)
        self.expand2, self.expand2_depthwise = conv1x1(c, 4 * c), depthwise3x3(4 * c)
        self.output1, self.output2 = conv1x1(4 * c, 2 * c), conv1x1(4 * c, 2 * c)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        q1, k1, v1 = self.qkv1_depthwise(self.qkv1(x1)).chunk(3, dim=1)
        q2, k2, v2 = self.qkv2_depthwise(self.qkv2(x2)).chunk(3, dim=1)
        x1 = x1 + attend(q2, k1, v1, self.temperature1, self.projection1)
        x2 = x2 + attend(q1, k2, v2, self.temperature2, self.projection2)
        x = torch.cat((x1, x2), 1)
        gate1, gate2 = self.gate_depthwise(self.gate(x)).chunk(2, dim=1)
        y1 = F.gelu(gate1) * self.expand1_depthwise(self.expand1(x1))
        y2 = F.gelu(gate2) * self.expand2_depthwise(self.expand2(x2))
        return x + self.output1(y1) + self.output2(y2)


class _Network(nn.Module):
    """What the three networks share: the layout of their features, and recomputation of blocks in the backward."""

    recompute = False  # True: keep only the blocks' inputs for the backward and compute the rest again

    def _stem(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        x = conv(x)
        # Layer norms and 1x1 convolutions want the channels of a pixel side by side.
        return x.contiguous(memory_format=torch.channels_last)

    def _run(self, block: nn.Module, *x: Tensor) -> Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return block(*x)
        # With the parameters of now: under functional_call the module has its own back by the time of the backward.
        parameters = dict(block.named_parameters())
        return checkpoint(lambda p, *x: functional_call(block, p, x), parameters, *x, use_reentrant=False)


def _encoder(channels: int) -> nn.Sequential:
    return nn.Sequential(TransformerBlock(channels), TransformerBlock(channels))


def _kernels_take(x: Tensor) -> bool:
    """Whether the block kernels run: in the half types, where kernels are chosen and nothing is differentiated.

    float32 stays in float32: the kernels' tensor-core operands are float16. A tangent of forward mode would be lost.
    """
    if x.dtype not in (torch.float16, torch.bfloat16) or x.shape[1] != 16 or torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level < 0 and backend_for(x) != "reference"


class FusionNet(_Network):
    """The fusion network, the only one that is deployed. 59,856 parameters at 16 channels.

    forward(a, b): two images (N, 1, H, W) in [0, 1] -> fused image (N, 1, H, W) in (0, 1).
    """

    def __init__(self, channels: int = 16):
        super().__init__()
        self.stem1, self.stem2 = conv3x3(1, channels), conv3x3(1, channels)
        self.encoder1, self.encoder2 = _encoder(channels), _encoder(channels)
        self.fusion = AttentionFusion(channels)
        self.decoder = _encoder(2 * channels)
        self.reduce = conv3x3(2 * channels, channels)
        self.output = conv3x3(channels, 1)
        self._folded_weights: tuple[Any, tuple[Any, ...]] | None = None

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x1, x2 = self._stem(self.stem1, a), self._stem(self.stem2, b)
        x = self._blocks_in_kernels(x1, x2) if _kernels_take(x1) else self._blocks(x1, x2)
        x = F.leaky_relu(self.reduce(x), 0.01)
        return self.output(x).sigmoid()

    def _blocks(self, x1: Tensor, x2: Tensor) -> Tensor:
        for block in self.encoder1:
            x1 = self._run(block, x1)
        for block in self.encoder2:
            x2 = self._run(block, x2)
        x = self._run(self.fusion, x1, x2)
        for block in self.decoder:
            x = self._run(block, x)
        return x

    def _blocks_in_kernels(self, x1: Tensor, x2: Tensor) -> Tensor:
        from kernels.attention_fusion import attention_fusion
        from kernels.transformer_block import transformer_blocks

        encoder1, encoder2, fusion, decoder = self._folded()
        x = attention_fusion(transformer_blocks(x1, encoder1), transformer_blocks(x2, encoder2), fusion)
        return transformer_blocks(x, decoder)

    def _folded(self) -> tuple[Any, ...]:
        """The blocks' weights as the kernels read them, folded again where a parameter has changed since."""
        from kernels.attention_fusion import fold_attention_fusion
        from kernels.reference_blocks import AttentionFusionWeights, TransformerBlockWeights
        from kernels.transformer_block import fold_transformer_block

        versions = tuple((p.data_ptr(), p._version, p.dtype) for p in self.parameters())
        if self._folded_weights is None or self._folded_weights[0] != versions:
            encoder1, encoder2, decoder = (
                [fold_transformer_block(TransformerBlockWeights(*block.parameters())) for block in blocks]
                for blocks in (self.encoder1, self.encoder2, self.decoder)
            )
            fusion = fold_attention_fusion(AttentionFusionWeights(*self.fusion.parameters()))
            self._folded_weights = versions, (encoder1, encoder2, fusion, decoder)
        return self._folded_weights[1]

    @staticmethod
    def from_pretrained(name: str | Path) -> FusionNet:
        """The network with weights by task name ("ivif") or path (.safetensors, or the authors' .pth), in eval mode.

        Raises runtime.errors.InputError where there are no such weights.
        """
        from refusion.weights import load_fusion_net

        return load_fusion_net(name)[0]


def _intensity(x: Tensor) -> Tensor:
    return x


def _sharpness(x: Tensor) -> Tensor:
    return F.avg_pool2d(gradient(x), 7, stride=1, padding=3)


def _exposure(x: Tensor) -> Tensor:
    return -(x - 0.5).square()


#: What a prior may prefer of a source, pixel by pixel: (N, 1, H, W) in [0, 1] -> (N, 1, H, W), larger is better.
PRIORS: dict[str, Callable[[Tensor], Tensor]] = {
    "intensity": _intensity,  # hot targets, function in medical images
    "sharpness": _sharpness,  # what is in focus
    "exposure": _exposure,  # what is neither black nor white
}


class LossProposalNet(_Network):
    """The loss-proposal network: weights of both sources in the intensity term (w) and in the gradient term (v).

    forward(a, b): two images (N, 1, H, W) in [0, 1] -> (w, v), both (N, 2, H, W), channel 0 for a, summing to 1 over
    the channels. As in the paper, or with two variants of ours:

    symmetric: one scoring network s, w = softmax(s(a, b), s(b, a)), v alike, so that swapping the sources swaps the
        weights; its last layer starts at 0, so that w = v = 0.5 at first.
    prior, prior_w, prior_v: add prior_w * PRIORS[prior](x) to the logits of w, and prior_v * (the gradient averaged
        over 3x3 pixels) to those of v, x being a or b.
    """

    def __init__(
        self,
        channels: int = 16,
        *,
        symmetric: bool = False,
        prior: str = "intensity",
        prior_w: float = 0.0,
        prior_v: float = 0.0,
    ):
        super().__init__()
        self.symmetric, self.prior, self.prior_w, self.prior_v = symmetric, PRIORS[prior], prior_w, prior_v
        self.stem1, self.stem2 = conv3x3(1, channels), conv3x3(1, channels)
        self.encoder1, self.encoder2 = _encoder(channels), _encoder(channels)
        self.decoder = _encoder(2 * channels)
        self.reduce = conv3x3(2 * channels, channels)
        self.activation = nn.PReLU()
        self.output = conv3x3(channels, 2 if symmetric else 4)
        if symmetric:
            nn.init.zeros_(self.output.weight)

    def _logits(self, a: Tensor, b: Tensor) -> Tensor:
        x1, x2 = self._stem(self.stem1, a), self._stem(self.stem2, b)
        for block in self.encoder1:
            x1 = self._run(block, x1)
        for block in self.encoder2:
            x2 = self._run(block, x2)
        x = torch.cat((x1, x2), 1)
        for block in self.decoder:
            x = self._run(block, x)
        return self.output(self.activation(self.reduce(x)))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if self.symmetric:
            score_a, score_b = self._logits(torch.cat((a, b)), torch.cat((b, a))).chunk(2)  # (N, 2, H, W) each
            w, v = torch.cat((score_a, score_b), 1)[:, [0, 2, 1, 3]].chunk(2, dim=1)
        else:
            w, v = self._logits(a, b).chunk(2, dim=1)
        if self.prior_w:
            w = w + self.prior_w * torch.cat((self.prior(a), self.prior(b)), 1)
        if self.prior_v:
            v = v + self.prior_v * F.avg_pool2d(torch.cat((gradient(a), gradient(b)), 1), 3, stride=1, padding=1)
        return w.softmax(1), v.softmax(1)


class ReconstructionNet(_Network):
    """The source-reconstruction network: fused (N, 1, H, W) -> reconstructed (a, b), (N, 1, H, W) each, in (0, 1).

    Not released by the authors; ours is four transformer blocks, 14,992 parameters.
    """

    def __init__(self, channels: int = 16):
        super().__init__()
        self.stem = conv3x3(1, channels)
        self.body = nn.Sequential(_encoder(channels), _encoder(channels))
        self.output = conv3x3(channels, 2)

    def forward(self, fused: Tensor) -> tuple[Tensor, Tensor]:
        x = self._stem(self.stem, fused)
        for block in self.body:
            x = self._run(block, x)
        a, b = self.output(x).sigmoid().chunk(2, dim=1)
        return a, b
