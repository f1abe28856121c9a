"""JSON bodies on their way through: read no further than they must be, and never passed on as read.

A body is written anew from its fields, each value as it was spelled, so that what was checked
here is what an upstream gets, whatever its parser makes of a key that stands there twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Raw

from shoal.core.errors import InvalidRequestError
from shoal.router.upstream.records import ProxiedRequest

CONTINUABLE = "resumable"
"""shoal's field: a stream that says which tokens each event holds."""
COMMITTED = "output_token_ids"
"""shoal's field: tokens that the client has, which the answer goes on from."""
CONTINUATION = "continuation"
"""shoal's field: whose tokens they are; another server than it was is to refuse them."""

UNREADABLE = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)
"""What reading JSON of strangers may raise."""

_FIELDS = msgspec.json.Decoder(dict[str, Raw])
_ENCODER = msgspec.json.Encoder()
_TRUE = Raw(b"true")
_NULL = Raw(b"null")


def read_fields(body: bytes) -> dict[str, Raw]:
    """The fields of a request's body.

    Raises:
        InvalidRequestError: it is no JSON object.
    """
    try:
        body.decode()  # strings that are not read here are not to fail at an upstream
        return _FIELDS.decode(body)
    except UNREADABLE as error:
        raise InvalidRequestError(
            f"The body is not a JSON object: {error}; send one as application/json",
            code="invalid_json",
        ) from error


def value_of(fields: Mapping[str, Raw], name: str, kinds: type | tuple[type, ...]) -> Any:
    """A field's value; None if it is absent or null.

    Raises:
        InvalidRequestError: it is of none of these kinds.
    """
    raw = fields.get(name)
    if raw is None or raw == _NULL:
        return None
    try:
        value = msgspec.json.decode(raw)
    except UNREADABLE as error:  # a number beyond all bounds, say
        raise InvalidRequestError(
            f"{name} cannot be read: {error}", code="invalid_value", param=name
        ) from error
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise InvalidRequestError(
            f"{name} is {bytes(raw)[:64].decode(errors='replace')}; it has another type here",
            code="invalid_value",
            param=name,
        )
    return value


def body_for(request: ProxiedRequest, model: str, *, continues: bool) -> bytes:
    """What an upstream is sent.

    Args:
        model: as the upstream calls it.
        continues: it takes up streams where others left them.
    """
    call = request.call
    fields = {**call.fields, "model": _raw(model)}
    if continues and call.may_continue:
        fields[CONTINUABLE] = _TRUE
        if fields.get("seed", _NULL) == _NULL:
            fields["seed"] = _raw(request.sampling.seed)
        if request.output_ids:
            fields[COMMITTED] = _raw(request.output_ids)
            fields[CONTINUATION] = _raw(call.continuation)
    return _ENCODER.encode(fields)


def check_body(model: str, path: str) -> bytes:
    """Of the cheapest request that shows whether an upstream generates."""
    text: dict[str, object] = {"prompt": "1"}
    if path.endswith("chat/completions"):
        text = {"messages": [{"role": "user", "content": "1"}]}
    return _ENCODER.encode({"model": model, **text, "max_tokens": 1, "temperature": 0})


def _raw(value: str | int | Sequence[int] | None) -> Raw:
    return Raw(_ENCODER.encode(value))
