"""The exported graph: equal to PyTorch at any size, in both float types, readable by old runtimes, reproducible."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from export.network import ISLANDS, deploy
from export.onnx import ANY_SIZE, IR_VERSION, describe_graph, export_weights, load, trace, write_model
from export.options import OPSETS, Graph
from export.picture import PictureNet
from refusion.lite import LiteNet
from refusion.model import FusionNet
from refusion.weights import shipped_weights
from runtime import Fuser
from runtime.errors import InputError
from runtime.model_files import MODELS
from runtime.scenes import night_road

ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Pow", "MatMul", "Conv", "Concat", "Where", "Clip", "Max", "Min"}


def random_net(kind: type[nn.Module]) -> nn.Module:
    """Random weights; the lite network's head too, whose zeros would make its maps constant."""
    torch.manual_seed(0)
    net = kind().eval()
    if isinstance(net, LiteNet):
        nn.init.normal_(net.head.weight, std=0.5)
    return net


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path_or_session: Path | ort.InferenceSession, a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> np.ndarray:
    loaded = session(path_or_session) if isinstance(path_or_session, Path) else path_or_session
    return loaded.run(["fused"], {"a": np.asarray(a), "b": np.asarray(b)})[0]


def psnr(x: np.ndarray, y: np.ndarray) -> float:
    return -10 * math.log10(float(np.square(x - y, dtype=np.float64).mean()) + 1e-30)


