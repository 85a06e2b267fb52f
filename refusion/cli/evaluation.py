"""`refusion eval`: metrics of fused pictures and of models."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from refusion.cli.parsing import Subparsers, need
from runtime.errors import InputError
from runtime.tasks import TASKS

if TYPE_CHECKING:
    from runtime import Fuser


def add_eval_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "eval",
        help="metrics of fused pictures against their sources",
        description="Metrics of fused pictures against their sources: of folders (A B FUSED [FUSED ...], matched by "
        "stem) or of models that fuse every pair below a folder (--data DIR --model M [--model M2 ...]). Several "
        "are shown side by side, with their ratios to the last.",
    )
    parser.set_defaults(run=run_eval)
    parser.add_argument(
        "paths", nargs="*", metavar="A B FUSED", help="folders or files of the sources and of the fused pictures"
    )
    parser.add_argument("--data", metavar="DIR", help="folder with sub-folders a and b, or with such folders below it")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="M",
        help="task, .onnx file, or weights (.safetensors, the authors' .pth; need the extra 'export') to fuse with; "
        "with --task, lite is the task's lite model",
    )
    parser.add_argument("--task", choices=tuple(TASKS), help="the same as --model with the task's embedded model")
    parser.add_argument(
        "--convention", default="tdfusion", help="whose definitions: cddfuse, tdfusion or matlab (default: %(default)s)"
    )
    parser.add_argument(
        "--metrics", metavar="NAMES", help="of EN,SD,SF,AG,MI,SCD,VIF,Qabf,SSIM, with commas between (default: all)"
    )
    parser.add_argument("--csv", metavar="FILE", help="write a line for each picture")
    parser.add_argument("--json", metavar="FILE", help="write every number and the means")
    parser.add_argument("--pictures", metavar="DIR", help="write pictures of each model's best and worst pair")
    parser.add_argument(
        "--rank-by", metavar="NAME", help="metric of --pictures (default: Qabf if there, else the first)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most N pairs of each source folder, spread evenly")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out bad or unmatched files with a warning")


def run_eval(args: argparse.Namespace) -> None:
    from refusion import evaluate
    from refusion.metrics import METRICS, check_names

    metrics = tuple(args.metrics.split(",")) if args.metrics else METRICS
    check_names(metrics, args.convention)  # before models are loaded
    names = ([args.task] if args.task else []) + [_embedded(args.task, name) for name in args.model]
    if args.data and names and not args.paths:
        models = dict(zip(evaluate.short_names(names), (_any_fuser(name, args.threads) for name in names), strict=True))
        scenes = evaluate.find_scenes(args.data, models, args.limit, skip_bad=args.skip_bad)
    elif len(args.paths) >= 3 and not args.data and not names:
        a, b, *fused = args.paths
        scenes = evaluate.match_fused(a, b, fused, args.limit, skip_bad=args.skip_bad)
    else:
        raise InputError("give either A B FUSED, or --data DIR and --model M (see refusion eval --help)")
    keep = None
    if args.pictures:
        keep = evaluate.BestAndWorst(args.rank_by or ("Qabf" if "Qabf" in metrics else metrics[0]))
    table = evaluate.evaluate_pairs(
        scenes, args.convention, metrics, skip_bad=args.skip_bad, progress=True, best_and_worst=keep
    )
    print(table.text())
    if args.csv:
        table.write_csv(args.csv)
    if args.json:
        table.write_json(args.json)
    for file in keep.write(args.pictures) if keep else ():
        print(file)


def _embedded(task: str | None, name: str) -> str:
    """ "lite" beside a task is that task's lite model; any other name stands for itself."""
    return f"{task}-lite" if task and name == "lite" else name


def _any_fuser(model: str, threads: int | None) -> Fuser:
    """Fuser of a task, an .onnx file, or weights, which become an ONNX model first so that all run the same way."""
    from runtime import Fuser

    if not model.endswith((".safetensors", ".pth")):
        return Fuser(model, threads=threads)
    need("onnxscript", "export", f"evaluating the weights {model}")
    from export.onnx import export_weights

    with tempfile.TemporaryDirectory() as folder:
        return Fuser(export_weights(model, Path(folder) / "model.onnx"), threads=threads)
