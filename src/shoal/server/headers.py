"""Headers of a request as the server has them: pairs of bytes, names in lower case.

Starlette's `Headers` encodes and decodes on every look, which all requests would pay for.
"""

from __future__ import annotations

from starlette.types import Scope


def header_of(scope: Scope, name: bytes) -> str:
    """The first header of that name, "" if there is none."""
    for key, value in scope["headers"]:
        if key == name:
            found: str = value.decode("latin-1")
            return found
    return ""
