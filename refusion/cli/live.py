"""`refusion stream`: two cameras, fused as their pictures come."""

from __future__ import annotations

from refusion.cli.parsing import Subparsers
from runtime.stream_command import DESCRIPTION, add_arguments, run


def add_stream_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("stream", help="fuse two cameras as their pictures come", description=DESCRIPTION)
    parser.set_defaults(run=run)
    add_arguments(parser)
