"""Choosing a device and sizing its KV: what is refused, and in which words."""

from __future__ import annotations

import psutil
import pytest
import torch

from shoal.core.errors import ConfigError, DeviceError
from shoal.core.model_spec import LayerSpec, ModelSpec, RopeSpec
from shoal.core.split import Range, Split, shards, whole
from shoal.worker.device import (
    choose_device,
    choose_dtype,
    kv_budget_bytes,
    weights_budget_bytes,
)
from shoal.worker.kv_pool import allocate, num_blocks_for, token_bytes
from shoal.worker.memory import free_memory_bytes

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
        choose_device(device)


def test_cuda_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no NVIDIA GPU"):
        choose_device("cuda")


def test_amd_is_refused_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(DeviceError, match="AMD"):
        choose_device("cuda")
    assert choose_device("auto").device == CPU


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_precision_follows_the_instructions(
    monkeypatch: pytest.MonkeyPatch, supported: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": supported})
    assert choose_dtype(CPU, "auto", compiled=False) is dtype
    assert choose_dtype(CPU, "auto", compiled=True) is torch.bfloat16
    assert choose_dtype(CPU, "float16", compiled=False) is torch.float16


@pytest.mark.parametrize(
    ("dtype", "head_bytes"),
    [
        (torch.float32, 8 * 4),
        (torch.bfloat16, 8 * 2),
        (torch.int8, 8 + 4),
        (torch.float8_e4m3fn, 8 + 4),
    ],
    ids=str,
)
def test_kv_is_sized_in_whole_blocks_scales_included_and_starts_as_zeros(
    dtype: torch.dtype, head_bytes: int
) -> None:
    block_bytes = 2 * 3 * 2 * head_bytes * 16
    assert num_blocks_for(SPEC, whole(SPEC), dtype, 5 * block_bytes + 1) == 5
    with pytest.raises(ConfigError, match="one block"):
        num_blocks_for(SPEC, whole(SPEC), dtype, block_bytes - 1)
    layers = allocate(SPEC, whole(SPEC), 5, dtype, CPU).cache.layers
    assert len(layers) == 3
    tensors = [
        tensor
        for kv in layers
        for tensor in (kv.keys_NBHD, kv.values_NBHD, kv.key_scales_NBH, kv.value_scales_NBH)
        if tensor is not None
    ]
    assert {tuple(tensor.shape) for tensor in tensors} >= {(5, 16, 2, 8)}
    assert sum(tensor.nbytes for tensor in tensors) == 5 * block_bytes
    assert not any(tensor.view(torch.uint8).any() for tensor in tensors)
    # Writing everywhere shows whether any two share memory.
    for number, tensor in enumerate(tensors):
        tensor.fill_(number + 1)
    assert [float(tensor.float().max()) for tensor in tensors] == [
        float(tensor.float().min()) for tensor in tensors
    ]
    assert float(tensors[0].float()[0, 0, 0, ...].max()) == 1.0


def test_kv_costs_no_memory_before_it_is_used() -> None:
    before = psutil.Process().memory_info().rss
    pool = allocate(SPEC, whole(SPEC), 300_000, torch.float32, CPU)
    assert psutil.Process().memory_info().rss - before < 32 << 20
    assert pool.cache.layers[2].values_NBHD.nbytes > 256 << 20


def test_a_cache_beyond_all_memory_is_refused() -> None:
    with pytest.raises(DeviceError, match="does not fit"):
        allocate(SPEC, whole(SPEC), 1 << 50, torch.float32, CPU)


def test_kv_holds_two_long_requests_but_never_all_memory() -> None:
    free = free_memory_bytes(CPU)
    assert kv_budget_bytes(CPU, 1.0, 1000) == min(1 << 30, free // 4)
    assert kv_budget_bytes(CPU, 1.0, 1 << 60) == pytest.approx(free / 4, rel=0.1)
    assert kv_budget_bytes(CPU, 0.5, 1 << 60) == pytest.approx(free / 8, rel=0.1)


def test_a_shard_keeps_the_kv_of_its_own_heads_and_layers_only() -> None:
    """Of 2 KV heads one rank touches both, one the second, one none at all."""
    split = Split(
        heads=(Range(0, 3), Range(3, 4), Range(4, 4)),
        ffn=(Range(0, 16),) * 3,
        vocab=(Range(0, 16),) * 3,
    )
    both, second, none = shards(split, Range(1, 3), has_embedding=False, has_head=True)
    token = 2 * 8 * 4
    assert token_bytes(SPEC, both, torch.float32) == 2 * 2 * token
    assert token_bytes(SPEC, second, torch.float32) == 2 * 1 * token
    assert num_blocks_for(SPEC, none, torch.float32, 1000) is None
    layers = allocate(SPEC, none, 3, torch.float32, CPU).cache.layers
    assert [tuple(kv.keys_NBHD.shape) for kv in layers] == [(3, 16, 0, 8)] * 2


@pytest.mark.parametrize(("device", "share", "want"), [("cpu", 1.0, 800), ("cuda:0", 0.5, 180)])
def test_weights_leave_room_for_kv_and_steps(
    monkeypatch: pytest.MonkeyPatch, device: str, share: float, want: int
) -> None:
    monkeypatch.setattr("shoal.worker.device.free_memory_bytes", lambda _device: 1000)
    reserved = 300 if device != "cpu" else 0
    assert weights_budget_bytes(torch.device(device), share, reserved) == want
    assert weights_budget_bytes(torch.device(device), share, 2000) == 0
