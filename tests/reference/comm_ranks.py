"""Groups of every kind in threads of one process, for tests."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from shoal.comm import Group
from shoal.comm.gloo import GlooGroup
from shoal.comm.in_process import in_process_groups
from shoal.comm.memory import create_memory
from shoal.comm.shared_memory import SharedMemoryGroup
from shoal.comm.store import MessageStore

KINDS = ("in_process", "shared_memory", "gloo")


class Board:
    """Where ranks of one process leave their addresses."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.changed = threading.Condition()

    def put(self, key: str, value: bytes) -> None:
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def get(self, key: str, timeout_s: float) -> bytes:
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout_s):
                raise TimeoutError(f"nobody put {key}")
            return self.values[key]

    def store(self, timeout_s: float = 60) -> MessageStore:
        return MessageStore(self.put, self.get, timeout_s)


def make_groups(kind: str, size: int, deadline_s: float = 60) -> list[Any]:
    if kind == "in_process":
        return list(in_process_groups(size, deadline_s))
    if kind == "gloo":
        board = Board()
        stores = [board.store() for _ in range(size)]
        return each_in_a_thread(
            lambda rank: GlooGroup(stores[rank], rank, size, "127.0.0.1", deadline_s=deadline_s),
            range(size),
        )
    fd = create_memory(size)
    try:
        return [SharedMemoryGroup(fd, rank, size, deadline_s=deadline_s) for rank in range(size)]
    finally:
        os.close(fd)


def each_in_a_thread(work: Callable[[Any], Any], over: Any) -> list[Any]:
    """Results in order; an exception is a result too."""

    def run(one: Any) -> Any:
        try:
            return work(one)
        except Exception as error:  # noqa: BLE001  it is looked at by the test
            return error

    ranks = list(over)
    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(run, ranks))


def on_all(groups: list[Group], work: Callable[[Group], Any]) -> list[Any]:
    """`work` on every rank at once; the first exception is raised."""
    results = each_in_a_thread(work, groups)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
