"""Layers that are read from disk ahead of their use."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shoal import LLM, SamplingParams
from shoal.core.errors import DeviceError
from shoal.core.options import DType
from shoal.model.layer_file import LayerFile
from shoal.model.streaming import LayerStream, spread
from shoal.worker import memory
from shoal.worker.disk_layers import StepTimes, predict
from shoal.worker.memory import free_memory_bytes

SIZES = (5000, 4096, 7, 5000, 100)
LAYERS = (1, 2, 4, 7, 8)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def content(index: int) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randint(0, 256, (SIZES[index],), dtype=torch.uint8, generator=generator)


def make_file(folder: Path, path: Path | None = None) -> LayerFile:
    return LayerFile(path, folder, SIZES, content)


def make_stream(file: LayerFile, num_slots: int = 2) -> tuple[LayerStream, list[Tensor]]:
    slots = [torch.zeros(max(SIZES), dtype=torch.uint8) for _ in range(num_slots)]
    return LayerStream(file, LAYERS, slots, torch.zeros(8, dtype=torch.uint8)), slots


def check(stream: LayerStream, slots: list[Tensor], ordinal: int) -> None:
    stream.acquire(LAYERS[ordinal])
    assert torch.equal(slots[ordinal % len(slots)][: SIZES[ordinal]], content(ordinal))
    stream.release(LAYERS[ordinal])


def test_layers_are_spread_evenly() -> None:
    assert spread(30, 3) == (5, 15, 25)
    assert spread(4, 4) == (0, 1, 2, 3)
    assert spread(7, 0) == ()
    for count in range(31):
        assert len(set(spread(30, count))) == count


@pytest.mark.parametrize("num_slots", [2, 3, 5])
def test_round_and_round_each_layer_has_its_own_bytes(tmp_path: Path, num_slots: int) -> None:
    stream, slots = make_stream(make_file(tmp_path), num_slots)
    for _ in range(20):
        for ordinal in range(len(LAYERS)):
            check(stream, slots, ordinal)


def test_passes_that_end_early_or_begin_elsewhere(tmp_path: Path) -> None:
    stream, slots = make_stream(make_file(tmp_path))
    generator = torch.Generator().manual_seed(3)
    for ordinal in torch.randint(0, len(LAYERS), (200,), generator=generator).tolist():
        check(stream, slots, ordinal)
    stream.acquire(LAYERS[3])  # a pass that failed here
    for ordinal in range(len(LAYERS)):
        check(stream, slots, ordinal)


def test_a_file_without_a_name_leaves_nothing_behind(tmp_path: Path) -> None:
    file = make_file(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert file.size_bytes == sum(SIZES)


def test_a_named_file_serves_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "layers"
    make_file(tmp_path, path)

    def never(index: int) -> Tensor:
        raise AssertionError("it was there")

    file = LayerFile(path, tmp_path, SIZES, never)
    for ordinal in range(len(LAYERS)):
        target = torch.zeros(max(SIZES), dtype=torch.uint8)
        file.read(ordinal, target)
        assert torch.equal(target[: SIZES[ordinal]], content(ordinal))
    assert [each.name for each in tmp_path.iterdir()] == ["layers"]


@pytest.mark.parametrize("damage", ["cut", "header", "other sizes"])
def test_a_file_that_is_not_whole_is_made_anew(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "layers"
    make_file(tmp_path, path)
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "header":
        path.write_bytes(b"{" + data)
    else:
        path.write_bytes(data.replace(b"[5000,", b"[5001,"))
    file = make_file(tmp_path, path)
    stream, slots = make_stream(file)
    check(stream, slots, 0)
    assert path.stat().st_size == len(data)


def test_a_damaged_layer_is_found_before_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "layers"
    make_file(tmp_path, path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DeviceError, match="layer 8 are damaged"):
        make_stream(make_file(tmp_path, path))


def test_a_disk_that_fails_ends_the_wait(tmp_path: Path) -> None:
    path = tmp_path / "layers"
    stream, slots = make_stream(make_file(tmp_path, path))
    check(stream, slots, 0)
    with path.open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(DeviceError, match="shorter"):
        for ordinal in [*range(len(LAYERS)), *range(len(LAYERS))]:
            check(stream, slots, ordinal)


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: object, start: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shoal.model.layer_file.os.pwrite", full)
    with pytest.raises(DeviceError, match="No space left"):
        make_file(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_its_thread_ends_with_it(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    stream, _slots = make_stream(make_file(tmp_path))
    # Those of other tests may end meanwhile.
    (thread,) = set(threading.enumerate()) - before
    assert thread.name == "shoal-stream"
    del stream
    thread.join(60)
    assert not thread.is_alive()


def tokens(llm: LLM) -> list[tuple[int, ...]]:
    long = list(range(5, 300))
    completions = llm.generate([[1, 2, 3], long, [9] * 20], GREEDY)
    return [completion.choices[0].token_ids for completion in completions]


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_a_model_larger_than_its_memory_gives_the_same_tokens(
    smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: DType
) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    said: list[str] = []
    with LLM(str(smollm2_gguf), dtype=dtype, max_model_len=512) as llm:
        want = tokens(llm)
    half = 270_000_000 if dtype == "float32" else 48_000_000
    for _start in ("packs", "finds it packed"):
        with LLM(
            str(smollm2_gguf),
            dtype=dtype,
            max_model_len=512,
            weights_memory_bytes=half,
            say=said.append,
        ) as llm:
            assert tokens(llm) == want
    (line, _again) = [line for line in said if line.startswith("on disk")]
    num_on_disk = int(line.split()[2])  # on disk N of ...
    assert 0 < num_on_disk < 30


def test_memory_for_not_even_two_layers_is_refused(smollm2_gguf: Path) -> None:
    with pytest.raises(DeviceError, match="give more memory"):
        LLM(str(smollm2_gguf), max_model_len=512, weights_memory_bytes=1_000_000)


def test_a_step_takes_as_long_as_its_slower_half() -> None:
    of_disk = predict(
        num_bytes=8_000_000, bandwidth_bytes_per_s=1e9, read_s=0.05, read_cpu_s=0.004, num_threads=2
    )
    assert of_disk == StepTimes(in_memory_s=0.01, from_disk_s=0.05)
    of_file_cache = predict(
        num_bytes=8_000_000,
        bandwidth_bytes_per_s=1e9,
        read_s=0.004,
        read_cpu_s=0.004,
        num_threads=2,
    )
    assert of_file_cache.from_disk_s == pytest.approx(0.012)


def test_what_control_groups_leave_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_room", lambda root: (400, 175))
    assert free_memory_bytes(torch.device("cpu")) == 175


def test_a_process_limit_is_known() -> None:
    script = (
        "import resource, torch\n"
        "from shoal.worker.memory import free_memory_bytes\n"
        "resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
        "print(free_memory_bytes(torch.device('cpu')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert 0 < int(done.stdout) < 6 << 30
