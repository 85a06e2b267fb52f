"""Weights -> ONNX model -> engine. The precision is in the ONNX model, typed; engines are built as it says.

python -m export.build --task ivif --precision fp32 fp16 int8 --size 480 640
python -m export.build --checkpoint ivif-fp16-480x640.onnx --format engine     # on the machine that is to run it
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export.arguments import BUILD, Parser, add_build_arguments
from export.options import DEFAULT_SIZE, FORMATS, Engine, Graph, Int8, Size
from runtime.errors import InputError, exit_code

if TYPE_CHECKING:
    from torch import nn

    from refusion.lite import LiteNet
    from refusion.model import FusionNet

REPOSITORY = "model_repository"  # the default folder of models for a server
SWEEP_PAIRS, SWEEP_CROP = 8, 96  # what the layers' sensitivity is measured on

log = logging.getLogger("refusion")


def build(
    checkpoint: str | Path = "ivif",
    out: str | Path | None = None,
    precision: str = "fp16",
    size: Size = DEFAULT_SIZE,
    *,
    form: str = "onnx",
    task: str = "",
    batch: int = 1,
    io: str = "luma",
    range: str = "stretch",
    opset: int | None = None,
    int8: Int8 | None = None,
    engine: Engine | None = None,
    force: bool = False,
) -> Path:
    """Make a model file of weights. It is not compared with anything yet: that is `export.verify`.

    Args:
        checkpoint: shipped weights by name ("ivif", "ivif-lite"), a .safetensors or .pth file, or a finished .onnx.
        out: file or folder; None is the current folder.
        precision: "fp32", "fp16" or "int8".
        size: (H, W) in pixels, 0 for a side that stays free.
        form: one of FORMATS.
        task: what the weights are for, where their file doesn't say.
        batch: pairs in a call, 0 to leave it free.
        io: "luma": (N, 1, H, W) float32 in [0, 1] in and out; "bgr": (N, H, W, 3) uint8, the whole picture.
        range: "stretch" or "keep", of io "bgr".
        opset: None for the oldest that can hold the model.
        int8: calibration, and what becomes INT8.
        engine: options of an engine.
        force: replace what is there.

    Returns:
        The ONNX model, the engine, or the model's folder in a repository.

    Raises:
        InputError: an option that can't be met, missing or foreign weights, calibration pictures that are missing or
            too few, an existing file, a full disk; and for an engine no GPU or TensorRT.
    """
    graph = Graph(precision, size, batch, io, range, opset, int8 or Int8())
    engine = engine or Engine()
    if Path(checkpoint).suffix == ".onnx":
        return convert(Path(checkpoint), form, engine, out, force=force)
    graph.check()
    check_engine_options(graph, form, engine)
    with tempfile.TemporaryDirectory(prefix="refusion-") as folder:
        # A repository has a copy of its own.
        path = place(folder if form == "triton-repository" else out, graph.file_name(stem(checkpoint)))
        check_free(path, force)
        return convert(make_onnx(checkpoint, path, graph, task=task), form, engine, out, force=force)


def stem(checkpoint: str | Path) -> str:
    """What a model of these weights is called."""
    return Path(checkpoint).stem


def place(out: str | Path | None, name: str) -> Path:
    """A file: `out` where that names one, with the suffix of `name`, else `name` in that folder."""
    out, suffix = Path(out or "."), Path(name).suffix
    if out.suffix in (".onnx", ".engine") and not out.is_dir():
        return out.with_suffix(suffix)
    return out / name


def check_free(path: Path, force: bool) -> None:
    """Raise InputError where a file would be replaced without being asked to."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file or another folder")
    if path.exists() and not force:
        raise InputError(f"{path} is there already; --force replaces it, --out puts the new one elsewhere")


def check_engine_options(graph: Graph, form: str, engine: Engine) -> None:
    """Raise InputError before a minute is spent on the graph, where no such engine can be made of it."""
    if form not in FORMATS:
        raise InputError(f"unknown format '{form}'; choose from {', '.join(FORMATS)}")
    if form in ("onnx", "triton-repository"):
        return
    from export.profile import Model, TensorInfo, profile

    height, width = (side or None for side in graph.size)
    shape = (graph.batch or None, *((height, width, 3) if graph.io == "bgr" else (1, height, width)))
    tensors = {name: TensorInfo("", shape) for name in ("a", "b", "fused")}
    model = Model(Path(graph.file_name("the model")), b"", {"io": graph.io}, tensors)
    profile(model, (engine.min_size, engine.opt_size, engine.max_size), _batches(model.inputs["a"][0], engine))
    if form == "rtx-engine" and not engine.compute_capabilities:
        raise InputError("an rtx-engine is built for named GPUs: give --compute-capability, as in 8.6 8.9 12.0")


def _batches(fixed: int | None, engine: Engine) -> tuple[int, int, int]:
    return (1, 1, engine.max_batch) if fixed is None else (1, 1, 1)


