"""INT8: calibration, the choice of layers, the Q/DQ graph; and what the float32 islands of fp16 are worth."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from export.calibrate import BINS, MAX_PAIRS, Histogram, crop, generated_pairs, input_limits, read_pairs
from export.network import deploy, quantizable, rescalable
from export.onnx import trace, write_model
from export.options import METHODS, Graph, Int8
from export.precision import choose, equalise, insert_quantisation, measure_islands, psnr, quantise_weight, simulated
from refusion.lite import LiteNet
from refusion.model import FusionNet
from runtime.color import luma
from runtime.errors import InputError
from runtime.images import write_image
from runtime.scenes import night_road

ROUNDS_FLOAT16 = tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 30)


@pytest.fixture(scope="module")
def pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    frames = [night_road(frame=97 * i, size=(48, 64)) for i in range(4)]
    tensors = [[torch.from_numpy(luma(x))[None, None] for x in frame] for frame in frames]
    return crop([(a, b) for a, b in tensors], 48)


@pytest.fixture(scope="module", params=[pytest.param("full", marks=pytest.mark.slow), "lite"])
def net(request: pytest.FixtureRequest) -> nn.Module:
    """Trained weights of the full network; random ones of the lite, whose head would otherwise be 0."""
    if request.param == "full":
        return FusionNet.from_pretrained("ivif")
    torch.manual_seed(0)
    lite = LiteNet().eval()
    nn.init.normal_(lite.head.weight, std=0.5)
    return lite


def names_of(network: nn.Module) -> list[str]:
    return [name for unit in quantizable(network).values() for name in unit]


# Calibration


def test_histogram_is_of_all_values_whatever_comes_first() -> None:
    torch.manual_seed(0)
    small, large = torch.rand(1, 2, 64, 64), 7 * torch.randn(1, 2, 64, 64)
    histogram = Histogram()
    histogram.add(small)
    histogram.add(large)
    kept = torch.cat((small, large))[..., ::2, ::2].abs().flatten().numpy()  # a quarter of the pixels is counted
    assert histogram.counts.sum() == kept.size
    assert histogram.largest == pytest.approx(float(large.abs().max()))
    edges = np.linspace(0, histogram.top, BINS + 1)
    coarse = np.add.reduceat(histogram.counts, np.arange(0, BINS, BINS // 8))
    expected, _ = np.histogram(kept, edges[:: BINS // 8])
    assert np.abs(coarse - expected).max() <= 2  # values on an edge


def test_methods_differ_in_what_they_make_of_outliers() -> None:
    torch.manual_seed(0)
    histogram = Histogram()
    values = torch.randn(1, 1, 400, 400)
    values[0, 0, 0, 0] = 50.0
    histogram.add(values)
    assert histogram.limit("minmax") == 50
    assert 3.5 < histogram.limit("percentile") < 4.5  # 99.99 % of |N(0, 1)| are below 3.89
    assert 2.5 < histogram.limit("entropy") < 8
    blank = Histogram()
    blank.add(torch.zeros(1, 1, 8, 8))
    assert [blank.limit(method) for method in METHODS] == [0, 0, 0]


def test_limits_of_inputs(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    network = Chain()
    limits = input_limits(network, ["first", "last"], pairs, "minmax")
    largest = max(float(a.max()) for a, _ in pairs)
    assert limits == {"first": pytest.approx(largest), "last": pytest.approx(2 * largest)}
    assert not network.last._forward_pre_hooks


class Chain(nn.Module):
    """a -> -2 a -> what nobody looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
        self.first.weight.data.fill_(-2.0)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(a))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(9):
        infrared, visible = night_road(frame=i, size=(40, 300))
        write_image(tmp_path / "set" / "a" / f"{i}.png", infrared)
        write_image(tmp_path / "set" / "b" / f"{i}.png", visible)
    return tmp_path


