"""The one exception for bad input or use, and how a command ends."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

# Examples in messages stay.
_USER_INFO = re.compile(r"((?:rtsp|http|rtmp)s?://)(?!USER:PASSWORD@)[^\s'\"]*@")
_SECRET_VALUE = re.compile(
    r"((?:password|passwd|pass|pwd|user|username|token|secret)=)(?!TOKEN|\.\.\.)[^&\s'\"]*", re.IGNORECASE
)


class InputError(ValueError):
    """Bad input or use. The message is one line: what is wrong, with which file or value, and what to do.

    The command line prints it to stderr and ends with exit code 2; a library caller can catch it as a ValueError.
    """


def without_credentials(text: str) -> str:
    """A line for people, with what may be a user, a password or a token in its URIs cut out."""
    return _SECRET_VALUE.sub(r"\1***", _USER_INFO.sub(r"\1***@", text))


def exit_code(command: Callable[[], object]) -> int:
    """Run a command: 0 where it ends, 2 and one line without credentials on stderr for bad input, 130 for Ctrl-C."""
    try:
        command()
    except InputError as error:
        print(f"refusion: {without_credentials(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("refusion: interrupted", file=sys.stderr)
        return 130
    return 0