@pytest.fixture(scope="module", params=[pytest.param(FusionNet, marks=pytest.mark.slow), LiteNet], ids=["full", "lite"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    return random_net(request.param)


@pytest.fixture(scope="module")
def any_size(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    return write_model(trace(deploy(network), ANY_SIZE), path, {"task": "ivif", **describe_graph(ANY_SIZE)})


@pytest.mark.slow
def test_equals_pytorch_at_any_size(network: nn.Module, any_size: Path) -> None:
    loaded, double = session(any_size), copy.deepcopy(network).double()
    for n, height, width in [(1, 1, 1), (1, 1, 7), (2, 7, 13), (3, 33, 47), (1, 331, 585)]:
        torch.manual_seed(height)
        a, b = torch.rand(2, n, 1, height, width)
        with torch.inference_mode():
            exact = double(a.double(), b.double()).numpy()
        fused = run(loaded, a, b)
        assert fused.shape == (n, 1, height, width)
        np.testing.assert_allclose(fused, exact, rtol=0, atol=4e-5)  # PyTorch's float32 is up to 5e-5 from it


@pytest.mark.slow
def test_equals_pytorch_on_large_pictures() -> None:
    """The embedded model, on a scene: 480x640 and 1080x1920."""
    net, loaded = FusionNet.from_pretrained("ivif"), session(MODELS / "ivif.onnx")
    for size in [(480, 640), (1080, 1920)]:
        infrared, visible = night_road(size=size)
        a, b = (torch.from_numpy(x.astype(np.float32) / 255)[None, None] for x in (infrared, visible[..., 1]))
        with torch.inference_mode():
            expected = net(a, b).numpy()
        np.testing.assert_allclose(run(loaded, a, b), expected, rtol=0, atol=5e-5)


@pytest.mark.slow
def test_versions_metadata_and_no_traces(any_size: Path) -> None:
    model = onnx.load(any_size)
    assert model.ir_version <= IR_VERSION
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    expected = {"task": "ivif", "format_version": "1", "opset": "18", "precision": "fp32", "size": "dynamic"}
    assert metadata == {**expected, "batch": "dynamic", "io": "luma"}
    content = any_size.read_bytes()
    assert str(Path(__file__).resolve().parents[2]).encode() not in content
    assert len(content) < 400_000
    assert list(any_size.parent.iterdir()) == [any_size]


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_weights())
def test_embedded_model_is_the_export_of_the_shipped_weights(name: str, tmp_path: Path) -> None:
    """Same graph and weights; names and order of initializers may differ between exporter versions."""
    rebuilt, embedded = onnx.load(export_weights(name, tmp_path / "rebuilt.onnx")), onnx.load(MODELS / f"{name}.onnx")
    assert same_graph(rebuilt, embedded)
    assert {e.key: e.value for e in rebuilt.metadata_props} == {e.key: e.value for e in embedded.metadata_props}


def same_graph(*models: onnx.ModelProto) -> bool:
    nodes = [[node.op_type for node in model.graph.node] for model in models]
    weights = [
        sorted((tuple(t.dims), onnx.numpy_helper.to_array(t).tobytes()) for t in model.graph.initializer)
        for model in models
    ]
    return nodes[0] == nodes[1] and weights[0] == weights[1]


@pytest.fixture(scope="module")
def half(network: nn.Module) -> onnx.ModelProto:
    return trace(deploy(network, half=True), Graph("fp16", size=(48, 64)))


def test_float16_is_close_and_takes_float32(network: nn.Module, half: onnx.ModelProto, tmp_path: Path) -> None:
    a, b = torch.rand(2, 1, 1, 48, 64)
    with torch.inference_mode():
        expected = network(a, b).numpy()
    fused = run(write_model(half, tmp_path / "half.onnx", {}), a, b)
    assert fused.dtype == np.float32
    assert 60 < psnr(fused, expected) < 130  # close, and not float32 in disguise


def test_float16_weights_are_half_as_large_and_types_never_mix(half: onnx.ModelProto) -> None:
    """Engines are strongly typed: an elementwise operation of two types would be refused."""
    inferred = onnx.shape_inference.infer_shapes(half, check_type=True, strict_mode=True, data_prop=True)
    graph = inferred.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    counts = {onnx.TensorProto.FLOAT16: 0, onnx.TensorProto.FLOAT: 0}
    for node in graph.node:
        if node.op_type in ELEMENTWISE:
            inputs = node.input[1:] if node.op_type == "Where" else node.input
            kinds = {types[name] for name in inputs if name}
            assert len(kinds) == 1, f"{node.op_type} of {kinds}"
            counts[kinds.pop()] = counts.get(types[node.output[0]], 0) + 1
    assert counts[onnx.TensorProto.FLOAT16] > 20 and counts[onnx.TensorProto.FLOAT] > 5
    convolutions = [types[node.input[1]] for node in graph.node if node.op_type == "Conv"]
    wide = convolutions.count(onnx.TensorProto.FLOAT)
    assert wide <= 3 and len(convolutions) > 15  # the lite network's blur, of its sources, is float32


def test_half_islands_hold_where_float16_would_overflow() -> None:
    """Sums over H*W of features: with inputs of full scale they pass float16's 65,504."""
    torch.manual_seed(0)
    net = FusionNet().eval()
    for stem in (net.stem1, net.stem2):
        stem.weight.data *= 30
    for block in net.encoder1:
        block.attention.qkv.weight.data *= 20  # type: ignore[union-attr, operator]
    a, b = torch.rand(2, 1, 1, 64, 64)
    with torch.inference_mode():
        expected = net(a, b)
        kept = deploy(net, half=True)(a, b)
        lost = deploy(net, half=True, islands=[i for i in ISLANDS["FusionNet"] if i != "sums over H*W"])(a, b)
    assert psnr(kept.numpy(), expected.numpy()) > 50
    assert not lost.isfinite().all() or psnr(lost.numpy(), expected.numpy()) < 45


@pytest.mark.slow
@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_that_is_offered_is_written_and_runs(opset: int, tmp_path: Path) -> None:
    net = random_net(LiteNet)
    graph = Graph("fp16", size=(24, 32), opset=opset)
    path = write_model(trace(deploy(net, half=True), graph), tmp_path / "net.onnx", {})
    assert [entry.version for entry in onnx.load(path).opset_import] == [opset]
    a, b = torch.rand(2, 1, 1, 24, 32)
    with torch.inference_mode():
        assert psnr(run(path, a, b), net(a, b).numpy()) > 60


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stretch", "keep"])
def test_whole_picture_equals_the_fuser(policy: str, tmp_path: Path) -> None:
    net, metadata = load("ivif")
    graph = Graph("fp32", size=(0, 0), batch=0, io="bgr", range=policy)
    model = trace(PictureNet(deploy(net), stretch=policy == "stretch"), graph)
    path = write_model(model, tmp_path / "bgr.onnx", {**metadata, **describe_graph(graph)})
    loaded, fuser, built_in = session(path), Fuser("ivif", range=policy), Fuser(path, range=policy)
    assert onnx.load(path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    rng = np.random.default_rng(0)
    infrared, visible = night_road(size=(64, 80))
    noise = rng.integers(0, 256, (2, 33, 47, 3), dtype=np.uint8)
    flat = np.full((9, 11, 3), 90, np.uint8)
    for a, b in [(infrared, visible), (visible, infrared), noise, (flat, flat), (infrared, visible[..., 1])]:
        expected = colour(fuser(a, b))
        batch = [np.stack([colour(x)] * 2) for x in (a, b)]
        for fused in (*run(loaded, *batch), colour(built_in(a, b))):
            assert np.abs(fused.astype(int) - expected).max() <= 1


def colour(image: np.ndarray) -> np.ndarray:
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image


def test_metadata_of_weights_of_another_task(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="for task ivif, not mif; leave --task out"):
        load("ivif", "mif")
    assert replace(Graph(), size=(480, 0)).file_name("x") == "x-fp16-480xany.onnx"
    assert describe_graph(Graph("int8", (480, 0), 4, "bgr", "keep")) == {
        "size": "480xdynamic",
        "batch": "4",
        "io": "bgr",
        "precision": "int8",
        "range": "keep",
        "chroma": "auto",
    }
