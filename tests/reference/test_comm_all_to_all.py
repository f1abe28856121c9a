"""`all_to_all` of every kind: parts of any length, many in a row, and what goes wrong."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from comm_ranks import KINDS, each_in_a_thread, make_groups, on_all
from torch import Tensor

from shoal.comm import Group
from shoal.comm.gloo import GlooGroup
from shoal.core.errors import CommError
from shoal.worker.groups import _OnHost

LOCAL = ("in_process", "shared_memory")


def part(source: int, target: int, count: int, rest: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    numbers = torch.arange(count * torch.Size(rest).numel()) * 7 + 100 * source + target
    return (numbers % 251).to(dtype).view(count, *rest)


def check_exchange(
    groups: list[Group],
    counts: list[list[int]],
    rest: tuple[int, ...] = (3,),
    dtype: torch.dtype = torch.float32,
) -> None:
    """counts[a][b] rows go from rank a to rank b."""
    size = len(groups)

    def run(group: Group) -> list[Tensor]:
        mine = group.rank
        return group.all_to_all(
            [part(mine, to, counts[mine][to], rest, dtype) for to in range(size)]
        )

    for mine, arrived in enumerate(on_all(groups, run)):
        assert len(arrived) == size
        for source, got in enumerate(arrived):
            want = part(source, mine, counts[source][mine], rest, dtype)
            assert got.dtype == dtype
            assert got.shape == want.shape
            assert torch.equal(got, want)


@pytest.mark.parametrize("size", range(1, 6))
@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_any_length_arrive(kind: str, size: int) -> None:
    groups, rng = make_groups(kind, size), random.Random(size)
    check_exchange(groups, [[0] * size for _ in range(size)])
    for largest in (1, 5, 400, 40_000):  # 40,000 rows of 12 bytes: several pieces
        counts = [
            [rng.choice([0, largest, rng.randrange(largest + 1)]) for _ in range(size)]
            for _ in range(size)
        ]
        check_exchange(groups, counts)
    one_way = [[30_000 if (a, b) == (0, size - 1) else 0 for b in range(size)] for a in range(size)]
    check_exchange(groups, one_way)
    for group in groups:
        group.close()


@pytest.mark.parametrize("rest", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_any_kind(kind: str, dtype: torch.dtype, rest: tuple[int, ...]) -> None:
    check_exchange(make_groups(kind, 3), [[1, 2, 3], [0, 7, 0], [4, 0, 1]], rest, dtype)


def test_parts_that_just_fill_a_piece() -> None:
    """A piece has 256 KiB, and a table of sizes at its head."""
    for size in (1, 2, 3):
        groups = make_groups("shared_memory", size)
        room = (256 << 10) - 8 * size
        for total in (room - 1, room, room + 1, 2 * room, 2 * room + 1):
            counts = [[0] * (size - 1) + [total] for _ in range(size)]
            check_exchange(groups, counts, (), torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_that_are_not_contiguous(kind: str) -> None:
    wide = torch.arange(24).view(4, 6)
    parts = [wide[:, ::2], wide.T[:, :3]]
    arrived = on_all(make_groups(kind, 2), lambda group: group.all_to_all(parts))
    for got, want in zip(arrived, parts, strict=True):
        assert all(torch.equal(each, want) for each in got)


@pytest.mark.parametrize("kind", KINDS)
def test_it_takes_turns_with_the_other_collectives(kind: str) -> None:
    """Slots alternate: a rank that ran ahead must not overwrite what another still reads."""
    groups, size = make_groups(kind, 3), 3
    rng = random.Random(4)
    rounds = 12 if kind == "gloo" else 60
    counts = [
        [[rng.choice([0, 3, 9_000, 30_000]) for _ in range(size)] for _ in range(size)]
        for _ in range(rounds)
    ]

    def run(group: Group) -> None:
        mine = group.rank
        for number, table in enumerate(counts):
            value = float(number * 9 + mine)
            parts = [torch.full((count, 4), value) for count in table[mine]]
            arrived = group.all_to_all(parts)
            for source, got in enumerate(arrived):
                assert got.shape == (table[source][mine], 4)
                assert (got == number * 9 + source).all()
            total = torch.full((20_000,), float(number))
            group.all_reduce(total)
            assert (total == 3 * number).all()
            assert group.all_gather(torch.tensor([mine])).tolist() == [[0], [1], [2]]

    on_all(groups, run)


@pytest.mark.parametrize("kind", KINDS)
def test_an_abort_ends_the_call_and_a_reset_begins_anew(kind: str) -> None:
    groups, some = make_groups(kind, 3), [torch.ones(20_000, 2)] * 3
    aborter = threading.Timer(0.3, groups[0].abort)
    aborter.start()
    with pytest.raises(CommError, match="aborted"):
        groups[0].all_to_all(some)  # the others never come
    aborter.join()
    for group in groups[1:]:
        if kind == "gloo":
            group.abort()
        with pytest.raises(CommError):
            group.all_to_all(some)
    on_all(groups, lambda group: group.reset(1))
    check_exchange(groups, [[1, 0, 40_000], [2, 2, 2], [0, 0, 0]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_never_comes_is_noticed_at_the_deadline(kind: str) -> None:
    groups = make_groups(kind, 2, deadline_s=0.5)
    with pytest.raises(CommError):
        groups[0].all_to_all([torch.ones(3)] * 2)


@pytest.mark.parametrize("kind", LOCAL)
def test_ranks_that_come_to_different_collectives_are_told(kind: str) -> None:
    groups = make_groups(kind, 2)

    def run(group: Group) -> None:
        if group.rank:
            group.all_reduce(torch.zeros(4))
        else:
            group.all_to_all([torch.zeros(2, 2)] * 2)

    assert all(isinstance(error, CommError) for error in each_in_a_thread(run, groups))


def test_rows_of_different_sizes_are_told() -> None:
    for kind in LOCAL:
        groups = make_groups(kind, 2)
        errors = each_in_a_thread(
            lambda group: group.all_to_all([torch.zeros(1, 2 + group.rank)] * 2), groups
        )
        assert any(isinstance(error, CommError) for error in errors)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([torch.zeros(1)], "1 parts for 2 ranks"),
        ([torch.zeros(1, 2), torch.zeros(1, 3)], "first dimension only"),
        ([torch.zeros(1), torch.zeros(1).half()], "first dimension only"),
        ([torch.zeros(()), torch.zeros(())], "first dimension only"),
        ([torch.zeros(3, 0), torch.zeros(1, 0)], "no bytes"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_sent_is_refused(kind: str, parts: list[Tensor], reason: str) -> None:
    with pytest.raises(CommError, match=reason):
        make_groups(kind, 2)[0].all_to_all(parts)


def test_shared_memory_takes_what_is_on_the_cpu() -> None:
    with pytest.raises(CommError, match="meta"):
        make_groups("shared_memory", 1)[0].all_to_all([torch.zeros(3, device="meta")])


def test_a_device_among_hosts_exchanges_through_the_host() -> None:
    groups = make_groups("gloo", 2)
    assert isinstance(groups[1], GlooGroup)
    check_exchange([groups[0], _OnHost(groups[1])], [[2, 1], [0, 5]])
