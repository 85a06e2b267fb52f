"""`refusion export` and `refusion verify`: weights to models that run elsewhere, and how good these are."""

from __future__ import annotations

import argparse

from export.arguments import BUILD, VERIFY, add_build_arguments, add_verify_arguments
from refusion.cli.parsing import Subparsers


def add_export_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("export", help="make an ONNX model or an engine of weights", description=BUILD)
    parser.set_defaults(run=run_export)
    add_build_arguments(parser)


def run_export(args: argparse.Namespace) -> None:
    from export.build_command import run

    run(args)


def add_verify_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("verify", help="compare models with their float32 network", description=VERIFY)
    parser.set_defaults(run=run_verify)
    add_verify_arguments(parser)


def run_verify(args: argparse.Namespace) -> None:
    from export.verify import run

    run(args)