def make_onnx(
    checkpoint: str | Path,
    path: Path,
    graph: Graph,
    *,
    task: str = "",
    sensitivity: Callable[[str], None] | None = None,
) -> Path:
    """Write the ONNX model of weights.

    Args:
        checkpoint, task: as for `build`.
        path: the .onnx file.
        graph: what it is like.
        sensitivity: is given the table of what each layer costs in INT8, or each float32 part is worth in fp16.
    """
    graph.check()
    from export.network import deploy
    from export.onnx import describe_graph, load, trace, write_model
    from export.picture import PictureNet
    from export.precision import insert_quantisation

    net, metadata = load(checkpoint, task)
    network = deploy(net, half=graph.half)
    limits: dict[str, float] = {}
    if graph.precision == "int8":
        equalised, limits, stated = _choose_int8(net, metadata.get("task", ""), graph.int8, sensitivity)
        network.load_state_dict(equalised.state_dict())
        metadata = {**metadata, **stated}
    elif sensitivity and graph.half:
        sensitivity(_island_table(net))
    if graph.io == "bgr":
        network = PictureNet(network, stretch=graph.range == "stretch")
        limits = {f"network.{name}": limit for name, limit in limits.items()}
    model = trace(network, graph)
    if limits:
        insert_quantisation(model, limits, half=graph.half)
    return write_model(model, path, {**metadata, **describe_graph(graph)})


def _choose_int8(
    net: FusionNet | LiteNet, task: str, int8: Int8, sensitivity: Callable[[str], None] | None
) -> tuple[nn.Module, dict[str, float], dict[str, str]]:
    """The float32 network as INT8 wants it, limits of the inputs of what becomes INT8, and what the metadata say."""
    from export.calibrate import CROP, crop, generated_pairs, input_limits, read_pairs
    from export.network import deploy, quantizable
    from export.precision import choose, equalise

    if int8.calibration is not None:
        pairs = read_pairs(int8.calibration, skip_bad=int8.skip_bad)
        source = f"{len(pairs)} pairs of {int8.calibration.resolve().name}"
    elif task == "ivif":
        pairs, source = crop(generated_pairs(), CROP), "generated scenes"
        log.warning("calibrating on generated night scenes; give --calibration DIR with pairs like those to come")
    else:
        raise InputError("INT8 needs pictures of the task: give --calibration DIR, with sub-folders a and b")
    network = deploy(net)
    names = [name for unit in quantizable(network).values() for name in unit]
    equalise(network, pairs)
    limits = input_limits(network, names, pairs, int8.method)
    choice = choose(network, limits, crop(_spread(pairs), SWEEP_CROP), int8.floor)
    if sensitivity:
        sensitivity(choice.text())
    stated = {
        "calibration": f"{source}, {int8.method}",
        "int8_convolutions": f"{len(choice.convolutions)} of {len(names)}",
        "int8_work": f"{100 * choice.work:.0f} %",  # of their multiplications
        "int8_remainder": int8.remainder,
    }
    return network, {name: limits[name] for name in choice.convolutions}, stated


def _island_table(net: FusionNet | LiteNet) -> str:
    from export.calibrate import generated_pairs
    from export.precision import measure_islands
    from export.table import aligned

    # Whole pictures: what overflows are sums over them.
    worth = measure_islands(net, generated_pairs(2))
    return aligned([["float16 with", "PSNR, dB"], *([name, f"{psnr:.1f}"] for name, psnr in worth.items())])


def _spread(pairs: list) -> list:
    return [pairs[i * len(pairs) // SWEEP_PAIRS] for i in range(SWEEP_PAIRS)]


def convert(
    model: Path, form: str, engine: Engine, out: str | Path | None = None, *, name: str = "", force: bool = False
) -> Path:
    """Make an engine or a server's model of an ONNX model.

    Args:
        model: .onnx, or for "triton-repository" also .engine.
        form: one of FORMATS; "auto" says why it leaves the ONNX model where no engine can be built.
        engine: its options.
        out: file or folder; None puts an engine beside the model.
        name: of a server's model; "" takes the file's.
        force: build anew what is there.

    Raises:
        InputError: as for `build`.
    """
    if form == "onnx":
        return model
    if form == "triton-repository":
        from export.triton_repository import write_repository

        return write_repository(model, Path(out or REPOSITORY), name=name, max_batch=engine.max_batch, force=force)
    from export.engine import build_engine, build_rtx_engine, require_builder
    from export.profile import read_model

    path = place(out or model.parent, f"{model.stem}.engine")
    sizes = {"min_size": engine.min_size, "opt_size": engine.opt_size, "max_size": engine.max_size}
    batch = _batches(read_model(model).inputs["a"][0], engine)
    command = engine.command(model, path, form)
    if form == "rtx-engine":
        check_free(path, force)
        capabilities = engine.compute_capabilities
        return build_rtx_engine(
            model, path, **sizes, batch=batch, compute_capabilities=capabilities, rebuild_command=command
        )
    try:
        require_builder(engine.device)
    except InputError as error:
        if form == "engine":
            raise
        log.warning("%s is the result, without an engine: %s", model, error)
        return model
    return build_engine(
        model,
        path,
        **sizes,
        batch=batch,
        workspace_gb=engine.workspace_gb,
        optimization_level=engine.optimization_level,
        timing_cache=engine.timing_cache,
        version_compatible=engine.version_compatible,
        hardware_compatible=engine.hardware_compatible or False,
        device=engine.device,
        rebuild_command=command,
        force=force,
    )


def main(argv: Sequence[str] | None = None) -> int:
    from export.build_command import run

    logging.basicConfig(format="refusion: %(message)s", level=logging.WARNING)
    parser = Parser(prog="export.build", description=BUILD)
    add_build_arguments(parser)
    return exit_code(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
