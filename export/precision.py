"""INT8: which convolutions it may take, by measurement, and the Q/DQ nodes that say so in the ONNX model.

Weights are int8 by output channel, activations int8 by tensor, both symmetric. A convolution's input and weights are
quantised and its output is not, as TensorRT wants it: where the next layer is INT8 as well, its own Q follows at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn
from tqdm import tqdm

from export.calibrate import Pairs, largest_channels
from export.network import ISLANDS, deploy, quantizable, rescalable
from export.options import FLOOR
from export.table import aligned
from refusion.lite import LiteNet
from refusion.model import FusionNet
from runtime.errors import InputError

SHARE = 0.7  # of a channel's range that goes from a convolution's input to its weights


@dataclass(frozen=True)
class Unit:
    """Convolutions that are quantised together, and what that alone does."""

    name: str
    convolutions: tuple[str, ...]
    work: float  # share of the multiplications of all convolutions that could be INT8
    psnr: float  # dB against float32, this unit alone being INT8


@dataclass(frozen=True)
class Choice:
    """What becomes INT8."""

    units: tuple[Unit, ...]  # all, the least harmful first; the first `count` of them are INT8
    count: int
    psnr: float  # dB against float32 on the calibration pictures

    @property
    def convolutions(self) -> list[str]:
        return [name for unit in self.units[: self.count] for name in unit.convolutions]

    @property
    def work(self) -> float:
        return sum(unit.work for unit in self.units[: self.count])

    def text(self) -> str:
        """A line for each unit, those that stay float first."""
        lines = [["layer", "convolutions", "work, %", "alone in INT8, dB", "becomes"]]
        for i, unit in reversed(list(enumerate(self.units))):
            numbers = [str(len(unit.convolutions)), f"{100 * unit.work:.1f}", f"{unit.psnr:.1f}"]
            lines.append([unit.name, *numbers, "int8" if i < self.count else "float"])
        total = [str(len(self.convolutions)), f"{100 * self.work:.1f}", f"{self.psnr:.1f}", "int8"]
        return aligned([*lines, ["all that become INT8", *total]])


@torch.no_grad()
def equalise(network: nn.Module, pairs: Pairs) -> None:
    """Scale channels between convolutions so that fewer of their int8 values are wasted; the function stays the same.

    All channels of a depthwise convolution's input get one range, since its weights have scales of their own; before
    another convolution the ranges of input and weights move towards each other.

    Source: M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019; the
    exponent: G. Xiao et al., "SmoothQuant", ICML 2023.
    """
    between = list(rescalable(network))
    largest = largest_channels(network, [second for _, second in between], pairs)
    for (first, second), channels in zip(between, largest, strict=True):
        inputs = channels.clamp_min(1e-4 * float(channels.max()) or 1.0)  # some may never be used
        if second.groups > 1:
            scale = 1 / inputs
        else:
            weights = second.weight.abs().amax((0, 2, 3)).clamp_min(1e-6)
            scale = weights ** (1 - SHARE) / inputs**SHARE
        scale = scale / scale.log().mean().exp()
        first.weight *= scale[:, None, None, None]
        if first.bias is not None:
            first.bias *= scale
        second.weight /= scale[:, None, None, None] if second.groups > 1 else scale[None, :, None, None]


@torch.inference_mode()
def choose(network: nn.Module, limits: Mapping[str, float], pairs: Pairs, floor: float = FLOOR) -> Choice:
    """The layers that INT8 takes: as many as keep `floor`, those first that cost least quality for their work.

    Each unit is quantised alone, on every pair; then the longest row of them that keeps the floor is searched by
    halving. The errors of units add up nearly as if they were independent, so that the order holds for the sum.

    Args:
        network: `deploy(net)`, float32.
        limits: of `input_limits`.
        pairs: (1, 1, H, W) pairs to measure on.
        floor: dB of PSNR against float32 over all pairs.

    Raises:
        InputError: not one layer keeps the floor.
    """
    measure = _Measure(network, limits, pairs)
    modules = quantizable(network)
    works = {name: sum(_work(network, conv) for conv in names) for name, names in modules.items()}
    units = [
        Unit(name, tuple(names), works[name] / sum(works.values()), measure.psnr(names))
        for name, names in tqdm(modules.items(), "measuring layers", unit="layer", disable=None)
    ]
    units.sort(key=lambda unit: (10 ** (-unit.psnr / 10) / unit.work, unit.name))
    low, high, reached = 0, len(units), float("inf")
    while low < high:
        middle = (low + high + 1) // 2
        psnr = measure.psnr([name for unit in units[:middle] for name in unit.convolutions])
        if psnr >= floor:
            low, reached = middle, psnr
        else:
            high = middle - 1
    if not low:
        raise InputError(f"no layer keeps {floor:g} dB in INT8; give a lower --int8-floor, or take fp16")
    return Choice(tuple(units), low, reached)


def _work(network: nn.Module, name: str) -> float:
    """Multiplications of a convolution for a pixel of its output."""
    return float(network.get_submodule(name).weight.numel())  # type: ignore[operator]


class _Measure:
    """PSNR of a network on some pairs with any of its convolutions in INT8."""

    def __init__(self, network: nn.Module, limits: Mapping[str, float], pairs: Pairs):
        self.network, self.limits, self.pairs = network, limits, pairs
        self.expected = [network(a, b) for a, b in pairs]

    def psnr(self, convolutions: Sequence[str]) -> float:
        with simulated(self.network, self.limits, convolutions):
            return psnr((self.network(a, b) for a, b in self.pairs), self.expected)


def psnr(results: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """dB of all pictures together, peak 1; infinite where they are equal."""
    squares, count = 0.0, 0
    for x, y in zip(results, expected, strict=True):
        squares += float((x.double() - y.double()).square().sum())
        count += y.numel()
    return float(-10 * np.log10(squares / count)) if squares else float("inf")


@contextmanager
def simulated(network: nn.Module, limits: Mapping[str, float], convolutions: Sequence[str]) -> Iterator[None]:
    """Within it the named convolutions compute as in INT8: their inputs and weights take int8 values."""
    hooks, kept = [], []
    for name in convolutions:
        conv = network.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        scale = limits[name] / 127
        hooks.append(
            conv.register_forward_pre_hook(
                lambda module, inputs, scale=scale: torch.fake_quantize_per_tensor_affine(
                    inputs[0], scale, 0, -128, 127
                )
            )
        )
        kept.append((conv, conv.weight.data))
        values, scales = quantise_weight(conv.weight.detach().numpy())
        conv.weight.data = torch.from_numpy(values * scales[:, None, None, None])
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for conv, weight in kept:
            conv.weight.data = weight


def quantise_weight(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(O, I, H, W) weights -> int8 of the same shape in -127..127, and a scale for each of the O channels."""
    scales = np.abs(weight).reshape(len(weight), -1).max(1) / np.float32(127)
    scales = np.where(scales > 0, scales, np.float32(1)).astype(np.float32)
    return np.rint(weight / scales[:, None, None, None]).astype(np.int8), scales


