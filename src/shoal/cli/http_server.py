"""The HTTP server of `shoal serve` and `shoal route`: its socket, and how it stops.

Knows nothing of what is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from shoal.cli.open_files import allow_files
from shoal.core.errors import ConfigError
from shoal.router.driver import Router
from shoal.server.bounded_http import BoundedHttp

_CONNECTIONS_GRACE_S = 5
_OBJECTS_PER_LOOK = 10_000


def bind(host: str, port: int, api_keys: tuple[str, ...]) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the port is taken, or the address is beyond loopback and there is no key.
    """
    if not api_keys and not _is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from other machines, but no API key is set; "
            f"set SHOAL_API_KEY (or --api-key), or use --host 127.0.0.1"
        )
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except socket.gaierror as error:
        raise ConfigError(f"--host {host} is not an address of this machine: {error}") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} on {host} is taken; stop what uses it, or choose another --port"
            ) from error
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    sock.listen(2048)
    allow_files()
    return sock


def url_of(host: str, port: int) -> str:
    """Of a server that listens there."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def http_server(app: Any) -> uvicorn.Server:
    """For an ASGI app; it leaves signals alone."""
    return _HttpServer(
        uvicorn.Config(
            app,
            http=BoundedHttp,
            log_level="warning",
            access_log=False,
            proxy_headers=False,  # nothing here asks where a client is
            timeout_graceful_shutdown=_CONNECTIONS_GRACE_S,
            server_header=False,
        )
    )


class _HttpServer(uvicorn.Server):
    """uvicorn without its own signal handlers: stopping is ours to order."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # All that was made until now stays: not to be looked through again and again. What a
        # request leaves behind is no circle, for the most part.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_OBJECTS_PER_LOOK)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Stopping:
    """First signal: drain, then leave. Second: leave at once.

    Args:
        drain_timeout_s: how long requests that run may take.
        kill: done before leaving at once.

    Attributes:
        server: told to stop when all is done.
    """

    def __init__(self, router: Router, drain_timeout_s: float, kill: Callable[[], object]) -> None:
        self.server: uvicorn.Server | None = None
        self._router, self._drain_timeout_s, self._kill = router, drain_timeout_s, kill
        self._task: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._on_signal, signum)

    @property
    def begun(self) -> bool:
        return self._task is not None

    def _on_signal(self, signum: signal.Signals) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._drain())
            return
        self._kill()
        os._exit(128 + signum)

    async def _drain(self) -> None:
        print(
            f"stopping: no new requests; waiting up to {self._drain_timeout_s:g} s for "
            f"{self._router.num_in_flight} running (signal again to leave at once)",
            file=sys.stderr,
            flush=True,
        )
        await self._router.drain(self._drain_timeout_s)
        if self.server is not None:
            self.server.should_exit = True


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
