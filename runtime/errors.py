"""The one exception for bad input or use, and how a command ends."""

from __future__ import annotations

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Bad input or use. The message is one line: what is wrong, with which file or value, and what to do.

    The command line prints it to stderr and ends with exit code 2; a library caller can catch it as a ValueError.
    """


def exit_code(command: Callable[[], int]) -> int:
    """Run a command; bad input ends with one line on stderr and exit code 2, Ctrl-C with 130."""
    try:
        return command()
    except InputError as error:
        print(f"refusion: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("refusion: interrupted", file=sys.stderr)
        return 130
