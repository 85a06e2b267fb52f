"""The command `refusion`: parses and calls. Exit codes: 0 done, 2 bad input or use, 1 anything else, 130 interrupted.

Each command is a pair of functions, `add_<name>_parser` and `run_<name>`, in the module of its subject, listed in
`COMMANDS`. What a command needs is imported when it runs, so that `--help` is instant and no command needs another's
packages.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from typing import NoReturn

from refusion import __version__
from refusion.cli.bench import add_bench_parser
from refusion.cli.calibration import add_calibrate_parser
from refusion.cli.deploy import add_export_parser, add_verify_parser
from refusion.cli.evaluation import add_eval_parser
from refusion.cli.live import add_stream_parser
from refusion.cli.machines import add_doctor_parser
from refusion.cli.parsing import Subparsers
from refusion.cli.stills import add_demo_parser, add_fuse_parser
from refusion.cli.training import add_train_parser
from runtime.errors import InputError, exit_code

COMMANDS: tuple[Callable[[Subparsers], None], ...] = (
    add_fuse_parser,
    add_demo_parser,
    add_eval_parser,
    add_train_parser,
    add_stream_parser,
    add_calibrate_parser,
    add_bench_parser,
    add_doctor_parser,
    add_export_parser,
    add_verify_parser,
)


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
