"""One of torch's backends, made anew for each incarnation: what gloo and NCCL have in common.

No default process group is touched. Knows nothing of which backend it is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from shoal.comm.store import PrefixStore, Store
from shoal.core.errors import CommError

_LOOK_INTERVAL = timedelta(milliseconds=20)
_POLL_INTERVAL_S = 20e-6


class RestartableBackend:
    """
    Args:
        make: a backend from a store that is its own.
        store: reaches all ranks.
        deadline_s: of each collective.

    Raises:
        CommError: the ranks did not find each other.
    """

    def __init__(self, make: Callable[[Store], Any], store: Store, deadline_s: float) -> None:
        self._make, self._store, self._deadline_s = make, store, deadline_s
        self._incarnation = 0
        self._has_failed = False
        self._backend: Any = None
        self._start()

    def run(self, start: Callable[[Any], Any]) -> None:
        """Start a collective of the backend, and wait until it is done.

        Raises:
            CommError: aborted, late, or failed by the backend itself.
        """
        self.wait(self.begin(start))

    def begin(self, start: Callable[[Any], Any]) -> Any:
        if self._has_failed:
            raise CommError(f"the collectives of incarnation {self._incarnation} were aborted")
        try:
            return start(self._backend)
        except RuntimeError as error:
            raise self._failure(error) from error

    def wait(self, work: Any) -> None:
        """In short waits: this is where an abort is seen."""
        deadline = time.monotonic() + self._deadline_s
        while not self._has_failed:
            try:
                work.wait(_LOOK_INTERVAL)
                return
            except RuntimeError:
                if work.is_completed():  # it failed, or ended just after the look
                    self._end(work)
                    return
            if time.monotonic() > deadline:
                raise self._failure(f"a rank did not come within {self._deadline_s} s")
        raise CommError(f"the collectives of incarnation {self._incarnation} were aborted")

    def poll(self, is_done: Callable[[], bool]) -> None:
        """Wait for what the backend queued on a device."""
        deadline = time.monotonic() + self._deadline_s
        while not is_done():
            if time.monotonic() > deadline:
                self.abort()  # or what is queued would wait for ever
                raise self._failure(f"a rank did not come within {self._deadline_s} s")
            time.sleep(_POLL_INTERVAL_S)
        if self._has_failed:
            raise CommError(f"the collectives of incarnation {self._incarnation} were aborted")

    def abort(self) -> None:
        """On this rank; the others see it when they are aborted too, or at their deadline."""
        self._has_failed = True
        if (backend := self._backend) is not None:
            backend.abort()

    def reset(self, incarnation: int) -> None:
        self.close()
        self._incarnation = incarnation
        self._start()
        self._has_failed = False

    def close(self) -> None:
        # Its end waits for the collectives that hang in it, at most until their deadline.
        retired, self._backend = [self._backend], None
        threading.Thread(target=retired.clear, name="shoal-comm-retired", daemon=True).start()

    def _start(self) -> None:
        try:
            self._backend = self._make(PrefixStore(str(self._incarnation), self._store))
        except (RuntimeError, TimeoutError) as error:
            raise CommError(f"the ranks did not find each other: {error}") from error

    def _end(self, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._failure(error) from error

    def _failure(self, reason: object) -> CommError:
        self._has_failed = True
        return CommError(f"a collective of incarnation {self._incarnation} failed: {reason}")
