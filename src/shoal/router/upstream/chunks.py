"""What one event of a completion says, however its server spells it.

What is not there is null, an empty string or list, or left out, as each server likes: vLLM sends
`"token_ids":null`, SGLang `"tool_calls":null`, some `"finish_reason":""` in every chunk. So no
field but the one that is asked for is held to a type. Knows nothing of other events.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from shoal.router.upstream.bodies import UNREADABLE

NOT_THE_CLIENTS = frozenset({401, 402, 403, 407, 408, 421, 425, 429})
"""Statuses among 4xx that are about us, or about now."""


class BadStreamError(Exception):
    """An upstream's stream that cannot be what was asked for; the message says why."""


class RefusedError(BadStreamError):
    """It said in its stream what others say with a status: the client's request is at fault.

    Args:
        body: what it said, as a JSON object.
    """

    def __init__(self, message: str, status: int, body: bytes) -> None:
        super().__init__(message)
        self.status, self.body = status, body


def tells(event: bytes) -> bool:
    """Whether an event holds some of an answer, be it text, a tool's call or a thought.

    Raises:
        BadStreamError: it is no chunk of a completion.
    """
    choices = _parsed(event).get("choices")
    if not isinstance(choices, list):
        return False
    return any(_holds_some(each) for each in choices if isinstance(each, dict))


def finishes_of(event: bytes, num_choices: int) -> list[bytes]:
    """Why choices ended with an event, in the server's words; mostly none did.

    A key that is part of a text has other quotes, as JSON spells it.

    Args:
        num_choices: that its stream has.
    """
    last = event.rfind(_FINISH_KEY)
    if last < 0 or (num_choices == 1 and event.startswith(b":null", last + len(_FINISH_KEY))):
        return []
    return _FINISH.findall(event)


def check(event: bytes) -> None:
    """
    Raises:
        BadStreamError: the event says that something went wrong; RefusedError: with the request.
    """
    if event.startswith(b"error:"):  # llama.cpp before September 2025
        said = b'{"error":%b}' % event[len(b"error:") :].strip()
    elif event.startswith(_ERROR_LINES) or (b'"error"' in event and _is_error(event)):
        said = data_of(event)
    else:
        return
    message = f"it says: {said[:300].decode(errors='replace')}"
    status = _status(said)
    if 400 <= status < 500 and status not in NOT_THE_CLIENTS:
        raise RefusedError(message, status, said)
    raise BadStreamError(message)


def is_whole(event: bytes) -> bool:
    """Whether nothing of it is missing, as there may where no empty line ends it."""
    data = data_of(event)
    if data == b"[DONE]":
        return True
    try:
        return isinstance(_JSON.decode(data), dict)
    except UNREADABLE:
        return False


def data_of(event: bytes) -> bytes:
    """What all `data:` lines of an event hold."""
    lines = event.split(b"\n")
    return b"\n".join(line[5:].strip() for line in lines if line.startswith(b"data:"))


_FINISH_KEY = b'"finish_reason"'
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"([^"]+)"')
_ERROR_LINES = (b"event: error", b"event:error", b"event: response.failed")
_JSON = msgspec.json.Decoder()
_QUIET = frozenset({"role"})
_NOTHING: tuple[object, ...] = (None, False, "", {}, [])


def _holds_some(choice: dict[str, Any]) -> bool:
    if choice.get("text") or choice.get("token_ids"):
        return True
    deltas = (choice.get("delta"), choice.get("message"))
    return any(
        value
        for delta in deltas
        if isinstance(delta, dict)
        for key, value in delta.items()
        if key not in _QUIET
    )


def _parsed(event: bytes) -> dict[str, Any]:
    data = data_of(event)
    if not data:
        raise BadStreamError(f"it sent {event[:64]!r}, which is no event of a completion")
    try:
        chunk = _JSON.decode(data)
    except UNREADABLE as error:
        raise BadStreamError(f"an event is no chunk of a completion: {error}") from error
    if not isinstance(chunk, dict):
        raise BadStreamError(f"an event is {data[:64]!r}, which is no chunk of a completion")
    return chunk


def _is_error(event: bytes) -> bool:
    """Of one in which the word stands: as a name, or as what something is."""
    chunk = _parsed(event)
    return chunk.get("error") not in _NOTHING or "error" in (chunk.get("object"), chunk.get("type"))


def _status(said: bytes) -> int:
    """Of HTTP, that an error was given; 0: none."""
    try:
        error = _JSON.decode(said)
    except UNREADABLE:
        return 0
    if isinstance(error, dict) and isinstance(error.get("error"), dict):
        error = error["error"]
    if not isinstance(error, dict):
        return 0
    codes = (str(error.get(name)) for name in ("code", "status", "http_status_code"))
    return next((int(each) for each in codes if re.fullmatch("[45][0-9]{2}", each)), 0)
