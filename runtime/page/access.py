"""Who may ask for what: rules against other web sites in the same browser, and the token of an open address.

A page on the web can make a visitor's browser send requests to 127.0.0.1. So the Host header must be ours, which stops
a foreign name that was pointed at this address (DNS rebinding), and what changes something must come from our own page
(CSRF). Beyond loopback there are other people too: every request then needs the token.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from email.message import Message
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

COOKIE = "refusion_session"
FORBIDDEN, UNAUTHORIZED = 403, 401


class Access:
    """The rules for one server.

    Args:
        loopback: the server listens on loopback only.
        token: that every request must show, or None.
        hosts: further names that this server is known by, as in a browser's address bar.
    """

    def __init__(self, *, loopback: bool, token: str | None, hosts: tuple[str, ...] = ()):
        self._loopback = loopback
        self._token = token
        self._names = {"localhost", *(host.lower() for host in hosts)}
        if not loopback:
            name = socket.gethostname().lower()
            self._names |= {name, f"{name}.local"}
        self._session = secrets.token_urlsafe(32)  # what the cookie holds in place of the token

    def refusal(self, method: str, headers: Message, query_token: str | None) -> tuple[int, str] | None:
        """Status and a line where a request is refused, else None."""
        if not self._is_our_host(headers.get("Host", "")):
            return FORBIDDEN, "this Host is not ours; open the page by its address, or start it with ?host=NAME"
        if not self._is_our_page(method, headers):
            return FORBIDDEN, "refused: the request comes from another web site"
        if self._token is not None and not self._knows_token(headers, query_token):
            return UNAUTHORIZED, "this page needs its token: open it with ?token=TOKEN, or send Authorization: Bearer"
        return None

    def cookie(self) -> str:
        """Set-Cookie of a browser that has shown the token: gone when it is closed, and of no use to a later server."""
        return f"{COOKIE}={self._session}; Path=/; HttpOnly; SameSite=Strict"

    def _is_our_host(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        # Rebinding needs a name, so that an address in digits is safe; the token stands guard there anyway.
        return address.is_loopback if self._loopback else True

    @staticmethod
    def _is_our_page(method: str, headers: Message) -> bool:
        origin = headers.get("Origin")
        # Behind a proxy that adds TLS it is https://, of the same host.
        ours = [f"{scheme}://{headers.get('Host', '')}".lower() for scheme in ("http", "https")]
        if origin is not None and origin.lower() not in ours:
            return False
        if headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin"):
            return True
        # A link to the page is fine; pictures and data in other sites' pages are not.
        return method == "GET" and headers.get("Sec-Fetch-Dest") == "document"

    def _knows_token(self, headers: Message, query_token: str | None) -> bool:
        assert self._token is not None
        shown = [query_token] if query_token else []
        kind, _, value = headers.get("Authorization", "").partition(" ")
        if kind.lower() == "bearer":
            shown.append(value.strip())
        if any(_equal(text, self._token) for text in shown):
            return True
        try:
            cookie = SimpleCookie(headers.get("Cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and _equal(cookie.value, self._session)


def _equal(a: str, b: str) -> bool:
    """Compared in a time that doesn't tell how much of it is right."""
    return hmac.compare_digest(a.encode(), b.encode())
