"""`refusion fuse` and `refusion demo`: pictures from files, and from the generated scene."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from refusion.cli.parsing import Subparsers
from runtime.errors import InputError
from runtime.tasks import TASKS

if TYPE_CHECKING:
    from runtime import Fuser


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
        description="Render a night road as an infrared and a visible camera see it, fuse a still with the full "
        "network and a short clip with the lite one, and write pictures and video.",
    )
    parser.set_defaults(run=run_demo)
    parser.add_argument("-o", "--out", default="out/demo", help="folder (default: %(default)s)")
    _add_fuser_arguments(parser)


def run_demo(args: argparse.Namespace) -> None:
    from runtime.batch import fuse_clip, fuse_scene
    from runtime.scenes import SIZE

    fuser = _fuser(args, warm_size=SIZE)
    fused, panel, seconds = fuse_scene(fuser, args.out)
    height, width = SIZE
    print(f"sources and result in one: {panel}")
    live = _fuser(args, warm_size=SIZE, live=True)
    clip = Path(args.out) / "clip.mp4"
    frame_seconds = fuse_clip(live, clip)
    print(f"clip: {clip} ({1 / frame_seconds:.0f} frames/s, {width}x{height}, {_describe(live)})")
    print(f"fused picture: {fused} ({seconds:.2f} s a frame, {width}x{height}, {_describe(fuser)})")


def _add_fuser_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=tuple(TASKS), help="what is fused (default: ivif)")
    parser.add_argument(
        "--model",
        default="auto",
        metavar="auto|full|lite|PATH",
        help="which network: the full one, the small one for live pictures on a CPU, or an .onnx or .engine file; auto "
        "takes full for stills and on a GPU, lite for streams on a CPU (default: %(default)s)",
    )
    parser.add_argument(
        "--backend",
        default="auto",
        metavar="NAME",
        help="auto, onnxruntime, onnxruntime-cuda, onnxruntime-tensorrt, tensorrt or openvino (default: %(default)s)",
    )
    parser.add_argument(
        "--range",
        default="auto",
        metavar="auto|stretch|keep|smooth",
        help="stretch each picture to its own minimum and maximum (auto), keep the network's values, or stretch with "
        "limits smoothed from picture to picture (auto for video)",
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


def _fuser(args: argparse.Namespace, *, warm_size: tuple[int, int] | None = None, live: bool = False) -> Fuser:
    from runtime import Fuser

    fuser = Fuser(
        args.task or "ivif",
        model=args.model,
        backend=args.backend,
        live=live,
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
    threads = f"{fuser.threads} thread{'s' if fuser.threads > 1 else ''}, " if fuser.threads else ""
    return f"{threads}{fuser.choice}"
