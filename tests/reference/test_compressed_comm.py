"""Hidden states in fewer bytes: how wrong they may be, over links and in sums among ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comm_ranks import make_groups, on_all
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.comm.codec import BLOCK, decode, encode, encoded_bytes
from shoal.comm.compressed import CompressedGroup, SumForm
from shoal.core.errors import CommError, WireError
from shoal.wire.curve import make_keys
from shoal.wire.mesh import Mesh
from shoal.wire.peer_messages import Activations, Tokens
from shoal.worker.mesh_transport import MeshTransport
from shoal.worker.stage import FromPeer, Unsent

WIDTH = 96


def states(num_rows: int, width: int, seed: int = 0) -> Tensor:
    """With a few channels far above the rest, as a residual stream has them."""
    generator = torch.Generator().manual_seed(seed)
    numbers_TE = torch.randn(num_rows, width, generator=generator)
    numbers_TE[:, torch.randperm(width, generator=generator)[: width // 72]] *= 300
    return numbers_TE


def there_and_back(numbers_TE: Tensor, form: Any) -> Tensor:
    num_rows, width = numbers_TE.shape
    data = encode(numbers_TE, form)
    assert len(data) == encoded_bytes(num_rows, width, form, numbers_TE.dtype)
    return decode(data, form, num_rows, width, numbers_TE.dtype).float()


def block_largest(numbers_TE: Tensor) -> Tensor:
    """For each number the largest of its block."""
    flat = numbers_TE.abs().reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = padded.amax(1, keepdim=True).expand(-1, BLOCK).reshape(-1)
    return largest[: len(flat)].view_as(numbers_TE)


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 9),
    width=st.integers(1, 200),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e6]),
    seed=st.integers(0, 999),
)
def test_int8_keeps_its_bound(num_rows: int, width: int, scale: float, seed: int) -> None:
    numbers_TE = states(num_rows, width, seed) * scale
    wrong_TE = (there_and_back(numbers_TE, "int8") - numbers_TE).abs()
    bound_TE = torch.maximum(block_largest(numbers_TE) / 253, numbers_TE.abs() / 256)
    assert bool((wrong_TE <= bound_TE * 1.0001).all())


def test_int8_is_far_better_than_its_blocks_where_a_few_channels_stand_out() -> None:
    numbers_TE = states(128, 576)
    ordinary_TE = numbers_TE.abs() < 10
    wrong_TE = (there_and_back(numbers_TE, "int8") - numbers_TE).abs()[ordinary_TE]
    assert wrong_TE.max() < 10 / 253
    assert encode(numbers_TE, "int8").numel() < 1.065 * numbers_TE.numel()


def test_bfloat16_keeps_its_bound_and_exact_is_exact() -> None:
    numbers_TE = states(7, 130)
    assert torch.equal(there_and_back(numbers_TE, "exact"), numbers_TE)
    wrong_TE = (there_and_back(numbers_TE, "bfloat16") - numbers_TE).abs()
    assert bool((wrong_TE <= numbers_TE.abs() / 256).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["exact", "bfloat16", "int8"])
def test_other_types_can_be_coded(form: str, dtype: torch.dtype) -> None:
    numbers_TE = torch.randn(5, 64).to(dtype)
    torch.testing.assert_close(
        there_and_back(numbers_TE, form), numbers_TE.float(), rtol=0.01, atol=0.02
    )


def test_zeros_and_what_is_no_number() -> None:
    numbers_TE = torch.zeros(3, 128)
    assert torch.equal(there_and_back(numbers_TE, "int8"), numbers_TE)
    for strange in (math.inf, math.nan):
        numbers_TE = states(3, 128)
        numbers_TE[1, 5:9] = strange
        assert not bool(there_and_back(numbers_TE, "int8")[1, 5:9].isfinite().any())


def test_columns_that_are_not_there_are_refused() -> None:
    data = encode(states(3, 128), "int8")
    data[:4] = torch.tensor([255, 255, 255, 127], dtype=torch.uint8)
    with pytest.raises(ValueError, match="columns"):
        decode(data, "int8", 3, 128, torch.float32)


# --- sums among ranks ---


def compressed(kind: str, size: int, form: SumForm) -> list[Any]:
    return [CompressedGroup(each, form, WIDTH) for each in make_groups(kind, size)]


def sums_of(groups: list[Any], parts: list[Tensor]) -> list[Tensor]:
    def run(group: Any) -> Tensor:
        mine = parts[group.rank].clone()
        group.all_reduce(mine)
        return mine

    return on_all(groups, run)


@pytest.mark.parametrize("num_rows", [1, 40, 1500])  # the last goes in two steps
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("kind", ["in_process", "gloo"])
def test_sums_keep_their_bound_and_are_the_same_everywhere(
    kind: str, size: int, num_rows: int
) -> None:
    parts = [states(num_rows, WIDTH, seed) for seed in range(size)]
    sums = sums_of(compressed(kind, size, SumForm(((1, "int8"),))), parts)
    assert all(torch.equal(sums[0], each) for each in sums)
    exact = torch.stack(parts).sum(0)
    row_largest = torch.stack(parts).abs().amax(2).sum(0) * (2 if num_rows == 1500 else 1)
    neighbours = torch.nn.functional.max_pool1d(row_largest[None], 3, 1, 1)[0]  # blocks cross rows
    assert bool(((sums[0] - exact).abs() <= neighbours[:, None] / 253 * 1.001).all())
    assert not torch.equal(sums[0], exact)


def test_a_flat_sum_of_kernels_is_coded_too() -> None:
    parts = [states(4, WIDTH, seed) for seed in range(2)]
    form = SumForm(((1, "int8"),))
    shaped = sums_of(compressed("in_process", 2, form), parts)[0]
    flat = sums_of(compressed("in_process", 2, form), [part.view(-1) for part in parts])[0]
    assert torch.equal(shaped.view(-1), flat)


@pytest.mark.parametrize(
    ("steps", "count"), [((), 4 * WIDTH), (((8, "int8"),), 7 * WIDTH), (((1, "int8"),), 50)]
)
def test_what_was_not_chosen_is_summed_exactly(steps: Any, count: int) -> None:
    parts = [torch.randn(count) for _ in range(2)]
    sums = sums_of(compressed("in_process", 2, SumForm(steps)), parts)
    assert torch.equal(sums[0], parts[0] + parts[1])


def test_it_fails_and_begins_anew_as_the_group_inside_does() -> None:
    groups = compressed("in_process", 2, SumForm(((1, "int8"),)))
    groups[0].abort()
    with pytest.raises(CommError):
        groups[1].all_reduce(states(2, WIDTH))
    for group in groups:
        group.reset(1)
    sums_of(groups, [states(2, WIDTH)] * 2)


# --- from worker to worker ---


@pytest.fixture
def pair() -> Iterator[tuple[MeshTransport, list[Any], Mesh]]:
    """A transport, what its peer gets (and what it could not send), and its mesh."""
    keys = make_keys("ab")
    a, b = Mesh(keys["a"]), Mesh(keys["b"])
    a.connect("b", b.address)
    b.connect("a", a.address)
    sender, receiver, came = MeshTransport(a, WIDTH), MeshTransport(b, WIDTH), []
    sender.run(came.append)
    receiver.run(came.append)
    yield sender, came, a


def wait_for(came: list[Any], count: int) -> None:
    import time

    deadline = time.monotonic() + 60
    while len(came) < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def message(step_id: int, num_tokens: int) -> Activations:
    return Activations(0, step_id, num_tokens, "float32")


def test_a_message_is_coded_as_was_chosen_for_its_size(pair: Any) -> None:
    transport, came, _ = pair
    transport.set_forms({"b": ((4, "bfloat16"), (300, "int8"))})
    sent = [states(num_tokens, WIDTH) for num_tokens in (3, 4, 300)]
    for step_id, hidden_TE in enumerate(sent):
        transport.send("b", message(step_id, len(hidden_TE)), hidden_TE)
    wait_for(came, 3)
    by_step = {each.message.step_id: each for each in came}
    assert [by_step[i].message.form for i in range(3)] == ["exact", "bfloat16", "int8"]
    assert torch.equal(by_step[0].hidden_TE, sent[0])
    assert torch.equal(by_step[1].hidden_TE, sent[1].to(torch.bfloat16))
    assert torch.equal(by_step[2].hidden_TE, there_and_back(sent[2], "int8"))
    transport.send("b", Tokens(0, 3, (5,)))
    wait_for(came, 4)
    assert isinstance(came[3], FromPeer)
    assert came[3].message == Tokens(0, 3, (5,))


def test_a_large_message_that_cannot_be_sent_is_told_later(pair: Any) -> None:
    transport, came, mesh = pair
    mesh.disconnect("b")
    with pytest.raises(WireError):
        transport.send("b", message(0, 1), states(1, WIDTH))
    transport.send("b", message(1, 900), states(900, WIDTH))
    wait_for(came, 1)
    assert isinstance(came[0], Unsent)
    assert came[0].message.step_id == 1
    assert isinstance(came[0].error, WireError)


def test_a_message_of_another_length_is_left_out(
    pair: Any, caplog: pytest.LogCaptureFixture
) -> None:
    transport, came, _ = pair
    transport.send("b", message(0, 5), states(4, WIDTH))
    transport.send("b", message(1, 4), states(4, WIDTH))
    wait_for(came, 1)
    assert came[0].message.step_id == 1
    assert "5 tokens" in caplog.text
