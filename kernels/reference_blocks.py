"""The network blocks in plain PyTorch: what the fused kernels of the same names are compared with.

Features are (N, C, H, W); no convolution has a bias; all keep H and W with zero padding. The weights are plain tensors
in the shapes of the modules' parameters, in the order in which `parameters()` of the module gives them, so that
`TransformerBlockWeights(*block.parameters())` takes a module's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-5  # of the layer norms
LENGTH_EPS = 1e-24  # least squared length of a query or key over H*W


class TransformerBlockWeights(NamedTuple):
    """Weights of a transformer block of C channels (ReFusion, figure 3; Restormer, section 3)."""

    norm1_weight: Tensor  # (C,)
    norm1_bias: Tensor  # (C,)
    temperature: Tensor  # (heads, 1, 1)
    qkv: Tensor  # (3C, C, 1, 1)
    qkv_depthwise: Tensor  # (3C, 1, 3, 3)
    projection: Tensor  # (C, C, 1, 1)
    norm2_weight: Tensor  # (C,)
    norm2_bias: Tensor  # (C,)
    expand: Tensor  # (2 hidden, C, 1, 1): gates, then values
    depthwise: Tensor  # (2 hidden, 1, 3, 3)
    output: Tensor  # (C, hidden, 1, 1)


class AttentionFusionWeights(NamedTuple):
    """Weights of the attention fusion module for two sources of C channels."""

    temperature1: Tensor  # (heads, 1, 1)
    temperature2: Tensor  # (heads, 1, 1)
    qkv1: Tensor  # (3C, C, 1, 1)
    qkv2: Tensor  # (3C, C, 1, 1)
    qkv1_depthwise: Tensor  # (3C, 1, 3, 3)
    qkv2_depthwise: Tensor  # (3C, 1, 3, 3)
    projection1: Tensor  # (C, C, 1, 1)
    projection2: Tensor  # (C, C, 1, 1)
    gate: Tensor  # (2 hidden, 2C, 1, 1): the gates of source 1, then of source 2
    gate_depthwise: Tensor  # (2 hidden, 1, 3, 3)
    expand1: Tensor  # (hidden, C, 1, 1)
    expand1_depthwise: Tensor  # (hidden, 1, 3, 3)
    expand2: Tensor  # (hidden, C, 1, 1)
    expand2_depthwise: Tensor  # (hidden, 1, 3, 3)
    output1: Tensor  # (2C, hidden, 1, 1)
    output2: Tensor  # (2C, hidden, 1, 1)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Layer norm over the channels of each pixel: biased variance, affine. (N, C, H, W) -> (N, C, H, W)."""
    x = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, eps=NORM_EPS)
    return x.permute(0, 3, 1, 2)


def separable_conv(x: Tensor, pointwise: Tensor, depthwise: Tensor) -> Tensor:
    """1x1 convolution to as many channels as `pointwise` gives, then a depthwise 3x3 one with zero padding."""
    return F.conv2d(F.conv2d(x, pointwise), depthwise, padding=1, groups=depthwise.shape[0])


def channel_attention(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, projection: Tensor) -> Tensor:
    """projection(softmax(temperature * q^ k^^T) v) in each head, q^ and k^ of length 1 over H*W (MDTA of Restormer).

    q, k, v: (N, C, H, W). Lengths and products over H*W are float32 where the features are narrower.
    """
    n, channels, height, width = v.shape
    heads = temperature.shape[0]
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = (x.to(wide).reshape(n, heads, channels // heads, height * width) for x in (q, k))
    q = q / q.square().sum(3, keepdim=True).clamp_min(LENGTH_EPS).sqrt()
    k = k / k.square().sum(3, keepdim=True).clamp_min(LENGTH_EPS).sqrt()
    attention = (q @ k.transpose(2, 3) * temperature).softmax(3).to(v.dtype)
    out = attention @ v.reshape(n, heads, channels // heads, height * width)
    return F.conv2d(out.reshape(n, channels, height, width), projection)


def gated_feed_forward(x: Tensor, expand: Tensor, depthwise: Tensor, output: Tensor) -> Tensor:
    """GDFN of Restormer: output(GELU(gate) * value), gate and value the halves of the separable convolution of x."""
    gate, value = separable_conv(x, expand, depthwise).chunk(2, dim=1)
    return F.conv2d(F.gelu(gate) * value, output)


def transformer_block(x: Tensor, weights: TransformerBlockWeights) -> Tensor:
    """x += attention(norm(x)); x += feed_forward(norm(x)). (N, C, H, W) -> (N, C, H, W)."""
    w = weights
    normalised = layer_norm(x, w.norm1_weight, w.norm1_bias)
    q, k, v = separable_conv(normalised, w.qkv, w.qkv_depthwise).chunk(3, dim=1)
    x = x + channel_attention(q, k, v, w.temperature, w.projection)
    normalised = layer_norm(x, w.norm2_weight, w.norm2_bias)
    return x + gated_feed_forward(normalised, w.expand, w.depthwise, w.output)


def attention_fusion(x1: Tensor, x2: Tensor, weights: AttentionFusionWeights) -> Tensor:
    """Cross attention with swapped queries, then a gated feed-forward of each source (attention fusion module).

    x1, x2: (N, C, H, W) -> (N, 2C, H, W).
    """
    w = weights
    q1, k1, v1 = separable_conv(x1, w.qkv1, w.qkv1_depthwise).chunk(3, dim=1)
    q2, k2, v2 = separable_conv(x2, w.qkv2, w.qkv2_depthwise).chunk(3, dim=1)
    x1 = x1 + channel_attention(q2, k1, v1, w.temperature1, w.projection1)
    x2 = x2 + channel_attention(q1, k2, v2, w.temperature2, w.projection2)
    x = torch.cat((x1, x2), 1)
    gate1, gate2 = separable_conv(x, w.gate, w.gate_depthwise).chunk(2, dim=1)
    y1 = F.gelu(gate1) * separable_conv(x1, w.expand1, w.expand1_depthwise)
    y2 = F.gelu(gate2) * separable_conv(x2, w.expand2, w.expand2_depthwise)
    return x + F.conv2d(y1, w.output1) + F.conv2d(y2, w.output2)
