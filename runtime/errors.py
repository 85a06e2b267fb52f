"""The one exception for bad input or use, and how a command ends."""

from __future__ import annotations

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Bad input or use. The message is one line: what is wrong, with which file or value, and what to do.

    The command line prints it to stderr and ends with exit code 2; a library caller can catch it as a ValueError.
    """


def exit_code(command: Callable[[], object]) -> int:
    """Run a command: 0 where it ends, 2 and one line on stderr for bad input, 130 for Ctrl-C."""
    try:
        command()
    except InputError as error:
        print(f"refusion: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("refusion: interrupted", file=sys.stderr)
        return 130
    return 0
