"""Where an upstream is, and with which key it is asked. Said once, by whoever starts the router."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from shoal.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """
    Attributes:
        base: path that stands before /v1.
        key: sent as a bearer token; shown nowhere.
    """

    host: str
    port: int
    is_tls: bool = False
    base: str = ""
    key: str | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Of the replica, in logs and metrics."""
        return f"{self.authority}{self.base}"

    @property
    def authority(self) -> str:
        """host:port, as a Host header spells it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def head(self, method: str, path: str, num_bytes: int) -> bytes:
        """Of a request: nothing of what a client sent is in it."""
        lines = [
            f"{method} {self.base}{path} HTTP/1.1",
            f"Host: {self.authority}",
            "Accept-Encoding: identity",
            "User-Agent: shoal",
        ]
        if self.key is not None:
            lines.append(f"Authorization: Bearer {self.key}")
        if method == "POST":
            lines += ["Content-Type: application/json", f"Content-Length: {num_bytes}"]
        return "\r\n".join([*lines, "", ""]).encode("ascii")


def parse_address(url: str, key: str | None = None) -> Address:
    """`http://host:8000`, with or without the /v1 that clients of OpenAI's API write.

    Raises:
        ConfigError: not such a URL, or a key that no header can hold.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"--upstream {url!r} is no URL: {error}; write {_EXAMPLE}") from error
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            "an --upstream holds a user or password, which process lists show; "
            "remove it and use --upstream-key"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f"--upstream {url!r} is no address of a server; write {_EXAMPLE}")
    base = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    if not all(33 <= ord(each) <= 126 for each in base + parts.hostname):
        raise ConfigError(f"--upstream {url!r} holds characters no URL has; write {_EXAMPLE}")
    if key is not None and not (key and all(33 <= ord(each) <= 126 for each in key)):
        raise ConfigError(
            f"the key for {parts.hostname} is empty or holds characters that no header can; "
            "store it as one line of ASCII"
        )
    is_tls = parts.scheme == "https"
    return Address(
        host=parts.hostname, port=port or (443 if is_tls else 80), is_tls=is_tls, base=base, key=key
    )


_EXAMPLE = "http://HOST:PORT"
