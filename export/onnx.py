"""PyTorch module -> ONNX model: inputs a and b, output fused, sizes fixed or free, with metadata."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from torch import nn

from export.network import deploy
from export.options import Graph
from refusion.lite import LiteNet
from refusion.model import FusionNet
from refusion.weights import find_weights, load_network
from runtime.errors import InputError
from runtime.files import write_whole
from runtime.tasks import TASKS

IR_VERSION = 10
FORMAT_VERSION = "1"


def load(weights: str | Path, task: str = "") -> tuple[FusionNet | LiteNet, dict[str, str]]:
    """Network and metadata of weights by name ("ivif", "ivif-lite") or path (.safetensors, the authors' .pth).

    Args:
        weights: name or path.
        task: what they are for, where the file doesn't say, as the authors' don't.

    Raises:
        InputError: no such weights, or of another task.
    """
    net, metadata = load_network(weights)
    stated = metadata.get("task") or task
    if task and stated != task:
        raise InputError(f"the weights {weights} are for task {stated}, not {task}; leave --task out")
    if stated in TASKS:
        a, b = TASKS[stated]
        metadata = {"input_order": f"a = {a}, b = {b}", **metadata, "task": stated}
    digest = hashlib.sha256(find_weights(weights).read_bytes()).hexdigest()
    return net, {**metadata, "network": type(net).__name__, "weights_sha256": digest}


def trace(network: nn.Module, graph: Graph) -> onnx.ModelProto:
    """The graph of a module with forward(a, b) -> fused, without any INT8.

    Args:
        network: (N, 1, H, W) float32 in [0, 1] in and out, or for io "bgr" (N, H, W, 3) uint8.
        graph: its sizes, io and opset.

    Raises:
        InputError: the exporter of this PyTorch doesn't write the opset.
    """
    size, batch, io, opset = graph.size, graph.batch, graph.io, graph.written_opset
    axes = ("batch", "height", "width", "") if io == "bgr" else ("batch", "", "height", "width")
    fixed = {"batch": batch, "height": size[0], "width": size[1], "": 3 if io == "bgr" else 1}
    # A free axis is traced with a number that no other axis has.
    example = {"batch": 2, "height": 48, "width": 64}
    shape = [fixed[axis] or example[axis] for axis in axes]
    free = {i: torch.export.Dim(axis, min=1) for i, axis in enumerate(axes) if not fixed[axis]}
    dtype = torch.uint8 if io == "bgr" else torch.float32
    sources = (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))
    model = _export(network, sources, (free, free) if free else None, opset)
    written = next(entry.version for entry in model.opset_import if entry.domain == "")
    if written != opset:
        raise InputError(f"this PyTorch's exporter wrote opset {written} in place of {opset}; leave --opset out")
    model.ir_version = IR_VERSION
    _drop_traces(model)
    return model


def _export(network: nn.Module, sources: tuple[torch.Tensor, ...], dynamic: object, opset: int) -> onnx.ModelProto:
    # The exporter tells of its own internals on stdout, in warnings and in its log: none of it is for our users.
    logging.getLogger("torch.onnx._internal.exporter").setLevel(logging.ERROR)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category)
        program = torch.onnx.export(
            network,
            sources,
            dynamo=True,
            opset_version=opset,
            input_names=["a", "b"],
            output_names=["fused"],
            dynamic_shapes=dynamic,  # type: ignore[arg-type]
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


def write_model(model: onnx.ModelProto, path: Path, metadata: Mapping[str, str]) -> Path:
    """Check a model and write it with its metadata, whole or not at all.

    Raises:
        InputError: it can't be written, a full disk among the reasons.
    """
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    properties = {**metadata, "format_version": FORMAT_VERSION, "opset": str(opset)}
    onnx.helper.set_model_props(model, dict(sorted(properties.items())))
    onnx.checker.check_model(model, full_check=True)
    write_whole(path, model.SerializeToString(deterministic=True))
    return path


def describe_graph(graph: Graph) -> dict[str, str]:
    """The metadata that say what a model takes and is made of."""
    sides = [str(side) if side else "dynamic" for side in graph.size]
    described = {
        "size": "x".join(sides) if any(graph.size) else "dynamic",  # height, width
        "batch": str(graph.batch) if graph.batch else "dynamic",
        "io": graph.io,
        "precision": graph.precision,
    }
    return described | ({"range": graph.range, "chroma": "auto"} if graph.io == "bgr" else {})


#: What the embedded models are, and what weights become to be compared with others.
ANY_SIZE = Graph("fp32", size=(0, 0), batch=0)


def export_weights(weights: str | Path, path: Path) -> Path:
    """Weights by name or path -> float32 ONNX model of any size, as the embedded ones are.

    Raises InputError where there are no such weights, or the file can't be written.
    """
    net, metadata = load(weights)
    return write_model(trace(deploy(net), ANY_SIZE), path, {**metadata, **describe_graph(ANY_SIZE)})
