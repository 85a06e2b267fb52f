"""The command `refusion`: parses and calls. Exit codes: 0 done, 2 bad input or use, 1 anything else, 130 interrupted.

Each command is a pair of functions, `add_<name>_parser` and `run_<name>`, listed in `COMMANDS`. What a command needs
is imported when it runs, so that `--help` is instant and no command needs another's packages.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from refusion import __version__
from runtime.errors import InputError, exit_code
from runtime.tasks import TASKS

if TYPE_CHECKING:
    from runtime import Fuser

Subparsers = argparse._SubParsersAction


class _Parser(argparse.ArgumentParser):
    """Wrong use gives one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    logging.basicConfig(format="refusion: %(message)s", level=logging.WARNING)

    def command() -> None:
        args = _parser().parse_args(argv)
        args.run(args)

    return exit_code(command)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("refusion", description="Fuses aligned images of two sensors into one picture.")
    parser.add_argument("--version", action="version", version=f"refusion {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_parser in COMMANDS:
        add_parser(subparsers)
    return parser


def add_fuse_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "fuse",
        help="fuse two images, or two folders of images",
        description="Fuse two images, or the images of two folders that have the same names but for the suffix.",
    )
    parser.set_defaults(run=run_fuse)
    parser.add_argument("a", metavar="A", help="file or folder: infrared / CT, PET, SPECT / near focus / under-exposed")
    parser.add_argument("b", metavar="B", help="file or folder: visible / MRI / far focus / over-exposed")
    parser.add_argument("-o", "--out", required=True, help="fused picture (.png, .jpg, .tiff, ...), or a folder")
    _add_fuser_arguments(parser)
    parser.add_argument("--format", metavar="png|jpg|tiff", help="of the pictures (default: OUT's suffix, else png)")
    parser.add_argument("--side-by-side", action="store_true", help="also write a, b and fused as one picture")
    parser.add_argument("--skip-bad", action="store_true", help="leave out files that can't be fused, else refuse them")


def run_fuse(args: argparse.Namespace) -> None:
    from runtime.batch import fuse_files

    fuser = _fuser(args)
    start = time.perf_counter()
    options = {"image_format": args.format, "panels": args.side_by_side, "skip_bad": args.skip_bad}
    written = fuse_files(fuser, args.a, args.b, args.out, **options)
    seconds = (time.perf_counter() - start) / len(written)
    what = f"picture: {written[0]}" if len(written) == 1 else f"pictures: {len(written)} in {written[0].parent}"
    print(f"fused {what} ({seconds:.2f} s a pair, reading and writing included, {_describe(fuser)})")


def add_demo_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="fuse a generated scene, a night road in infrared and visible",
        description="Render a night road as an infrared and a visible camera see it, fuse both, write the pictures.",
    )
    parser.set_defaults(run=run_demo)
    parser.add_argument("-o", "--out", default="out/demo", help="folder (default: %(default)s)")
    _add_fuser_arguments(parser)


def run_demo(args: argparse.Namespace) -> None:
    from runtime.batch import fuse_scene
    from runtime.scenes import SIZE

    fuser = _fuser(args, warm_size=SIZE)
    fused, panel, seconds = fuse_scene(fuser, args.out)
    height, width = SIZE
    print(f"sources and result in one: {panel}")
    print(f"fused picture: {fused} ({seconds:.2f} s a frame, {width}x{height}, {_describe(fuser)})")


def _add_fuser_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=tuple(TASKS), help="what is fused (default: ivif)")
    parser.add_argument("--model", metavar="PATH", help="an .onnx model instead of the task's embedded one")
    parser.add_argument(
        "--range",
        default="stretch",
        metavar="stretch|keep|smooth",
        help="stretch each picture to its own minimum and maximum, keep the network's values, or stretch with limits "
        "smoothed from picture to picture (default: %(default)s)",
    )
    parser.add_argument(
        "--chroma",
        default="auto",
        metavar="auto|a|b|mix|official|none",
        help="whose colour: the coloured source's, or a mix where both are coloured (auto); a's; b's; the mix; the mix "
        "in the authors' own arithmetic; or a grey picture (default: %(default)s)",
    )
    parser.add_argument(
        "--tone",
        default="full",
        metavar="full|percentile|LOW:HIGH",
        help="what is black and white in 16-bit grey sources: 0:65535 (full), each image's percentiles 1 and 99, or "
        "fixed counts; raw 14-bit thermal frames need one of the last two, as in 0:16383 (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")


def _fuser(args: argparse.Namespace, warm_size: tuple[int, int] | None = None) -> Fuser:
    from runtime import Fuser

    fuser = Fuser(
        args.model or args.task or "ivif",
        threads=args.threads,
        range=args.range,
        chroma=args.chroma,
        tone=args.tone,
        warm_size=warm_size,
    )
    if args.task and fuser.task not in (None, args.task):
        raise InputError(f"model {args.model} is for task {fuser.task}, not {args.task}; leave --task out")
    return fuser


def _describe(fuser: Fuser) -> str:
    return f"{fuser.threads} thread{'s' if fuser.threads > 1 else ''}, model {fuser.model}"


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
        help="task, .onnx file, or weights (.safetensors, the authors' .pth; need the extra 'export') to fuse with",
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
    names = ([args.task] if args.task else []) + args.model
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


def _any_fuser(model: str, threads: int | None) -> Fuser:
    """Fuser of a task, an .onnx file, or weights, which become an ONNX model first so that all run the same way."""
    from runtime import Fuser

    if not model.endswith((".safetensors", ".pth")):
        return Fuser(model, threads=threads)
    _need("onnxscript", "export", f"evaluating the weights {model}")
    from export.onnx import export_weights

    with tempfile.TemporaryDirectory() as folder:
        return Fuser(export_weights(model, Path(folder) / "model.onnx"), threads=threads)


def add_train_parser(subparsers: Subparsers) -> None:
    from refusion.config import add_flags

    parser = subparsers.add_parser(
        "train",
        help="train a fusion network with the meta-learned loss",
        description="Train on folders of pairs. Defaults are the paper's recipe; --recipe takes the task's own.",
    )
    parser.set_defaults(run=run_train)
    add_flags(parser)


def run_train(args: argparse.Namespace) -> None:
    from refusion.config import from_flags

    config = from_flags(args)
    _need("torch", "train", "training")
    _need("tensorboard", "train", "training")
    from refusion.train import train

    logging.getLogger("refusion").setLevel(logging.INFO)
    train(config)


def _need(module: str, extra: str, purpose: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise InputError(f"{purpose} needs the package {module}: pip install 'refusion[{extra}]'")


COMMANDS: tuple[Callable[[Subparsers], None], ...] = (
    add_fuse_parser,
    add_demo_parser,
    add_eval_parser,
    add_train_parser,
)