def test_calibration_pairs_are_cropped_and_limited(folder: Path) -> None:
    pairs = read_pairs(folder)
    assert len(pairs) == 9 <= MAX_PAIRS
    assert {a.shape for a, _ in pairs} == {b.shape for _, b in pairs} == {(1, 1, 40, 256)}
    assert all(x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1 for pair in pairs for x in pair)
    again = read_pairs(folder)
    assert all(
        torch.equal(x, y) for pair, other in zip(pairs, again, strict=True) for x, y in zip(pair, other, strict=True)
    )


def test_calibration_refuses(folder: Path, tmp_path: Path) -> None:
    for i in (7, 8):
        (folder / "set" / "a" / f"{i}.png").unlink()
        (folder / "set" / "b" / f"{i}.png").unlink()
    with pytest.raises(InputError, match=r"has 7 pairs; calibration needs 8 or more"):
        read_pairs(folder)
    with pytest.raises(InputError, match=r"no such folder"):
        read_pairs(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no folder there has sub-folders 'a' and 'b' with images"):
        read_pairs(tmp_path / "empty")
    for i in (7, 8):
        (folder / "set" / "a" / f"{i}.png").write_bytes(b"not a picture")
        write_image(folder / "set" / "b" / f"{i}.png", np.zeros((40, 300), np.uint8))
    with pytest.raises(InputError, match=r"7.png: not an image"):
        read_pairs(folder)


# Quantisation


def test_weights_by_output_channel() -> None:
    weight = np.array([[1.0, -2.0], [0.0, 0.0], [300.0, 3.0]], np.float32)[:, :, None, None]
    values, scales = quantise_weight(weight)
    assert values.dtype == np.int8 and values[:, :, 0, 0].tolist() == [[64, -127], [0, 0], [127, 1]]
    np.testing.assert_allclose(scales, [2 / 127, 1, 300 / 127], rtol=1e-6)


def test_equalising_changes_ranges_and_not_the_function(net: nn.Module, pairs: list) -> None:
    network = deploy(net)
    ranges = [spread(network, second, pairs) for _, second in rescalable(network) if second.groups > 1]
    with torch.inference_mode():
        expected = [network(a, b) for a, b in pairs]
        equalise(network, pairs)
        for (a, b), before in zip(pairs, expected, strict=True):
            torch.testing.assert_close(network(a, b), before, rtol=0, atol=5e-6)
    after = [spread(network, second, pairs) for _, second in rescalable(network) if second.groups > 1]
    assert ranges == [] or (max(ranges) > 2 and max(after) < 1.01)  # lite: its depthwise layers follow no linear one


def spread(network: nn.Module, conv: nn.Conv2d, pairs: list) -> float:
    """Largest range of a channel of a convolution's input by the smallest."""
    seen: list[torch.Tensor] = []
    hook = conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].abs().amax((0, 2, 3))))
    with torch.inference_mode():
        for a, b in pairs:
            network(a, b)
    hook.remove()
    largest = torch.stack(seen).amax(0)
    return float(largest.max() / largest.min())


