"""Experts that stay on disk give the logits of experts in memory, to the bit, or an error."""

from __future__ import annotations

import importlib
import logging
import os
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_chain import Chain, one_stage, random_split
from expert_models import expert_checkpoint
from paging import PagedRun, run_mixed_steps
from test_compiled import ISAS, SESSIONS
from test_compiled_experts import equal, random_dealing

from shoal import LLM, SamplingParams
from shoal.core.errors import DeviceError
from shoal.core.split import cut
from shoal.kernels.cpu.step import Session
from shoal.model import expert_store, packed_weights
from shoal.model.disk_room import DiskRoom, LayerSize, choose_room, experts_read_s, layers_read_s
from shoal.model.expert_store import pieces
from shoal.model.packed_decoder import PackedDecoder
from shoal.model.spec import read_spec
from shoal.model.weights import load_decoder
from shoal.worker.disk_experts import predict_experts

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WIDE: dict[str, Any] = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Experts that a layer has room for, instead of what memory allows."""
    wanted = [2]

    def choose(layers: Sequence[LayerSize], tables: int, memory_bytes: int | None) -> DiskRoom:
        return DiskRoom(expert_slots=tuple(min(wanted[0], each.num_experts) for each in layers))

    monkeypatch.setattr(packed_weights, "choose_room", choose)
    return wanted


def open_packed(folder: Path, session: Session, **options: Any) -> PackedDecoder:
    options = {"dtype": torch.float32, **options}
    spec = read_spec(folder)
    decoder = load_decoder(folder, spec, device=torch.device("cpu"), kernels=session, **options)
    assert isinstance(decoder, PackedDecoder)
    return decoder


def in_memory(folder: Path, session: Session | None = None, **options: Any) -> PackedDecoder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_weights, "choose_room", choose_room)
        return open_packed(folder, session or Session(1), **options)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["mixtral", "qwen2-mixed", "qwen3-mixed"])
def test_logits_are_those_of_memory(name: str, isa: str, tmp_path: Path, slots: list[int]) -> None:
    folder, session = expert_checkpoint(tmp_path, name), SESSIONS[isa]
    expected = run_mixed_steps(in_memory(folder, session))
    for slots[0] in (1, 3, 100):
        decoder = open_packed(folder, session)
        assert equal(expected, run_mixed_steps(decoder))
        assert decoder.store is not None
        assert decoder.store.num_uses >= decoder.store.num_reads > 0


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_precision_and_threads_do_not_matter(
    quantize: Any, tmp_path: Path, slots: list[int]
) -> None:
    folder = expert_checkpoint(tmp_path, "qwen2", **WIDE)
    options = {"dtype": torch.bfloat16, "quantize": quantize}
    expected = run_mixed_steps(in_memory(folder, **options))
    for threads in (1, 2, 3):
        assert equal(expected, run_mixed_steps(open_packed(folder, Session(threads), **options)))


@pytest.mark.parametrize("has_experts_only", [False, True])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_have_disks_of_their_own(
    num_ranks: int, has_experts_only: bool, tmp_path: Path, slots: list[int]
) -> None:
    """Any dealing, with experts on several ranks; the same as with all in memory."""
    rng = random.Random(num_ranks)
    folder = expert_checkpoint(tmp_path, "qwen3")
    spec = read_spec(folder)
    assert spec.experts is not None
    dealing = random_dealing(spec.experts.num_experts, num_ranks, rng)
    split = replace(random_split(spec, num_ranks, rng), experts=(dealing,))
    shares = [1.0] * num_ranks
    if has_experts_only:
        shares = [1.0, *[0.0] * (num_ranks - 1)]
        split = replace(split, heads=cut(spec.num_heads, shares), ffn=cut(spec.ffn_size, shares))
    split = replace(split, vocab=cut(spec.vocab_size, shares))
    on_disk = Chain(folder, one_stage(spec, split), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_weights, "choose_room", choose_room)
        memory = Chain(folder, one_stage(spec, split), None)
    assert all(rank.store is not None for rank in on_disk.ranks[0])
    assert all(rank.store is None for rank in memory.ranks[0])
    assert equal(run_mixed_steps(memory), run_mixed_steps(on_disk))


def kept_file(cache: Path) -> Path:
    """That of the experts: the other has the rest of the weights, where it took long to pack."""
    return max((cache / "packed").glob("*.bin"), key=lambda path: path.stat().st_size)


def test_a_named_file_serves_the_next_start(
    tmp_path: Path, slots: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = expert_checkpoint(tmp_path / "model", "qwen3")
    expected = run_mixed_steps(open_packed(folder, Session(1), fingerprint="x"))
    before = kept_file(tmp_path / "cache").stat().st_mtime_ns
    slots[0] = 3  # another memory, the same experts
    assert equal(expected, run_mixed_steps(open_packed(folder, Session(1), fingerprint="x")))
    assert kept_file(tmp_path / "cache").stat().st_mtime_ns == before


def test_damage_is_found_before_the_first_step(tmp_path: Path, slots: list[int]) -> None:
    folder = expert_checkpoint(tmp_path / "model", "qwen3")
    open_packed(folder, Session(1), fingerprint="x")
    flip(kept_file(tmp_path / "cache"), -1)
    with pytest.raises(DeviceError, match="layer 2 are damaged on disk; remove"):
        open_packed(folder, Session(1), fingerprint="x")


@pytest.mark.parametrize("damage", ["flipped", "cut", "fails"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_disk_that_fails_in_the_middle_is_an_error(
    damage: str, threads: int, tmp_path: Path, slots: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where the disk is well again, logits are right again."""
    folder = expert_checkpoint(tmp_path / "model", "qwen3")
    expected = run_mixed_steps(in_memory(folder))
    decoder = open_packed(folder, Session(threads), fingerprint="x")
    assert equal(expected, run_mixed_steps(decoder))
    path = kept_file(tmp_path / "cache")
    data = path.read_bytes()
    with monkeypatch.context() as patch:
        if damage == "flipped":
            for place in range(4096, len(data), 512):
                flip(path, place)
        elif damage == "cut":
            os.truncate(path, 5000)
        else:
            patch.setattr("shoal.model.layer_file.os.preadv", failing_read)
        with pytest.raises(DeviceError, match=r"damaged on disk|can't be read"):
            run_mixed_steps(decoder)
    path.write_bytes(data)
    assert equal(expected, run_mixed_steps(decoder))


