"""FusionNet as an ONNX model: inputs a, b (N, 1, H, W) float32 in [0, 1], output fused, H and W free.

python -m export.onnx ivif -o runtime/models/ivif.onnx     # makes an embedded model from shipped weights
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import torch

from export.network import DeployedNet
from refusion.model import FusionNet
from refusion.weights import load_fusion_net
from runtime.errors import exit_code

OPSET = 18  # ONNX Runtime 1.23 (Python 3.10, JetPack 6) and TensorRT 10.3 read it
IR_VERSION = 10
FORMAT_VERSION = "1"


def export_onnx(net: FusionNet, path: Path, metadata: Mapping[str, str]) -> Path:
    """Write the network as an ONNX model with metadata, atomically; batch, height and width stay dynamic.

    The file is checked by onnx before it gets its name. Raises RuntimeError where the exporter gave another opset than
    asked for.
    """
    model = _trace(net)
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    if opset != OPSET:
        raise RuntimeError(f"the exporter wrote opset {opset}, expected {OPSET}")
    model.ir_version = IR_VERSION
    _drop_traces(model)
    onnx.helper.set_model_props(
        model,
        {"format_version": FORMAT_VERSION, "opset": str(OPSET), "precision": "fp32", "size": "dynamic", **metadata},
    )
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(model.SerializeToString(deterministic=True))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def export_weights(weights: str | Path, path: Path) -> Path:
    """Weights by task name or path (.safetensors, the authors' .pth) -> ONNX model, with the weights' metadata.

    Raises InputError where there are no such weights.
    """
    net, metadata = load_fusion_net(weights)
    return export_onnx(net, path, metadata)


def _trace(net: FusionNet) -> onnx.ModelProto:
    example = torch.rand(2, 2, 1, 48, 64).unbind()
    batch, height, width = (torch.export.Dim(name, min=1) for name in ("batch", "height", "width"))
    shape = {0: batch, 2: height, 3: width}
    # The exporter tells of its own internals on stdout, in warnings and in its log: none of it is for our users.
    logging.getLogger("torch.onnx._internal.exporter").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="# The axis name", category=UserWarning)
        program = torch.onnx.export(
            DeployedNet(net),
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=["a", "b"],
            output_names=["fused"],
            dynamic_shapes=(shape, shape),
            optimize=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _drop_traces(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes: they hold paths of the machine and are larger than the weights."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    del model.graph.metadata_props[:]
    model.graph.doc_string = ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="export.onnx", description="Write weights as an ONNX model.")
    parser.add_argument("weights", help="task name or file (.safetensors, the authors' .pth)")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the .onnx file")
    args = parser.parse_args(argv)
    return exit_code(lambda: print(export_weights(args.weights, args.out)))


if __name__ == "__main__":
    raise SystemExit(main())