def insert_quantisation(model: onnx.ModelProto, limits: Mapping[str, float], *, half: bool) -> int:
    """Put Q and DQ nodes before convolutions of an ONNX model, in place; returns how many are INT8 then.

    Args:
        model: of `export.onnx.trace`, whose initialisers have the names of the module's parameters.
        limits: name of a convolution's module -> largest absolute value of its input.
        half: the rest of the graph is float16; needs opset FLOAT16_SCALES.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    scale_type = np.float16 if half else np.float32
    nodes: list[onnx.NodeProto] = []
    quantised: dict[tuple[str, float], str] = {}  # (tensor, limit) -> the tensor after Q and DQ

    def constant(name: str, value: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    zero = constant("int8_zero", np.array(0, np.int8))
    count = 0
    for node in graph.node:
        name = node.input[1].removesuffix(".weight") if node.op_type == "Conv" else ""
        if name in limits:
            source, limit = node.input[0], limits[name]
            if (source, limit) not in quantised:
                scale = constant(f"{name}.input_scale", np.array(limit / 127, scale_type))
                integer, real = f"{name}.input_int8", f"{name}.input"
                nodes.append(helper.make_node("QuantizeLinear", [source, scale, zero], [integer]))
                nodes.append(helper.make_node("DequantizeLinear", [integer, scale, zero], [real]))
                quantised[source, limit] = real
            values, scales = quantise_weight(numpy_helper.to_array(weights[node.input[1]]).astype(np.float32))
            parts = [
                constant(f"{name}.weight_int8", values),
                constant(f"{name}.weight_scale", scales.astype(scale_type)),
                constant(f"{name}.weight_zero", np.zeros(len(scales), np.int8)),
            ]
            nodes.append(helper.make_node("DequantizeLinear", parts, [f"{name}.weight_real"], axis=0))
            node.input[0], node.input[1] = quantised[source, limit], f"{name}.weight_real"
            count += 1
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return count


@torch.inference_mode()
def measure_islands(net: FusionNet | LiteNet, pairs: Pairs) -> dict[str, float]:
    """What each float32 island of the float16 network is worth: PSNR in dB against float32 without it.

    Every operation rounds its result to float16; convolutions sum in float32, as on a GPU. Keys: "all islands", then
    "all but ..." for each, and "no island"; NaN where the network breaks down.
    """
    names = ISLANDS[type(net).__name__]
    kept = {"all islands": names}
    kept |= {f"all but {name}": tuple(other for other in names if other != name) for name in names}
    kept["no island"] = ()
    expected = [net(a, b) for a, b in pairs]
    worth = {}
    for text, islands in tqdm(kept.items(), "measuring islands", unit="island", disable=None):
        network = deploy(net, half=True, islands=islands)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):  # PyTorch's own float16 convolution takes a minute on a CPU
                module.float()
                module.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
                module.register_forward_hook(lambda module, inputs, output: output.half())
        worth[text] = psnr((network(a, b) for a, b in pairs), expected)
    return worth
