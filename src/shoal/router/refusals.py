"""Why a router ends a request itself, in words for whoever made it; what replicas' errors mean."""

from __future__ import annotations

from shoal.core.errors import QueueFullError, RequestError, RequestTimeoutError, UnavailableError
from shoal.core.request import ErrorInfo, GenerateRequest, Output
from shoal.router.events import Deliver

OF_REPLICAS = (500, 502, 503)
"""Statuses by which a replica says that it did not do its work."""
BUSY = (429,)
"""Those by which it says that it has too much to do."""
WORTH_RETRYING = (*BUSY, *OF_REPLICAS)
"""Those after which another replica may do it."""


def is_refusal(error: ErrorInfo) -> bool:
    """The request is wrong, or there is too much to do: nothing of it was computed."""
    return 400 <= error.status < 500


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


def queue_is_full(num_waiting: int, retry_after_s: float) -> QueueFullError:
    return QueueFullError(
        f"{num_waiting} requests already wait for a replica, and no more of yours may; try again "
        "later",
        code="queue_full",
        retry_after_s=retry_after_s,
    )


def too_late(ttft_s: float, limit_s: float, retry_after_s: float) -> QueueFullError:
    return QueueFullError(
        f"the first token would come in {ttft_s:.1f} s, and {limit_s:g} s are promised; try again "
        "later",
        code="overloaded",
        retry_after_s=retry_after_s,
    )


def lost_too_often(num_lost: int, reason: str) -> RequestError:
    return RequestError(
        f"the replicas serving this request were lost {num_lost} times, last: {reason}",
        code="replica_lost",
    )


def cannot_go_on(reason: str) -> UnavailableError:
    return UnavailableError(
        f"the replica that began this answer was lost ({reason}), and no other one can go on with "
        f"it; ask again",
        code="replica_lost",
    )


def out_of_time(request: GenerateRequest) -> RequestTimeoutError:
    return RequestTimeoutError(
        f"the request ran past its limit of {request.timeout_s:g} s; raise the limit or lower "
        f"max_tokens",
        code="timeout",
    )
