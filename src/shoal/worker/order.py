"""Which Step an instance runs next: first come, first served within a route.

    route 0   [ 3 ][ 5 ][ 6 ]       the head of each route may run once its input is here
    route 1   [ 4 ][ 7 ]            (activations, or tokens that it names)

An instance on one route needs no word about it. On several, whichever head is ready may run;
then the first rank of the instance decides, and the others follow it. Knows nothing of tensors,
of how messages travel, or of what a Step computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from shoal.core.step import Step

Ready = Callable[[Step], bool]


class StepOrder:
    """Steps that came and have not run.

    Args:
        follows: whether another rank decides (`note_decision`).
    """

    def __init__(self, *, follows: bool) -> None:
        self._follows = follows
        self._routes: dict[int, deque[Step]] = {}
        self._decisions: deque[int] = deque()

    def add(self, step: Step) -> None:
        self._routes.setdefault(step.route, deque()).append(step)

    def note_decision(self, step_id: int) -> None:
        """The next Step to run, after those decided before."""
        self._decisions.append(step_id)

    def take(self, is_ready: Ready) -> Step | None:
        """The Step to run now, if there is one; it is no longer here."""
        route = self._decided() if self._follows else self._first(is_ready)
        if route is None or not is_ready(self._routes[route][0]):
            return None
        if self._follows:
            self._decisions.popleft()
        step = self._routes[route].popleft()
        if not self._routes[route]:
            del self._routes[route]
        return step

    def clear(self) -> None:
        self._routes.clear()
        self._decisions.clear()

    def _decided(self) -> int | None:
        if not self._decisions:
            return None
        wanted = self._decisions[0]
        return next((r for r, steps in self._routes.items() if steps[0].step_id == wanted), None)

    def _first(self, is_ready: Ready) -> int | None:
        """The route whose ready head is the oldest."""
        heads = [(s[0].step_id, r) for r, s in self._routes.items() if is_ready(s[0])]
        return min(heads)[1] if heads else None
