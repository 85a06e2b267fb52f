"""The parts of a sink's URI: its scheme, its address, and the options after the question mark."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from runtime.errors import InputError
from runtime.uri import Options, parse_options


def split_uri(uri: str) -> tuple[str, str, dict[str, str]]:
    """`scheme://address?name=value&...` -> scheme, address, options.

    Raises:
        InputError: no scheme, an option without a value, or one that is given twice. The message holds no address,
            since there may be a password in it.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or not scheme.isalnum():
        raise InputError("a sink is a URI such as file://night.mp4 or http://127.0.0.1:8000; this one has no scheme://")
    address, _, query = rest.partition("?")
    return scheme.lower(), address, parse_options(f"{scheme}:// sink", query)


class SinkOptions(Options):
    """The options of one sink."""

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number from low to high."""
        number = self.number(name, default, low, high)
        if number != round(number):
            raise InputError(f"{name}={number:g} of the {self._owner} must be a whole number")
        return round(number)


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens. The printed form holds no password."""

    scheme: str
    host: str
    port: int
    path: str
    user: str | None
    password: str | None

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches it."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def url(self, port: int) -> str:
        """Its URL with the port that was bound, without user and password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{port}{self.path}"


def parse_endpoint(scheme: str, address: str, default_port: int) -> Endpoint:
    """`[user:password@]host[:port][/path]` of a server.

    Raises:
        InputError: no host, or a bad port.
    """
    try:
        parts = urlsplit(f"{scheme}://{address}")
        port = default_port if parts.port is None else parts.port
    except ValueError:
        raise InputError(f"the port of the {scheme}:// sink is not a number from 0 to 65535") from None
    if not parts.hostname:
        raise InputError(f"{scheme}:// needs an address to listen at, as in {scheme}://127.0.0.1:{default_port}")
    user, password = (unquote(part) if part else None for part in (parts.username, parts.password))
    return Endpoint(scheme, parts.hostname, port, parts.path, user, password)
