"""Choosing a device and sizing its KV: what is refused, and in which words."""

from __future__ import annotations

import psutil
import pytest
import torch

from shoal.core.errors import ConfigError, DeviceError
from shoal.core.model_spec import LayerSpec, ModelSpec, RopeSpec
from shoal.worker.device import choose_device, free_memory_bytes, kv_budget_bytes
from shoal.worker.kv_pool import allocate, num_blocks_for

SPEC = ModelSpec(
    architecture="test",
    num_layers=3,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_size=64,
    vocab_size=100,
    norm_eps=1e-5,
    layers=(LayerSpec(rope=RopeSpec()),) * 3,
    max_positions=128,
    attention_scale=1.0,
    tied_embeddings=True,
)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("mps", "not supported"),
        ("xpu", "not supported"),
        ("gpu0", "not a device"),
        ("", "not a device"),
    ],
)
def test_other_devices_are_refused_by_name(device: str, words: str) -> None:
    with pytest.raises(DeviceError, match=words):
        choose_device(device, "auto")


def test_cuda_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no NVIDIA GPU"):
        choose_device("cuda", "auto")


def test_amd_is_refused_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(DeviceError, match="AMD"):
        choose_device("cuda", "auto")
    assert choose_device("auto", "auto").device == CPU


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_precision_follows_the_instructions(
    monkeypatch: pytest.MonkeyPatch, supported: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": supported})
    assert choose_device("cpu", "auto").dtype is dtype
    assert choose_device("cpu", "float16").dtype is torch.float16


def test_kv_is_sized_in_whole_blocks_and_starts_as_zeros() -> None:
    block_bytes = 2 * 3 * 2 * 8 * 4 * 16
    assert num_blocks_for(SPEC, torch.float32, 5 * block_bytes + 1) == 5
    with pytest.raises(ConfigError, match="one block"):
        num_blocks_for(SPEC, torch.float32, block_bytes - 1)
    pool = allocate(SPEC, 5, torch.bfloat16, CPU)
    assert len(pool.cache.keys) == len(pool.cache.values) == 3
    assert pool.cache.keys[0].shape == (5, 16, 2, 8)
    assert not pool.cache.values[2].any()


def test_populating_takes_pages_and_leaves_contents() -> None:
    pool = allocate(SPEC, 3000, torch.float32, CPU)
    pool.cache.keys[1][7] = 3.0
    before = psutil.Process().memory_info().rss
    pool.populate()
    assert pool.memory is not None
    assert psutil.Process().memory_info().rss - before > len(pool.memory) * 0.8
    assert (pool.cache.keys[1][7] == 3.0).all()
    assert not pool.cache.values[1].any()


def test_kv_holds_two_long_requests_but_never_all_memory() -> None:
    free = free_memory_bytes(CPU)
    assert kv_budget_bytes(CPU, 1.0, 1000) == min(1 << 30, free // 4)
    assert kv_budget_bytes(CPU, 1.0, 1 << 60) == pytest.approx(free / 4, rel=0.1)
    assert kv_budget_bytes(CPU, 0.5, 1 << 60) == pytest.approx(free / 8, rel=0.1)