def test_candidates() -> None:
    network = deploy(FusionNet())
    units = quantizable(network)
    convolutions = {name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    assert convolutions - set(names_of(network)) == {name for name in convolutions if name.endswith(".centre")}
    shared = [name for name in names_of(network) if name.startswith("decoder.0.attention.qkv")]
    assert units["decoder.0.attention.qkv.point"] == [name for name in shared if name.endswith("point")]
    assert len(names_of(network)) == len(set(names_of(network))) == 92
    lite = deploy(LiteNet())
    assert not [name for name in names_of(lite) if "context" in name] and len(names_of(lite)) > 15


def test_choice_takes_the_most_work_that_keeps_the_floor(net: nn.Module, pairs: list) -> None:
    network = deploy(net)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    limits = input_limits(network, names_of(network), pairs)
    all_of_it = choose(network, limits, pairs, 1.0)
    assert all_of_it.count == len(all_of_it.units) and all_of_it.work == pytest.approx(1)
    floor = all_of_it.psnr + 3
    choice = choose(network, limits, pairs, floor)
    assert 0 < choice.count < len(choice.units) and choice.psnr >= floor

    def reached(count: int) -> float:
        convolutions = [name for unit in choice.units[:count] for name in unit.convolutions]
        with simulated(network, limits, convolutions), torch.inference_mode():
            results = [network(a, b) for a, b in pairs]
        with torch.inference_mode():
            return psnr(results, [network(a, b) for a, b in pairs])

    assert reached(choice.count) == pytest.approx(choice.psnr, abs=1e-3)
    assert reached(choice.count + 1) < floor
    assert (
        choice.text().count("int8") == choice.count + 1
        and choice.text().count("float\n") == len(choice.units) - choice.count
    )
    with pytest.raises(InputError, match=r"no layer keeps 500 dB in INT8; give a lower --int8-floor"):
        choose(network, limits, pairs, 500)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    "remainder",
    ["fp32", pytest.param("fp16", marks=pytest.mark.skipif(not ROUNDS_FLOAT16, reason="ONNX Runtime before 1.30"))],
)
def test_graph_computes_what_was_simulated(net: nn.Module, pairs: list, remainder: str, tmp_path: Path) -> None:
    half = remainder == "fp16"
    network = deploy(net)
    limits = input_limits(network, names_of(network), pairs)
    model = trace(deploy(net, half=half), Graph("int8", (48, 48), int8=Int8(remainder=remainder)))
    assert insert_quantisation(model, limits, half=half) == len(limits)
    path = write_model(model, tmp_path / "int8.onnx", {})
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        exact = [network(a, b) for a, b in pairs]
        with simulated(network, limits, list(limits)):
            expected = [network(a, b) for a, b in pairs]
    fused = [torch.from_numpy(session.run(None, {"a": a.numpy(), "b": b.numpy()})[0]) for a, b in pairs]
    error = psnr(expected, exact)
    # Values on the edge between two integers fall to either side, so that the errors are alike and not equal.
    assert psnr(fused, exact) == pytest.approx(error, abs=1.5)
    assert psnr(fused, expected) > error + (1 if half else 3)


def test_graph_is_symmetric_and_typed(net: nn.Module) -> None:
    """As TensorRT wants it: zero points of 0, int8 weights by channel, one Q and DQ for all who read a tensor."""
    limits = dict.fromkeys(names_of(deploy(net)), 1.0)
    model = trace(deploy(net, half=True), Graph("int8", (48, 48)))
    insert_quantisation(model, limits, half=True)
    onnx.checker.check_model(model, full_check=True)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    quantised = [node for node in model.graph.node if node.op_type == "Conv" and node.input[1] in producers]
    assert len(quantised) == len(limits)
    for node in quantised:
        weight, source = producers[node.input[1]], producers[node.input[0]]
        assert weight.op_type == source.op_type == "DequantizeLinear"
        values, scales, zeros = (constants[name] for name in weight.input)
        assert values.dtype == np.int8 and values.min() >= -127 and scales.shape == zeros.shape == values.shape[:1]
        assert scales.dtype == np.float16 and not zeros.any()
        assert constants[source.input[1]].dtype == np.float16 and constants[source.input[2]] == 0
        quantiser = producers[source.input[0]]
        assert quantiser.op_type == "QuantizeLinear" and quantiser.input[1:] == source.input[1:]
    sources = [node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(sources) == len(set(sources))
    assert not [name for name in constants if not any(name in node.input for node in model.graph.node)]


# Float16


@pytest.mark.slow
def test_islands_of_the_full_network() -> None:
    worth = measure_islands(FusionNet.from_pretrained("ivif"), generated_pairs(1))
    assert next(iter(worth)) == "all islands" and list(worth)[-1] == "no island" and len(worth) == 6
    assert worth["all islands"] > 60
    assert not worth["all but sums over H*W"] > 40  # 480x640 pixels: they pass float16's 65,504


def test_islands_of_the_lite_network(pairs: list) -> None:
    worth = measure_islands(LiteNet.from_pretrained("ivif-lite"), pairs[:1])
    assert worth["all islands"] > 60
    assert math.isnan(worth["all but output"])  # a floor of 1e-12 is 0 in float16
