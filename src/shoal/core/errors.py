"""Every error shoal raises on purpose, in one tree.

    ShoalError
    ├── ConfigError           a flag, a config key, a plan: the user can mend it
    ├── ModelError            a checkpoint that is not what it should be
    │   ├── ModelNotFoundError    no such file, id or catalogue name; no network
    │   ├── UnsupportedModelError an architecture or tensor type we don't run
    │   └── WeightsError          missing tensor, wrong shape, truncated file
    ├── DeviceError           a device that is absent or that we don't support
    ├── RequestError          a request we refuse; carries the HTTP meaning
    │   ├── InvalidRequestError   malformed or out of range (400)
    │   ├── NotFoundError         no such model or address (404)
    │   ├── QueueFullError        no room; try again later (429)
    │   ├── UpstreamError         another server failed us (502)
    │   └── UnavailableError      draining, or no replica is alive (503)
    ├── WireError             a message that is too large, malformed or cut short
    └── CommError             a collective or transfer among workers that did not happen

Knows nothing of HTTP beyond the numbers; `server/` gives them OpenAI's shape.
"""

from __future__ import annotations


class ShoalError(Exception):
    """Root of the tree: the message says what was got, what was needed, one remedy."""


class ConfigError(ShoalError):
    """A setting the user can mend."""


class ModelError(ShoalError):
    """A checkpoint that is not what it should be."""


class ModelNotFoundError(ModelError):
    """No such file, Hugging Face id or catalogue name, or no network to fetch it."""


class UnsupportedModelError(ModelError):
    """An architecture, rope scaling or tensor type that shoal does not run."""


class WeightsError(ModelError):
    """A missing tensor, a wrong shape, a truncated file."""


class DeviceError(ShoalError):
    """A device that is absent, or that shoal does not support."""


class RequestError(ShoalError):
    """A request that is refused or that failed.

    Args:
        message: what was got, what was needed, one remedy.
        code: machine-readable reason, such as ``context_length_exceeded``.
        param: the request field at fault, if one is.
        retry_after_s: when it is worth trying again, if it is.
    """

    status = 500

    def __init__(
        self,
        message: str,
        *,
        code: str = "internal_error",
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequestError(RequestError):
    """Malformed or out of range: the same request will fail again."""

    status = 400


class NotFoundError(RequestError):
    """No such model or address."""

    status = 404


class QueueFullError(RequestError):
    """No room now: the same request may succeed later."""

    status = 429


class UpstreamError(RequestError):
    """A server that was to answer in our place did not, or not rightly."""

    status = 502


class UnavailableError(RequestError):
    """The server is draining, or no replica is alive."""

    status = 503


class RequestTimeoutError(RequestError):
    """The request ran past its time limit."""

    status = 504


class WireError(ShoalError):
    """A message that is too large, malformed or cut short."""


class CommError(ShoalError):
    """A collective or a transfer among workers that was aborted, or ran past its deadline."""
