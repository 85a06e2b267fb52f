"""`refusion bench`: latency tables."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refusion.cli.parsing import Subparsers
from runtime.errors import InputError

if TYPE_CHECKING:
    from runtime.bench import Case


def add_bench_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="latency of fusing on this machine",
        description="Latency of each stage and from end to end, for every model with every backend at every size. "
        "Each case runs in a process of its own; warm-up is left out.",
    )
    parser.set_defaults(run=run_bench)
    parser.add_argument(
        "--model",
        action="append",
        metavar="M",
        help="task (ivif), embedded model (ivif-lite), .onnx or .engine file; may be repeated (default: ivif)",
    )
    parser.add_argument("--backend", action="append", metavar="B", help="may be repeated (default: auto)")
    parser.add_argument("--size", action="append", metavar="WxH", help="may be repeated (default: 640x480)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of one frame (default: all cores)")
    parser.add_argument(
        "--iterations", type=int, default=200, metavar="N", help="pairs of each case (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=60, metavar="S", help="most that a case may take (default: %(default)g)"
    )
    parser.add_argument("--json", metavar="FILE", help="write every number")
    parser.add_argument("--plot", metavar="FILE", help="write a picture of the stages (.png)")
    parser.add_argument("--vs", metavar="FILE", help="compare with what --json wrote before")


def run_bench(args: argparse.Namespace) -> None:
    from runtime.bench import run_cases
    from runtime.bench_report import compare, make_report, read_report, text_of
    from runtime.files import write_whole
    from runtime.images import check_writable

    stored = read_report(args.vs) if args.vs else None  # before minutes are spent
    if args.plot:
        check_writable(Path(args.plot))
    results = _measured(_cases(args), run_cases)
    report = make_report(results, datetime.datetime.now().astimezone().isoformat(timespec="seconds"))
    print(text_of(report))
    if args.json:
        write_whole(Path(args.json), (json.dumps(report, indent=1) + "\n").encode())
    if args.plot:
        from runtime.bench_plot import write_plot

        write_plot(args.plot, report)
    if stored is not None:
        print(f"\n{compare(report, stored)}")


def _cases(args: argparse.Namespace) -> list[Case]:
    from runtime.bench import Case

    sizes = [_size(text) for text in args.size or ["640x480"]]
    return [
        Case(model, backend, width, height, args.threads, args.iterations, args.seconds)
        for model, (width, height), backend in product(args.model or ["ivif"], sizes, args.backend or ["auto"])
    ]


def _size(text: str) -> tuple[int, int]:
    """`WxH` -> (width, height)."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise InputError(f"size '{text}' is not understood; give WxH, as in 640x480")
    return int(width), int(height)


def _measured(cases: Sequence[Case], run_cases: Any) -> list[dict[str, Any]]:
    """Run the cases behind a progress bar."""
    from tqdm import tqdm

    with tqdm(total=len(cases), unit="case", disable=None, bar_format="{l_bar}{bar}| {elapsed}<{remaining}") as bar:

        def progress(label: str, done: float) -> None:
            bar.set_description(label, refresh=False)
            bar.update(done - bar.n)

        return run_cases(cases, progress)
