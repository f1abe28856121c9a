"""What the router says of a proxied request, or the error that it is."""

from __future__ import annotations

from shoal.core.errors import UnavailableError
from shoal.core.request import Output
from shoal.router.upstream.records import ProxiedOutput


def checked(output: Output) -> ProxiedOutput:
    """
    Raises:
        RequestError: it tells of one, other than what an upstream refuses in its own words.
    """
    if isinstance(output, ProxiedOutput) and output.is_refusal:
        return output
    if output.error is not None:
        raise output.error.to_exception()
    if not isinstance(output, ProxiedOutput):
        raise UnavailableError(
            "The server stopped before this request was done; send it again",
            code="draining",
            retry_after_s=5.0,
        )
    return output
