"""Why a router ends a request itself, in words for whoever made it."""

from __future__ import annotations

from shoal.core.errors import QueueFullError, RequestError, RequestTimeoutError, UnavailableError
from shoal.core.request import ErrorInfo, GenerateRequest, Output
from shoal.router.events import Deliver


def failed(request_id: str, error: RequestError) -> Deliver:
    return Deliver([Output(request_id=request_id, finish="error", error=ErrorInfo.of(error))])


def shutting_down(code: str, retry_after_s: float | None = None) -> UnavailableError:
    return UnavailableError("the server is shutting down", code=code, retry_after_s=retry_after_s)


def id_in_use(request_id: str) -> RequestError:
    return RequestError(f"request id {request_id!r} is in use", code="duplicate_request_id")


def no_replica(reason: str) -> UnavailableError:
    return UnavailableError(
        f"no replica of the model is available: {reason}", code="no_replica", retry_after_s=5.0
    )


def too_many_wait(num_homeless: int) -> QueueFullError:
    return QueueFullError(
        f"no replica is ready yet and {num_homeless} requests already wait",
        code="queue_full",
        retry_after_s=1.0,
    )


def lost_too_often(num_lost: int, reason: str) -> RequestError:
    return RequestError(
        f"the replicas serving this request were lost {num_lost} times, last: {reason}",
        code="replica_lost",
    )


def out_of_time(request: GenerateRequest) -> RequestTimeoutError:
    return RequestTimeoutError(
        f"the request ran past its limit of {request.timeout_s:g} s; raise the limit or lower "
        f"max_tokens",
        code="timeout",
    )
