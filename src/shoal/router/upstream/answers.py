"""Whole answers of upstreams, which come with a good status: whether they are any, and how long.

Read no further than that.
"""

from __future__ import annotations

import msgspec

from shoal.router.upstream.bodies import UNREADABLE


class BadAnswerError(Exception):
    """What came is no answer; the message says what it is."""


def num_tokens_of(data: bytes) -> int:
    """Of the output, as an answer says; 0: it does not.

    Raises:
        BadAnswerError: it is not a JSON object, or an error.
    """
    try:
        answer = _WHOLE.decode(data)
    except UNREADABLE as error:
        raise BadAnswerError(f"{data[:64]!r}, which is not a JSON object") from error
    if bytes(answer.error) not in _NO_ERROR:
        raise BadAnswerError(f"an error: {bytes(answer.error)[:300].decode(errors='replace')}")
    try:
        usage = _USAGE.decode(answer.usage)
    except UNREADABLE:
        return 0
    said = max(usage.completion_tokens or 0, usage.output_tokens or 0, 0)
    return min(said, _MAX_TOKENS)


class _Usage(msgspec.Struct):
    completion_tokens: int | None = None
    output_tokens: int | None = None


class _Whole(msgspec.Struct):
    """Any JSON object: decoding it reads all of the text."""

    usage: msgspec.Raw = msgspec.Raw(b"{}")
    error: msgspec.Raw = msgspec.Raw(b"null")


_WHOLE = msgspec.json.Decoder(_Whole)
_USAGE = msgspec.json.Decoder(_Usage)
_NO_ERROR = (b"null", b"{}", b"[]", b"false", b'""')
_MAX_TOKENS = 65536
