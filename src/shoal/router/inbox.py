"""Outputs of one request on their way from the router to the one task that reads them.

A reader that keeps up gets every output as it came. One that fell behind (a slow client, a busy
server) gets those that wait as one, so that work per token falls as load rises. A reader that
waits may have left word what to do with most outputs (`Take`), and is woken for the others
only: a task woken for every token costs more than all that is done with the token. Knows
nothing of replicas.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from shoal.core.request import Output

Take = Callable[[Output, float], bool]
"""Told the time too. Does all there is to do about an output, at once, or returns False and
leaves it alone."""


class Inbox:
    """An unbounded queue with one reader; a request bounds its outputs itself.

    Args:
        take: asked first while the reader waits, which has then seen all that came before.
    """

    __slots__ = ("_loop", "_outputs", "_take", "_waiter")

    def __init__(self, take: Take | None = None) -> None:
        # Asking for it at every token costs a system call each time.
        self._loop = asyncio.get_running_loop()
        self._take = take
        self._outputs: list[Output] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: Output, now: float) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():
            self._outputs.append(output)
        elif self._take is None or not self._take(output, now):
            self._outputs.append(output)
            waiter.set_result(None)

    async def get(self) -> Output:
        """What there is, as one output; waits while there is nothing."""
        if not self._outputs:
            self._waiter = self._loop.create_future()
            await self._waiter
        waiting, self._outputs = self._outputs, []
        if len(waiting) == 1:
            return waiting[0]
        if waiting[-1].finish in ("error", "cancelled"):
            # Not to be mixed with what went well before.
            self._outputs.append(waiting.pop())
        return type(waiting[-1]).joined(waiting)
