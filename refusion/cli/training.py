"""`refusion train`."""

from __future__ import annotations

import argparse
import logging

from refusion.cli.parsing import Subparsers, need


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
    need("torch", "train", "training")
    need("tensorboard", "train", "training")
    from refusion.train import train

    logging.getLogger("refusion").setLevel(logging.INFO)
    train(config)
