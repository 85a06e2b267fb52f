"""Options of a URI: `?name=value&name=value`, taken one by one, with an error that names those that are left."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import parse_qsl, unquote

from runtime.errors import InputError


def parse_options(owner: str, query: str) -> dict[str, str]:
    """`name=value&name=value` -> dictionary.

    Args:
        owner: what has the options, for the message, as in "v4l2:// source".

    Raises:
        InputError: an option without a value, or one that is given twice. The message holds no value.
    """
    options: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        pairs = parse_qsl(part, keep_blank_values=True)
        name, value = pairs[0] if pairs else (part, "")
        if not value or name in options:
            raise InputError(f"option '{name}' of the {owner} needs one value, as in ?{name}=VALUE")
        options[name] = value
    return options


def local_path(scheme: str, address: str) -> Path:
    """The path that a URI names, `~` included.

    Raises:
        InputError: one that no file can have.
    """
    try:
        path = Path(unquote(address)).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, no such user, a zero byte
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"{scheme}://{address[:80]}: no file can have this name ({reason})") from error
    return path


class Options:
    """The options of one owner; take each, then call `done`."""

    def __init__(self, owner: str, values: dict[str, str]):
        self._owner = owner
        self._left = dict(values)
        self._known: list[str] = []

    def text(self, name: str, default: str = "") -> str:
        """The value as it was given."""
        self._known.append(name)
        return self._left.pop(name, default)

    def choice(self, name: str, default: str, choices: Sequence[str]) -> str:
        """One of a few words."""
        value = self.text(name, default)
        if value not in choices:
            raise InputError(f"{name}={value} is not known to the {self._owner}; choose from {', '.join(choices)}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """1 or 0."""
        return self.choice(name, "1" if default else "0", ("0", "1")) == "1"

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number from low to high."""
        value = self.text(name, str(default))
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not low <= number <= high:
            raise InputError(f"{name}={value} of the {self._owner} must be a number from {low:g} to {high:g}")
        return number

    def size(self, name: str) -> tuple[int, int] | None:
        """`WIDTHxHEIGHT` -> (height, width), or None where it isn't given."""
        value = self.text(name)
        if not value:
            return None
        match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", value)
        if match is None or not (int(match[1]) and int(match[2])):
            raise InputError(f"{name}={value} of the {self._owner} is no size; give WIDTHxHEIGHT, as in 640x512")
        return int(match[2]), int(match[1])

    def done(self) -> None:
        """Raise InputError where an option is left that this owner doesn't have."""
        if self._left:
            known = f"it has {', '.join(sorted(self._known))}" if self._known else "it has none"
            raise InputError(f"the {self._owner} has no option '{next(iter(self._left))}'; {known}")
