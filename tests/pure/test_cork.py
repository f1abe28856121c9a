"""The head of a response and its first piece go to a client in one write."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from shoal.server.cork import Corked
from shoal.server.sse import SEND_BODY

HEAD: Message = {"type": "http.response.start", "status": 200, "headers": []}
REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


class Transport(asyncio.Transport):
    """What was written, and when it closed."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[bytes | str] = []

    def write(self, data: Any) -> None:
        self.said.append(bytes(data))

    def close(self) -> None:
        self.said.append("closed")

    def is_closing(self) -> bool:
        return "closed" in self.said

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


def body(data: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


def answered(answer: Callable[[Scope, Send], Any], request: bytes = REQUEST) -> list[bytes | str]:
    """By uvicorn's protocol, to one request."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})[SEND_BODY] = send
        await answer(scope, send)

    async def run() -> list[bytes | str]:
        config = uvicorn.Config(app, access_log=False, log_config=None)
        config.load()
        protocol = HttpToolsProtocol(config, ServerState(), {})
        transport = Transport()
        protocol.connection_made(transport)
        assert isinstance(protocol.flow, FlowControl)
        protocol.data_received(request)
        await asyncio.gather(*protocol.tasks)
        said = list(transport.said)
        protocol.connection_lost(None)
        return said

    return asyncio.run(run())


def test_what_is_corked_is_one_write() -> None:
    async def answer(scope: Scope, send: Send) -> None:
        with Corked(scope):
            await send(HEAD)
            await send(body(b"first", more=True))
        await send(body(b"second", more=True))
        await send(body(b"", more=False))

    first, *rest = answered(answer)
    assert isinstance(first, bytes)
    assert first.startswith(b"HTTP/1.1 200 OK\r\n")
    assert first.endswith(b"\r\n\r\n5\r\nfirst\r\n")
    assert rest == [b"6\r\nsecond\r\n", b"0\r\n\r\n"]


def test_a_connection_closes_after_what_was_written_to_it() -> None:
    async def answer(scope: Scope, send: Send) -> None:
        with Corked(scope):
            await send(HEAD)
            await send(body(b"all", more=False))

    said = answered(answer, REQUEST.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
    assert said[-1] == "closed"
    assert b"".join(each for each in said if isinstance(each, bytes)).endswith(
        b"3\r\nall\r\n0\r\n\r\n"
    )


def test_what_was_sent_before_an_error_goes_out() -> None:
    async def answer(scope: Scope, send: Send) -> None:
        with pytest.raises(ValueError, match="broken"), Corked(scope):
            await send(HEAD)
            raise ValueError("broken")
        await send(body(b"", more=False))

    assert [each[:8] for each in answered(answer)] == [b"HTTP/1.1", b"0\r\n\r\n"]


def test_another_server_sends_as_ever() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def answer() -> None:
        with Corked({"state": {SEND_BODY: send}}):
            await send(HEAD)

    asyncio.run(answer())
    assert sent == [HEAD]
