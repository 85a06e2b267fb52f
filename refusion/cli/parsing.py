"""What every command's module shares."""

from __future__ import annotations

import argparse
import importlib.util

from runtime.errors import InputError

Subparsers = argparse._SubParsersAction


def need(module: str, extra: str, purpose: str) -> None:
    """Raise the InputError that says what to install, unless the module is there."""
    if importlib.util.find_spec(module) is None:
        raise InputError(f"{purpose} needs the package {module}: pip install 'refusion[{extra}]'")
