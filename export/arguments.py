"""The options of `refusion export` and `refusion verify`; imports nothing heavy, so that --help is instant."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from export.options import FLOOR, FORMATS, IOS, MAX_BATCH, METHODS, OPSETS, PRECISIONS, RANGES, REMAINDERS
from runtime.backends import BACKENDS
from runtime.errors import InputError
from runtime.tasks import TASKS

BUILD = (
    "Weights to an ONNX model, verified against the float32 network in PyTorch, and on a machine with a GPU to a "
    "TensorRT engine."
)
VERIFY = (
    "Compare models with the float32 network in PyTorch that they were made from, picture by picture: errors, PSNR, "
    "SSIM, and how much the fusion metrics change."
)


class Parser(argparse.ArgumentParser):
    """Wrong use gives one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=tuple(TASKS), help="whose shipped weights (default: ivif)")
    parser.add_argument("--model", choices=("full", "lite"), help="which of the task's networks (default: full)")
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="weights (.safetensors, the authors' .pth), or a finished .onnx to make an engine of, without PyTorch",
    )
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="file, or folder (default: here, by precision and size)"
    )
    parser.add_argument("--force", action="store_true", help="replace what is there")
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, help="one or several, for one table (default: fp16)"
    )
    _add_size(parser.add_argument_group("size"))
    graph = parser.add_argument_group("graph")
    graph.add_argument(
        "--format",
        choices=FORMATS,
        default="onnx",
        help="auto: an engine where a GPU and TensorRT are, else ONNX; rtx-engine: of TensorRT-RTX, which needs no "
        "GPU here; triton-repository: for NVIDIA Triton Inference Server (default: onnx)",
    )
    graph.add_argument(
        "--io",
        choices=IOS,
        help="luma: two (N,1,H,W) floats in, one out; bgr: two (N,H,W,3) 8-bit frames in, the picture out "
        "(default: luma)",
    )
    graph.add_argument("--range", choices=RANGES, help="of a bgr model, as in refusion fuse (default: stretch)")
    opsets = f"{OPSETS.start} to {OPSETS.stop - 1}"
    graph.add_argument("--opset", type=int, metavar="N", help=f"{opsets} (default: 18; INT8 beside float16: 19)")
    _add_int8(parser.add_argument_group("INT8"))
    parser.add_argument(
        "--sensitivity",
        action="store_true",
        help="print what each layer costs in INT8, and what each float32 part of an fp16 model is worth",
    )
    _add_verification(parser.add_argument_group("verification"))
    _add_engine(parser.add_argument_group("engine"))


def _add_size(group: argparse._ArgumentGroup) -> None:
    height_width = {"nargs": 2, "type": int, "metavar": ("H", "W")}
    group.add_argument("--size", **height_width, help="pixels, 0 for a free side (default: 480 640)")  # type: ignore[arg-type]
    for name, default in (("min", "64 64"), ("opt", "480 640"), ("max", "1080 1920")):
        what = {"min": "smallest", "opt": "usual", "max": "largest"}[name]
        text = f"{what} size of an engine with free sides (default: {default})"
        group.add_argument(f"--{name}-size", **height_width, help=text)  # type: ignore[arg-type]
    group.add_argument("--batch", type=int, metavar="N", help="pairs in a call, 0 to leave it free (default: 1)")
    group.add_argument(
        "--max-batch",
        type=int,
        default=MAX_BATCH,
        metavar="N",
        help="of an engine or server with --batch 0 (default: %(default)s)",
    )


def _add_int8(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="8 or more pairs like those to come, in sub-folders a and b (default, for ivif alone: generated scenes)",
    )
    group.add_argument(
        "--calibration-method",
        choices=METHODS,
        default=METHODS[0],
        help="what becomes 127: the 99.99th percentile, the value of least relative entropy, or the largest "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--int8-floor",
        type=float,
        default=FLOOR,
        metavar="DB",
        help="PSNR on the calibration pictures that the choice of layers keeps (default: %(default)g)",
    )
    group.add_argument(
        "--int8-remainder",
        choices=REMAINDERS,
        default=REMAINDERS[0],
        help="type of the other layers: fp16 for TensorRT, fp32 for ONNX Runtime before 1.30 (default: %(default)s)",
    )


def _add_verification(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--no-verify", action="store_true", help="write the model without comparing it")
    group.add_argument("--data", metavar="DIR", help="pairs to verify on (default: generated scenes)")
    group.add_argument("--limit", type=int, metavar="N", help="at most N pairs of each folder")
    group.add_argument("--skip-bad", action="store_true", help="leave out bad or unmatched files with a warning")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads of the latency (default: all cores)")


def _add_engine(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", type=int, default=0, metavar="N", help="GPU that builds (default: %(default)s)")
    group.add_argument("--workspace", type=float, metavar="GIB", help="GPU memory for a layer (default: all)")
    group.add_argument(
        "--optimization-level", type=int, metavar="0-5", help="5 builds longest and runs fastest (default: TensorRT's)"
    )
    group.add_argument("--timing-cache", type=Path, metavar="PATH", help="file or folder (default: the user's cache)")
    group.add_argument("--version-compatible", action="store_true", help="run on newer TensorRT as well; may be slower")
    group.add_argument(
        "--hardware-compatible",
        choices=("same_compute_capability", "ampere_plus"),
        help="run on other GPUs as well; may be slower, not for Jetson",
    )
    group.add_argument(
        "--compute-capability", nargs="+", metavar="X.Y", help="GPUs of an rtx-engine, as in 8.6 8.9 12.0"
    )


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help=".onnx, or .engine on the machine it was built for")
    parser.add_argument(
        "--reference", metavar="WEIGHTS", help="name or file of the weights (default: those that the model names)"
    )
    parser.add_argument("--data", metavar="DIR", help="folder with sub-folders a and b (default: generated scenes)")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N pairs of each source folder")
    parser.add_argument("--skip-bad", action="store_true", help="leave out bad or unmatched files with a warning")
    parser.add_argument("--fail-below", type=float, metavar="DB", help="exit code 1 where the mean PSNR is lower")
    parser.add_argument("--backend", default="auto", choices=BACKENDS, help="what runs the models (default: auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--json", metavar="FILE", help="write every number")
