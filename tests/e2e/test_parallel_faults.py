"""Workers that die, freeze, or lose each other under 8 streams: no token is lost or changed."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from parallel_streams import PLANS, Streams, plan_file, workers_of
from server_process import ServerProcess, StartServer

NUM_STREAMS = 8
MAX_TOKENS, FEW = 40, 4
FLOWS_WITHIN_S = 60.0  # the 15 s, on machines that are busy with other things too
HARMS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


@dataclass
class Served:
    """A server, and the file through which a lab would speak with its workers."""

    server: ServerProcess
    state: Path

    def worker(self, name: str) -> psutil.Process:
        return psutil.Process(self.pids()[name])

    def pids(self) -> dict[str, int]:
        found: dict[str, int] = json.loads(Path(f"{self.state}.workers").read_text())
        return found

    def streams(self, max_tokens: int = MAX_TOKENS) -> Streams:
        return Streams(self.server.url, NUM_STREAMS, max_tokens)

    def wait_until_well(self, want: list[list[int]]) -> None:
        """What an earlier harm ended may still be loading."""
        assert self.streams(FEW).results() == [tokens[:FEW] for tokens in want]

    @contextmanager
    def cut(self, link: str) -> Iterator[None]:
        self._say({link: {"cut": True}})
        yield
        self._say({})

    def _say(self, links: dict[str, Any]) -> None:
        draft = self.state.with_name("next")
        draft.write_text(json.dumps({"links": links}))
        draft.replace(self.state)


@pytest.fixture(scope="module")
def two_ranks(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return serve(start_server, tmp_path_factory.mktemp("ranks"), "two ranks")


@pytest.fixture(scope="module")
def two_instances(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return serve(start_server, tmp_path_factory.mktemp("instances"), "two instances")


@pytest.fixture(scope="module")
def want(two_ranks: Served) -> list[list[int]]:
    return two_ranks.streams().results()


@pytest.mark.parametrize("harm", HARMS)
def test_a_lost_rank_costs_no_token(two_ranks: Served, want: list[list[int]], harm: str) -> None:
    _check_harm(two_ranks, want, harm, "s0.i0.r1")


@pytest.mark.parametrize(
    ("harm", "worker"), [("killed", "s0.i0.r0"), ("stopped", "s1.i1.r0"), ("killed", "s2.i3.r0")]
)
def test_a_lost_stage_costs_no_token(
    two_instances: Served, want: list[list[int]], harm: str, worker: str
) -> None:
    """The first, the last, and one of the two in the middle, whose work the other takes."""
    _check_harm(two_instances, want, harm, worker)


def test_a_cut_link_costs_no_token(two_instances: Served, want: list[list[int]]) -> None:
    """Around it while there is another route, and after it was mended where there is none."""
    two_instances.wait_until_well(want)
    before = two_instances.pids()
    assert sorted(before) == ["s0.i0.r0", "s1.i1.r0", "s1.i2.r0", "s2.i3.r0"]
    with two_instances.cut("s0.i0.r0|s1.i1.r0"):
        assert two_instances.streams().results() == want
    streams = two_instances.streams()
    streams.wait_until_each_has(4)
    with two_instances.cut("s0.i0.r0|s2.i3.r0"):  # where all tokens come back
        time.sleep(4.0)
        began_s = time.monotonic()
    assert streams.results() == want
    assert streams.longest_gap_s(began_s) < FLOWS_WITHIN_S
    assert two_instances.pids() == before, "workers that are alive are not started again"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_of_a_server_however_it_goes(
    start_server: StartServer, tmp_path: Path, how: signal.Signals
) -> None:
    """Though one of its workers cannot hear that it is over."""
    server = serve(start_server, tmp_path, "three stages", "--drain-timeout", "1").server
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert len(workers_of(server)) == 3
    workers_of(server)[1].suspend()
    server.process.send_signal(how)
    server.process.wait(60)
    end = time.monotonic() + 60
    while any(_is_alive(child) for child in children):
        assert time.monotonic() < end, [child for child in children if _is_alive(child)]
        time.sleep(0.05)


def serve(start_server: StartServer, folder: Path, plan: str, *flags: str) -> Served:
    state = folder / "lab.json"
    state.write_text("{}")
    server = start_server(
        *("--dtype", "float32", "--plan", str(plan_file(folder, PLANS[plan]))),
        *flags,
        env={"SHOAL_LAB_STATE": str(state)},
    )
    return Served(server, state)


def _check_harm(served: Served, want: list[list[int]], harm: str, worker: str) -> None:
    served.wait_until_well(want)
    streams = served.streams()
    streams.wait_until_each_has(4)
    victim = served.worker(worker)
    began_s = time.monotonic()
    victim.send_signal(HARMS[harm])
    assert streams.results() == want
    assert streams.longest_gap_s(began_s) < FLOWS_WITHIN_S
    assert not _is_alive(victim), "a stopped worker is ended"


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
