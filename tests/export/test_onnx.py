"""The exported model: equal to PyTorch at any size, readable by old runtimes, reproducible."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from export.onnx import IR_VERSION, OPSET, export_onnx, export_weights, main
from refusion.model import FusionNet
from refusion.weights import shipped_weights
from runtime.errors import InputError
from runtime.model_files import MODELS


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[FusionNet, Path]:
    torch.manual_seed(0)
    net = FusionNet().eval()
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    return net, export_onnx(net, path, {"task": "ivif", "input_order": "a = infrared, b = visible"})


@pytest.fixture(scope="module")
def session(exported: tuple[FusionNet, Path]) -> ort.InferenceSession:
    return ort.InferenceSession(str(exported[1]), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 7), (1, 7, 13), (3, 33, 47), (1, 331, 585)])
def test_equals_pytorch_at_any_size(
    exported: tuple[FusionNet, Path], session: ort.InferenceSession, shape: tuple[int, int, int]
) -> None:
    n, height, width = shape
    a, b = torch.rand(2, n, 1, height, width)
    with torch.inference_mode():
        expected = exported[0](a, b).numpy()
    fused = session.run(["fused"], {"a": a.numpy(), "b": b.numpy()})[0]
    assert fused.shape == (n, 1, height, width)
    np.testing.assert_allclose(fused, expected, rtol=0, atol=2e-5)


def test_versions_metadata_and_no_traces(exported: tuple[FusionNet, Path]) -> None:
    model = onnx.load(exported[1])
    assert model.ir_version <= IR_VERSION
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["task"] == "ivif" and metadata["format_version"] == "1" and metadata["opset"] == str(OPSET)
    content = exported[1].read_bytes()
    assert str(Path(__file__).resolve().parents[2]).encode() not in content
    assert len(content) < 400_000
    assert list(exported[1].parent.iterdir()) == [exported[1]]


@pytest.mark.parametrize("task", shipped_weights())
def test_embedded_model_is_the_export_of_the_shipped_weights(task: str, tmp_path: Path) -> None:
    """Same graph and weights; names and order of initializers may differ between exporter versions."""
    rebuilt, embedded = onnx.load(export_weights(task, tmp_path / "rebuilt.onnx")), onnx.load(MODELS / f"{task}.onnx")
    assert [node.op_type for node in rebuilt.graph.node] == [node.op_type for node in embedded.graph.node]
    weights = [
        sorted((tuple(t.dims), onnx.numpy_helper.to_array(t).tobytes()) for t in model.graph.initializer)
        for model in (rebuilt, embedded)
    ]
    assert weights[0] == weights[1]
    assert {e.key: e.value for e in rebuilt.metadata_props} == {e.key: e.value for e in embedded.metadata_props}


def test_command_refuses_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["absent.safetensors", "-o", str(tmp_path / "x.onnx")]) == 2
    assert capfd.readouterr().err == "refusion: absent.safetensors: no such weights file\n"
    assert os.listdir(tmp_path) == []
    with pytest.raises(InputError, match="no weights 'mif2'"):
        export_weights("mif2", tmp_path / "x.onnx")
