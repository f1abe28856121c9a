"""Whether an upstream works, and what it serves: asked of it seldom.

It works if it generates a token; that it listens says little. Knows nothing of clients' requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from shoal.core.stats import EngineInfo
from shoal.router.upstream.address import Address
from shoal.router.upstream.answers import BadAnswerError, num_tokens_of
from shoal.router.upstream.bodies import UNREADABLE, check_body
from shoal.router.upstream.card import ShoalCard
from shoal.router.upstream.connection import Pool

MAX_ANSWER_BYTES = 1024 * 1024
_SEATS = 4096
"""Requests at once, of who doesn't say: it has a queue of its own, and says when that is full."""
_KV_BLOCKS = 2**20
_WAITING = 2**16
_MAX_LEN = 2**31 - 1


class CheckError(Exception):
    """What is wrong with an upstream, in words for people.

    Args:
        is_gone: nobody listens there.
        is_late: it did not answer in time.
        is_busy: it answers, but generated nothing in time.
    """

    def __init__(
        self, message: str, *, is_gone: bool = False, is_late: bool = False, is_busy: bool = False
    ) -> None:
        super().__init__(message)
        self.is_gone, self.is_late, self.is_busy = is_gone, is_late, is_busy


@dataclass(frozen=True, slots=True)
class Found:
    """What an upstream says it is.

    Attributes:
        names: of its models.
        is_one_model: they are names of the same one.
        continuation: whose streams it can go on with: of those that say the same; None: nobody's.
        info: what it takes.
    """

    names: tuple[str, ...]
    is_one_model: bool
    continuation: str | None
    info: EngineInfo


class _Card(msgspec.Struct):
    id: str
    owned_by: str = ""
    root: str | None = None
    max_model_len: int | None = None
    shoal: ShoalCard | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


class _Props(msgspec.Struct):
    total_slots: int = 1


async def look(address: Address, pool: Pool, timeout_s: float) -> Found:
    """What it serves.

    Raises:
        CheckError: it does not say so, or does not answer.
    """
    body = await _ask(address, pool, "GET", "/v1/models", b"", timeout_s)
    try:
        cards = msgspec.json.decode(body, type=_Cards).data
    except UNREADABLE as error:
        raise CheckError(f"/v1/models is no list of models: {error}") from error
    if not cards:
        raise CheckError("/v1/models lists no model")
    card = cards[0]
    continuation: str | None = None
    seats, blocks = _SEATS, _KV_BLOCKS
    if card.shoal is not None:
        continuation = card.shoal.continuation
        seats, blocks = max(card.shoal.max_num_seqs, 1), max(card.shoal.num_kv_blocks, 1)
    elif card.owned_by == "llamacpp":
        seats = await _slots(address, pool, timeout_s)
    lengths = [each.max_model_len for each in cards if each.max_model_len]
    info = EngineInfo(
        max_model_len=min(lengths, default=_MAX_LEN),
        num_kv_blocks=blocks,
        max_num_seqs=seats,
        max_num_batched_tokens=8192,
        max_waiting=_WAITING,
        device="upstream",
        dtype="",
    )
    roots = {each.root or each.id for each in cards}
    return Found(tuple(each.id for each in cards), len(roots) == 1, continuation, info)


async def generates(
    address: Address, pool: Pool, model: str, paths: Sequence[str], timeout_s: float
) -> str:
    """Have it generate one token; by which of the endpoints it did.

    Raises:
        CheckError: by none of them.
    """
    reason = ""
    for path in paths:
        try:
            num_tokens_of(
                await _ask(address, pool, "POST", path, check_body(model, path), timeout_s)
            )
        except BadAnswerError as error:
            reason = reason or f"{path} was answered with {error}"
        except CheckError as error:
            if error.is_gone:
                raise
            if error.is_late:
                raise CheckError(str(error), is_busy=True) from error
            reason = reason or str(error)
        else:
            return path
    raise CheckError(reason)


async def _slots(address: Address, pool: Pool, timeout_s: float) -> int:
    """Requests at once, of llama.cpp's server."""
    try:
        body = await _ask(address, pool, "GET", "/props", b"", timeout_s)
        return max(msgspec.json.decode(body, type=_Props).total_slots, 1)
    except (CheckError, *UNREADABLE):
        return 1


async def _ask(
    address: Address, pool: Pool, method: str, path: str, body: bytes, timeout_s: float
) -> bytes:
    """The body of a good answer."""
    exchange = _Whole()
    try:
        async with asyncio.timeout(timeout_s):
            connection = await pool.connect()
            try:
                connection.ask(exchange, address.head(method, path, len(body)) + body)
                status, answer = await exchange.result
            except BaseException:
                connection.abort()
                raise
            # Of a whole answer the connection is the pool's, and may be somebody's by now.
    except TimeoutError as error:
        late = f"{path} was not answered within {timeout_s:g} s"
        raise CheckError(late, is_late=True) from error
    except (OSError, UnicodeError) as error:
        raise CheckError(f"cannot connect: {error}", is_gone=True) from error
    if not 200 <= status < 300:
        said = answer[:200].decode(errors="replace")
        raise CheckError(f"{path} was answered with status {status}: {said}")
    return answer


class _Whole:
    """Gathers a response."""

    def __init__(self) -> None:
        self.result: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._status = 0
        self._body = b""

    def head(self, status: int, headers: Mapping[bytes, bytes]) -> None:
        self._status = status

    def body(self, data: bytes) -> None:
        self._body += data
        if len(self._body) > MAX_ANSWER_BYTES:
            self.broken(f"answered with more than {MAX_ANSWER_BYTES} bytes")

    def flush(self) -> None:
        pass

    def over(self) -> None:
        if not self.result.done():
            self.result.set_result((self._status, self._body))

    def broken(self, reason: str) -> None:
        if not self.result.done():
            self.result.set_exception(CheckError(f"it {reason}"))
