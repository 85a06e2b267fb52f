"""What `refusion export` does: build, verify, show a table, go on to an engine."""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.build import check_engine_options, check_free, convert, make_onnx, place, stem
from export.options import DEFAULT_SIZE, Engine, Graph, Int8
from export.table import aligned
from runtime.errors import InputError

if TYPE_CHECKING:
    from export.verify import Report
    from runtime.backends import Backend

# Mean PSNR in dB that a model must reach to be called verified. Of a picture there are 256 levels and the range is
# stretched, so that less is seen of the network's precision.
EXPECTED = {"luma": {"fp32": 90.0, "fp16": 55.0, "int8": 38.0}, "bgr": {"fp32": 60.0, "fp16": 50.0, "int8": 32.0}}
ROUNDS = 7  # of the latency
# What a finished ONNX model has already.
GRAPH_OPTIONS = ("precision", "size", "batch", "io", "range", "opset", "calibration", "task", "model")


def run(args: argparse.Namespace) -> None:
    """The command, its arguments parsed."""
    engine = _engine(args)
    suffix = Path(args.checkpoint or "").suffix
    if suffix == ".onnx" or (suffix == ".engine" and args.format == "triton-repository"):
        _convert_finished(args, engine)
        return
    _need_packages()
    checkpoint = _checkpoint(args)
    graphs = [_graph(args, precision) for precision in dict.fromkeys(args.precision or ["fp16"])]
    if len(graphs) > 1 and args.out is not None and args.out.suffix in (".onnx", ".engine"):
        raise InputError(f"several precisions make several files: give a folder in place of {args.out}")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="refusion-")))
        paths: dict[Path, Graph] = {}
        for graph in graphs:
            graph.check()
            check_engine_options(graph, args.format, engine)
            # A repository holds a copy of its own.
            out = scratch if args.format == "triton-repository" else args.out
            paths[place(out, graph.file_name(stem(checkpoint)))] = graph
        for path in paths:
            check_free(path, args.force)
        pairs = None
        if not args.no_verify:
            from export.verify import find_pairs

            pairs = find_pairs(args.data, args.limit, skip_bad=args.skip_bad)
        for path, graph in paths.items():
            print(f"building {path.name}", file=sys.stderr)
            make_onnx(checkpoint, path, graph, task=args.task or "", sensitivity=print if args.sensitivity else None)
        if pairs is not None:
            _verify(args, checkpoint, paths, pairs, scratch)
        for path in paths:
            _finish(args, path, engine)


