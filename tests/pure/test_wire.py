"""Framed messages over a socket pair: order, limits, death of the peer."""

from __future__ import annotations

import asyncio
import socket
import threading

import msgspec
import pytest

from shoal.core.errors import WireError
from shoal.core.request import GenerateRequest, Grammar, Output, SamplingParams, TokenLogprobs
from shoal.core.stats import EngineStats
from shoal.wire.channel import MAX_FRAME_BYTES, AsyncChannel, Codec, ThreadChannel, body_length
from shoal.wire.messages import Cancel, FromEngine, News, Submit, ToEngine

REQUEST = GenerateRequest(
    request_id="q",
    prompt_ids=(1, 2, 3),
    output_ids=(4,),
    sampling=SamplingParams(
        stop=("x",), logit_bias=((3, 1.5),), seed=2**63, grammar=Grammar(kind="json_object")
    ),
)
NEWS = News(
    [
        Output(request_id="q", token_ids=(1,), logprobs=(TokenLogprobs(1, -0.5, 1, ((1, -0.5),)),)),
        Output(request_id="q", finish="length"),
    ],
    EngineStats(num_running=1),
)


def to_engine() -> Codec[ToEngine, FromEngine]:
    return Codec(ToEngine)


def from_engine() -> Codec[FromEngine, ToEngine]:
    return Codec(FromEngine)


def test_messages_come_back_as_they_were() -> None:
    """Requests one way, news the other, over a real socket pair."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    got: list[ToEngine] = []

    def engine() -> None:
        channel = ThreadChannel(theirs, to_engine())
        for message in channel.receive():
            got.append(message)
            channel.send(NEWS)
        channel.close()

    async def router() -> list[FromEngine | None]:
        channel: AsyncChannel[FromEngine, ToEngine] = await AsyncChannel.open(ours, from_engine())
        for _ in range(100):
            channel.send(Submit(REQUEST))
        channel.send(Cancel("q"))
        news = [await channel.receive() for _ in range(101)]
        channel.close()
        return news

    thread = threading.Thread(target=engine)
    thread.start()
    news = asyncio.run(router())
    thread.join(60)
    assert not thread.is_alive(), "the engine's end must see the router leave"
    assert got == [Submit(REQUEST)] * 100 + [Cancel("q")]
    assert news == [NEWS] * 101


def test_the_router_sees_the_engine_die() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.sendall(from_engine().encode(Cancel("half"))[:-2])
    theirs.close()

    async def router() -> object:
        channel: AsyncChannel[FromEngine, ToEngine] = await AsyncChannel.open(ours, from_engine())
        try:
            return await channel.receive()
        finally:
            channel.close()

    assert asyncio.run(router()) is None


def test_a_frame_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(WireError, match="announced"):
        body_length((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff\xff", msgspec.msgpack.encode({"type": "Nonsense"}), msgspec.msgpack.encode(7)],
)
def test_what_does_not_decode_is_a_wire_error(body: bytes) -> None:
    with pytest.raises(WireError):
        to_engine().decode(body)


def test_a_sender_is_not_held_up_by_a_reader_that_sleeps() -> None:
    ours, theirs = socket.socketpair()
    channel = ThreadChannel(theirs, to_engine())
    big = News([Output(request_id="q", token_ids=tuple(range(1000)))] * 100, EngineStats())
    for _ in range(20):
        channel.send(big)
    ours.close()
    channel.close()