def test_a_file_that_is_removed_is_still_there_for_who_has_it_open(
    tmp_path: Path, slots: list[int]
) -> None:
    folder = expert_checkpoint(tmp_path / "model", "qwen3")
    expected = run_mixed_steps(in_memory(folder))
    decoder = open_packed(folder, Session(1), fingerprint="x")
    kept_file(tmp_path / "cache").unlink()
    assert equal(expected, run_mixed_steps(decoder))


def test_what_was_found_is_said_now_and_then(
    tmp_path: Path, slots: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    decoder = open_packed(expert_checkpoint(tmp_path, "qwen3"), Session(1))
    run = PagedRun(decoder)
    sequence = run.add([5] * 140)
    with caplog.at_level(logging.INFO, expert_store.__name__):
        for position in range(140):
            run.step((sequence, position, position + 1))
    found = [re.search(r"in (\d+) steps (\d+) % of those", line) for line in caplog.messages]
    steps = [int(match[1]) for match in found if match]
    assert steps == [64, 64]
    assert all(0 <= int(match[2]) <= 100 for match in found if match)


def test_pieces_are_whole_pages_and_come_to_the_whole() -> None:
    for size in (64, 4096, 300_000, 1_000_000, 1_671_168, 99_000_000):
        parts = pieces(size)
        assert sum(parts) == size
        assert 1 <= len(parts) <= 4
        assert all(part % 4096 == 0 for part in parts[:-1])
    assert len(pieces(4 << 20)) == 4


def mixture(num_experts: int = 16, num_active: float = 2.0, count: int = 8) -> list[LayerSize]:
    layer = LayerSize(
        other_bytes=1 << 20,
        expert_bytes=1 << 20,
        num_experts=num_experts,
        num_active=num_active,
    )
    return [layer] * count


def test_what_costs_less_is_taken() -> None:
    layers, tables = mixture(), 4 << 20
    total = tables + sum(each.bytes for each in layers)
    assert choose_room(layers, tables, None) == DiskRoom()
    assert choose_room(layers, tables, total) == DiskRoom()
    half = choose_room(layers, tables, total // 2)
    assert not half.layers
    assert half.slot_bytes(layers) + tables + (8 << 20) <= total // 2
    assert half.slot_bytes(layers) + tables + (9 << 20) > total // 2
    assert half.instead_bytes is not None
    # Many small reads cost more than few large ones, where a token wants all experts.
    small = [LayerSize(other_bytes=1 << 16, expert_bytes=1 << 16, num_experts=16, num_active=16)]
    assert choose_room(small * 8, 0, 8 * 17 << 15).layers
    plain = [LayerSize(other_bytes=17 << 20)] * 8
    assert choose_room(plain, tables, total // 2).layers


def test_the_estimates_are_those_of_the_words() -> None:
    layers = mixture()
    assert layers_read_s(layers, (0, 3)) == pytest.approx(2 * (17 << 20) / 5e8)
    each = 3e-4 + (1 << 20) / 5e8
    assert experts_read_s(layers, (4,) * 8) == pytest.approx(8 * 2 * 0.75 * each)


def test_experts_fit_where_two_layers_do_not() -> None:
    layers = mixture(num_experts=64, count=2)
    tight = choose_room(layers, 0, (2 << 20) + (10 << 20))
    assert tight.expert_slots == (5, 5)
    assert tight.instead_bytes is None
    with pytest.raises(DeviceError, match="give more memory"):
        choose_room(layers, 0, 3 << 20)


def test_reading_is_waited_for() -> None:
    times = predict_experts(
        num_bytes=6_000_000,
        bandwidth_bytes_per_s=1e9,
        wanted=16.0,
        missing=8.0,
        expert_bytes=125_000,
        read_s=0.001,
        instead_bytes=12_500_000,
    )
    assert times.experts.in_memory_s == pytest.approx(0.01)
    assert times.experts.from_disk_s == pytest.approx(0.018)
    assert times.found == 0.5
    assert times.layers_s == pytest.approx(0.1)


def test_a_model_larger_than_its_memory_gives_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    maker = importlib.import_module("random_moe")
    shape = maker.Shape(
        num_layers=2, hidden_size=128, num_heads=2, num_kv_heads=1, num_experts=32, expert_size=64
    )
    folder = maker.write_model(tmp_path / "model", shape)
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    prompts = [[1, 2, 3], list(range(5, 100)), [9] * 20]
    said: list[str] = []

    def tokens(**options: Any) -> list[tuple[int, ...]]:
        with LLM(str(folder), max_model_len=256, say=said.append, **options) as llm:
            return [each.choices[0].token_ids for each in llm.generate(prompts, sampling)]

    expected = tokens()
    assert not [line for line in said if line.startswith("on disk")]
    assert tokens(weights_memory_bytes=2_000_000) == expected
    (line,) = [line for line in said if line.startswith("on disk")]
    match = re.search(r"(\d+) experts, .* on disk, (\d+) of them in memory", line)
    assert match is not None
    assert int(match[1]) == 64
    assert 2 <= int(match[2]) < 64


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def failing_read(fd: int, buffers: object, offset: int) -> int:
    raise OSError(5, "Input/output error")