def _need_packages() -> None:
    for package in ("torch", "safetensors", "onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"exporting weights needs the package {package}: pip install 'refusion[export]'")


def _checkpoint(args: argparse.Namespace) -> str:
    if args.checkpoint is None:
        return (args.task or "ivif") + ("-lite" if args.model == "lite" else "")
    if args.model is not None:
        raise InputError("the weights say which network they are of: leave --model out beside --checkpoint")
    return args.checkpoint


def _graph(args: argparse.Namespace, precision: str) -> Graph:
    int8 = Int8(args.calibration, args.calibration_method, args.int8_floor, args.int8_remainder, args.skip_bad)
    if args.calibration is not None and "int8" not in (args.precision or []) and not args.sensitivity:
        raise InputError("--calibration is for --precision int8, or for --sensitivity")
    size = tuple(args.size) if args.size else (0, 0) if args.format == "rtx-engine" else DEFAULT_SIZE
    batch = args.batch if args.batch is not None else 0 if args.format == "triton-repository" else 1
    return Graph(precision, (size[0], size[1]), batch, args.io or "luma", args.range or "stretch", args.opset, int8)


def _engine(args: argparse.Namespace) -> Engine:
    return Engine(
        min_size=args.min_size and (args.min_size[0], args.min_size[1]),
        opt_size=args.opt_size and (args.opt_size[0], args.opt_size[1]),
        max_size=args.max_size and (args.max_size[0], args.max_size[1]),
        max_batch=args.max_batch,
        workspace_gb=args.workspace,
        optimization_level=args.optimization_level,
        timing_cache=args.timing_cache,
        version_compatible=args.version_compatible,
        hardware_compatible=args.hardware_compatible or "",
        device=args.device,
        compute_capabilities=tuple(args.compute_capability or ()),
    )


def _convert_finished(args: argparse.Namespace, engine: Engine) -> None:
    given = [name for name in GRAPH_OPTIONS if getattr(args, name) is not None]
    if given:
        raise InputError(f"{args.checkpoint} is a finished model: leave --{given[0]} out, or give weights")
    if args.format == "onnx":
        raise InputError(f"{args.checkpoint} is an ONNX model already; give --format engine or another")
    if importlib.util.find_spec("onnx") is None:
        raise InputError("reading the model needs the package onnx: pip install onnx")
    _print_result(convert(Path(args.checkpoint), args.format, engine, args.out, force=args.force))


def _finish(args: argparse.Namespace, path: Path, engine: Engine) -> None:
    try:
        result = convert(path, args.format, engine, args.out, force=args.force)
    except InputError as error:
        if args.format != "engine":
            raise
        done = "written" if args.no_verify else "written and verified"
        out = place(args.out or path.parent, f"{path.stem}.engine").name
        command = engine.command(Path(path.name), Path(out), "engine")
        raise InputError(
            f"no engine: {error}. {path} is {done}; copy it to the machine that is to run it, and there: {command}"
        ) from error
    _print_result(result)


def _print_result(result: Path) -> None:
    print(result)
    if result.suffix == ".engine":
        print(f"compare it with float32, on the machine that runs it: refusion verify {result}")


def _verify(args: argparse.Namespace, checkpoint: str, paths: Mapping[Path, Graph], pairs: list, scratch: Path) -> None:
    """Compare the models with the reference, show the table, and end with code 1 where one is worse than EXPECTED."""
    from export.verify import check, load_model, load_reference, verify
    from refusion.allocator import keep_freed_memory

    keep_freed_memory()
    models = {str(path): load_model(path, "onnxruntime", args.threads) for path in paths}
    reports = verify(models, load_reference({}, checkpoint), pairs)
    first = next(iter(paths.values()))
    if "fp32" not in [graph.precision for graph in paths.values()]:  # for comparison of the speed
        baseline = make_onnx(checkpoint, scratch / "float32.onnx", replace(first, precision="fp32", opset=None))
        models = {"float32, not kept": load_model(baseline, "onnxruntime", args.threads), **models}
    size = tuple(side or usual for side, usual in zip(first.size, args.opt_size or DEFAULT_SIZE, strict=True))
    times = _latencies(models, (size[0], size[1]))
    print(_table(args, reports, times, (size[0], size[1])))
    check(reports, {str(path): EXPECTED[graph.io][graph.precision] for path, graph in paths.items()})


def _latencies(models: Mapping[str, Backend], size: tuple[int, int]) -> dict[str, list[float]]:
    """Milliseconds of each model on a pair of noise, in turn, so that a busy machine is busy for all of them."""
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS + 1):
        for name, model in models.items():
            batch = int(model.metadata["batch"]) if model.metadata["batch"].isdigit() else 1
            if model.metadata["io"] == "bgr":
                a, b = rng.integers(0, 256, (2, batch, *size, 3), dtype=np.uint8)
            else:
                a, b = rng.random((2, batch, 1, *size), dtype=np.float32)
            start = time.perf_counter()
            model.run(a, b)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: sorted(found[1:]) for name, found in times.items()}  # the first one warms up


def _table(
    args: argparse.Namespace, reports: list[Report], times: Mapping[str, list[float]], size: tuple[int, int]
) -> str:
    from export.verify import METRICS

    found = {report.model: report for report in reports}
    lines = [["model", "KB", "PSNR, dB", "worst, dB", *(f"{name}, %" for name in METRICS), "CPU, ms", "min - max"]]
    for name, values in times.items():
        report, numbers = found.get(name), ["", "", "", *["" for _ in METRICS]]
        if report is not None:
            changes = [f"{report.changes[m]:+.2f}" if m in report.changes else "-" for m in METRICS]
            kilobytes = f"{Path(name).stat().st_size / 1024:,.0f}"
            numbers = [kilobytes, f"{report.psnr:.1f}", f"{report.worst:.1f}", *changes]
        spread = f"{values[0]:.0f} - {values[-1]:.0f}"
        lines.append([Path(name).name, *numbers, f"{statistics.median(values):.0f}", spread])
    pictures = f"{len(reports[0].rows)} {'pairs of ' + str(args.data) if args.data else 'generated scenes'}"
    return (
        f"against float32 in PyTorch on {pictures}: PSNR (mean, worst), change of the fusion metrics' means;\n"
        f"latency of {size[1]}x{size[0]} in ONNX Runtime on the CPU, median of {ROUNDS}\n{aligned(lines)}"
    )
