"""Work for a client that is given up when the client is gone.

Our own server (`bounded_http.py`) says so by a call; of any other a task waits for ASGI's
`http.disconnect`, which costs as much as all that is asked of the router.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.types import Receive, Scope

HANG_UP = "hang_up"
"""Of a request's state: the `HangUp` of its connection."""


class HangUp:
    """Of one connection, which serves one request at a time.

    Args:
        cut: ends the connection at once, whatever waits to be sent.

    Attributes:
        has_come: nobody is there any more.
    """

    __slots__ = ("_tell", "cut", "has_come")

    def __init__(self, cut: Callable[[], None]) -> None:
        self.cut = cut
        self.has_come = False
        self._tell: Callable[[], None] | None = None

    def comes(self) -> None:
        self.has_come = True
        if self._tell is not None:
            self._tell()

    def tells(self, whom: Callable[[], None]) -> None:
        """Call it when the client is gone, or at once if it is."""
        self._tell = whom
        if self.has_come:
            whom()

    def tells_no_more(self, whom: Callable[[], None]) -> None:
        """Another request of the connection may be next already."""
        if self._tell is whom:
            self._tell = None


async def unless_hung_up(scope: Scope, receive: Receive, work: Awaitable[None]) -> None:
    """Does `work`, giving it up as soon as the client is gone; the body has been read."""
    task = asyncio.current_task()
    assert task is not None
    is_gone = False

    def leave() -> None:
        nonlocal is_gone
        is_gone = True
        task.cancel()

    hang_up: HangUp | None = scope.get("state", {}).get(HANG_UP)
    watching: asyncio.Task[None] | None = None
    if hang_up is None:
        watching = asyncio.ensure_future(_watch(receive, leave))
    else:
        hang_up.tells(leave)
    try:
        await work
    except asyncio.CancelledError:
        # Others may cancel this task too, and are not to be overheard.
        if not is_gone or task.uncancel():
            raise
    finally:
        if watching is not None:
            watching.cancel()
        elif hang_up is not None:
            hang_up.tells_no_more(leave)


async def _watch(receive: Receive, leave: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    leave()
