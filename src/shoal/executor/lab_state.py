"""What a lab wants of its workers just now: a file that it writes and an executor rereads.

    {"speeds": {"s1.i1.r0": 0.3}, "links": {"a|b": {"cut": true}}}      a, b: workers or hosts

Beside it, in FILE.workers or FILE.workers.REPLICA, the executor writes each worker's process id.
Where there are several replicas, the lab may call a worker REPLICA/WORKER. Read in a directory of
the lab's own; what does not parse is said once and left out. Knows nothing of processes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import msgspec

from shoal.wire.worker_messages import Lab, Link

log = logging.getLogger(__name__)

VARIABLE = "SHOAL_LAB_STATE"
_MAX_BYTES = 1 << 20


class _LinkState(msgspec.Struct):
    """`bandwidth` in bytes per second, `latency` in seconds."""

    cut: bool = False
    bandwidth: float | None = None
    latency: float = 0.0


class _State(msgspec.Struct):
    speeds: dict[str, float] = {}
    links: dict[str, _LinkState] = {}


class LabState:
    """The file of one lab.

    Args:
        hosts: of each worker, the lab's host that it runs on.
        replica: its name; "": there is no other.
    """

    def __init__(self, path: Path, hosts: Mapping[str, str | None], replica: str = "") -> None:
        self._path = path
        self._hosts = hosts
        self._replica = replica
        self._seen: tuple[int, int] | None = None
        self._state = _State()
        self._slowed: set[tuple[str, str]] = set()

    def changed(self) -> bool:
        """Whether the file says something new; then it has been read."""
        try:
            found = self._path.stat()
            seen = (found.st_mtime_ns, found.st_ino)
            if seen == self._seen:
                return False
            self._seen = seen
            with self._path.open("rb") as file:
                self._state = msgspec.json.decode(file.read(_MAX_BYTES), type=_State)
        except (OSError, msgspec.DecodeError) as error:
            if self._path.exists():
                log.warning("the lab's state in %s is left as it was: %s", self._path, error)
            return False
        return True

    def wanted(self, worker: str, planned_speed: float) -> Lab:
        """What holds for one worker; links that are no longer named are as they were before."""
        links: dict[str, Link] = {}
        for peer in self._hosts:
            each = self._link(worker, peer) if peer != worker else None
            if each is not None:
                self._slowed.add((worker, peer))
                links[peer] = Link(each.cut, each.bandwidth, each.latency)
            elif (worker, peer) in self._slowed:
                links[peer] = Link()
        speeds = self._state.speeds
        return Lab(speeds.get(self._full(worker), speeds.get(worker, planned_speed)), links)

    def write_workers(self, pids: Mapping[str, int]) -> None:
        ending = f".workers.{self._replica}" if self._replica else ".workers"
        target = self._path.with_name(self._path.name + ending)
        draft = target.with_name(f"new-{target.name}")
        try:
            draft.write_bytes(msgspec.json.encode(dict(pids)))
            draft.replace(target)
        except OSError as error:
            log.warning("%s could not be written: %s", target, error)

    def _link(self, worker: str, peer: str) -> _LinkState | None:
        """The link between two workers: by their own names, else by their hosts'."""
        full = self._full(worker), self._full(peer)
        for a, b in (full, (worker, peer), (self._hosts[worker], self._hosts[peer])):
            if a is None or b is None:
                continue
            for key in (f"{a}|{b}", f"{b}|{a}"):
                if key in self._state.links:
                    return self._state.links[key]
        return None

    def _full(self, worker: str) -> str:
        return f"{self._replica}/{worker}" if self._replica else worker
