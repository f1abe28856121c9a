"""Experts dealt over HTTP: the tokens of one device, while they move and after a worker is lost."""

from __future__ import annotations

import importlib
import time
from pathlib import Path

import pytest
import torch
from parallel_streams import Streams, plan_file, workers_of
from server_process import ServerProcess, StartServer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FLAGS = ("--dtype", "float32", "--max-model-len", "1024")
NUM_STREAMS, MAX_TOKENS = 6, 500
PLAN = """\
stages:
  - devices: [{device: cpu, threads: 1}, {device: cpu, threads: 1}]
    split: {heads: [3, 1], experts: [[], [0-6]]}
"""
EXPERTS_ONLY = """\
stages:
  - devices: [{device: cpu, threads: 1}, {device: cpu, threads: 1}]
    split: {heads: [4, 0], ffn: [64, 0], vocab: [320, 0], experts: [[], [0-6]]}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of 6 experts, 2 of them active, two of them hot."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        maker = importlib.import_module("random_moe")
    shape = maker.Shape(
        **{"num_layers": 3, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2},
        **{"num_experts": 6, "expert_size": 64, "vocab_size": 320, "hot": (4, 5), "heat": 2.0},
    )
    folder: Path = maker.write_model(tmp_path_factory.mktemp("moe"), shape, torch.float32)
    return folder


@pytest.fixture(scope="module")
def want(model: Path, start_server: StartServer) -> list[list[int]]:
    """On one device."""
    alone = start_server(*FLAGS, model=model)
    found = Streams(alone.url, NUM_STREAMS, MAX_TOKENS).results()
    alone.stop()
    return found


@pytest.mark.parametrize(("plan", "lost"), [(PLAN, 0), (EXPERTS_ONLY, 1)], ids=["sum", "exchange"])
def test_experts_move_while_streams_run(
    plan: str,
    lost: int,
    model: Path,
    want: list[list[int]],
    start_server: StartServer,
    tmp_path: Path,
) -> None:
    """Also to and from a rank with experts only, and after the loss of that one."""
    server = start_server(*FLAGS, "--plan", str(plan_file(tmp_path, plan)), model=model)
    assert not _lines(server, "plain torch")
    found = []
    while not _lines(server, "is in use"):
        assert len(found) < 10, "experts stay where they are:\n" + "\n".join(server.lines)
        found.append(Streams(server.url, NUM_STREAMS, MAX_TOKENS).results())
    (dealt, *_) = _lines(server, "are dealt anew")
    assert "experts of instance 0 are dealt anew (dealing 1)" in dealt
    found.append(Streams(server.url, NUM_STREAMS, MAX_TOKENS).results())
    assert all(each == want for each in found)

    # Who is started again has what was dealt last.
    streams = Streams(server.url, NUM_STREAMS, MAX_TOKENS)
    streams.wait_until_each_has(50)
    workers_of(server)[lost].kill()
    assert streams.results() == want
    assert _lines(server, "incarnation 1 begins")


def test_experts_stay_when_told_to(model: Path, start_server: StartServer, tmp_path: Path) -> None:
    plan = str(plan_file(tmp_path, PLAN))
    server = start_server(*FLAGS, "--plan", plan, "--no-expert-redeal", model=model)
    began_s = time.monotonic()
    while time.monotonic() - began_s < 4:
        Streams(server.url, NUM_STREAMS, MAX_TOKENS).results()
    assert not _lines(server, "dealt anew")


def _lines(server: ServerProcess, words: str) -> list[str]:
    return [line for line in list(server.lines) if words in line]
