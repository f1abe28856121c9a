"""Layers that do not fit a device: from host memory or disk, with the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_checkpoint
from expert_models import expert_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from paging import PagedRun, run_mixed_steps
from torch import Tensor

from shoal import LLM, SamplingParams
from shoal.core.errors import DeviceError
from shoal.core.options import Quantization
from shoal.core.split import Range, whole
from shoal.kernels import RaggedBatch, select
from shoal.model import plain_weights
from shoal.model.decoder import Decoder
from shoal.model.flat import Flat, FlatSize
from shoal.model.host_layers import HostLayers
from shoal.model.packed_decoder import PackedDecoder
from shoal.model.spec import read_spec
from shoal.model.weights import load_decoder
from shoal.worker.disk_layers import plain_layers_text
from shoal.worker.kv_pool import allocate

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NUM_LAYERS = 7

MODELS = {
    "llama": ("LlamaForCausalLM", 8, 2, {"hidden_size": 64, "intermediate_size": 96}),
    "gemma3": ("Gemma3ForCausalLM", 8, 2, {"hidden_size": 64, "intermediate_size": 96}),
}
"""With columns in whole groups of quantised weights."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))


def checkpoint(folder: Path, name: str) -> Path:
    if name in MODELS:
        architecture, heads, kv_heads, settings = MODELS[name]
        made = {**settings, "num_hidden_layers": NUM_LAYERS}
        return tiny_checkpoint(folder, architecture, heads, kv_heads, **made)
    return expert_checkpoint(folder, name, num_hidden_layers=NUM_LAYERS)


def open_decoder(
    path: Path, device: str, share: float | None = None, quantize: Quantization = "none"
) -> Decoder:
    """With a share of its weights in the device's memory."""
    memory = None
    if share is not None:
        memory = int(share * open_decoder(path, device, None, quantize).weight_bytes)
    decoder = load_decoder(
        path,
        read_spec(path),
        device=torch.device(device),
        dtype=torch.float32,
        kernels=select("reference" if device == "cpu" else "cuda"),
        quantize=quantize,
        weights_memory_bytes=memory,
    )
    assert isinstance(decoder, Decoder)
    assert memory is None or decoder.weight_bytes <= memory
    assert (decoder.stream is None) == (share is None)
    return decoder


def logits(decoder: Decoder | PackedDecoder) -> list[Tensor]:
    return [each.logits[position] for each in run_mixed_steps(decoder) for position in each.logits]


def assert_same_bits(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize(
    ("name", "quantize"),
    [
        ("llama", "none"),
        ("llama", "int8"),
        ("llama", "int4"),
        ("gemma3", "fp8"),
        ("qwen3-mixed", "none"),
        ("qwen2", "none"),
        ("deepseek", "none"),
    ],
)
def test_logits_have_the_bits_of_a_model_in_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    quantize: Quantization,
    place: str,
    device: str,
) -> None:
    if (place, device) == ("disk", "cuda"):
        pytest.skip("beside a GPU there is host memory")
    path = checkpoint(tmp_path / "model", name)
    want = logits(open_decoder(path, device, None, quantize))
    monkeypatch.setattr(plain_weights, "_goes_to_disk", lambda _device: place == "disk")
    decoder = open_decoder(path, device, 0.8, quantize)
    assert decoder.stream is not None and len(decoder.stream.layers) >= 3
    assert isinstance(decoder.stream, HostLayers) == (place == "host")
    for _ in range(2):  # passes follow upon each other
        assert_same_bits(logits(decoder), want)
    assert f"{len(decoder.stream.layers)} of {len(decoder.spec.layers)} layers" in (
        plain_layers_text(decoder, 1)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_parts_of_the_layers_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Routes of several hops; and a Step may fail between two layers."""
    path = checkpoint(tmp_path / "model", "llama")
    want = logits(open_decoder(path, device))
    monkeypatch.setattr(plain_weights, "_goes_to_disk", lambda _device: False)
    decoder = open_decoder(path, device, 0.8)
    assert decoder.stream is not None
    forward, generator = decoder.forward, torch.Generator().manual_seed(1)

    def in_hops(inputs: Tensor, batch: object, kv: object) -> Tensor:
        cut, lost = torch.randint(1, NUM_LAYERS, (2,), generator=generator).tolist()
        hidden = forward(inputs, batch, kv, Range(0, cut))  # type: ignore[arg-type]
        assert decoder.stream is not None
        decoder.stream.acquire(decoder.stream.layers[lost % len(decoder.stream.layers)])
        return forward(hidden, batch, kv, Range(cut, NUM_LAYERS))  # type: ignore[arg-type]

    monkeypatch.setattr(decoder, "forward", in_hops)
    for _ in range(4):
        assert_same_bits(logits(decoder), want)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_stage_knows_its_layers_by_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_disk: bool
) -> None:
    path = checkpoint(tmp_path / "model", "gemma3")
    monkeypatch.setattr(plain_weights, "_goes_to_disk", lambda _device: on_disk)
    spec = read_spec(path)
    stage = replace(whole(spec), layers=Range(1, 6), has_embedding=False, has_head=False)
    found, size = [], 0
    for share in (None, 0.9):
        decoder = load_decoder(
            path,
            spec,
            shard=stage,
            device=torch.device("cpu"),
            dtype=torch.float32,
            kernels=select("reference"),
            weights_memory_bytes=None if share is None else int(share * size),
        )
        assert isinstance(decoder, Decoder)
        size = decoder.weight_bytes
        kv = allocate(spec, stage, 2, torch.float32, decoder.device).cache
        positions = torch.arange(20)
        batch = RaggedBatch(positions, positions, (20,), (20,), torch.tensor([[0, 1]]))
        x = torch.randn(20, spec.hidden_size, generator=torch.Generator().manual_seed(4))
        with torch.inference_mode():
            found += [decoder.forward(x, batch, kv) for _ in range(2)]
    assert decoder.stream is not None and set(decoder.stream.layers) <= {1, 2, 3, 4, 5}
    assert_same_bits(found[2:], found[:2])


@pytest.mark.gpu
def test_on_a_gpu_the_host_waits_for_no_copy(tmp_path: Path) -> None:
    """Steps one behind the other, as fast as they can be launched."""
    path = checkpoint(tmp_path / "model", "llama")
    whole, decoder = open_decoder(path, "cuda"), open_decoder(path, "cuda", 0.8)
    assert whole.fits_cuda_graphs and not decoder.fits_cuda_graphs
    assert isinstance(decoder.stream, HostLayers)
    runs = [PagedRun(each) for each in (whole, decoder)]
    tokens = [5, 9, 2]
    for run in runs:
        for _ in range(200):
            sequence = run.add(tokens)
            run.step((sequence, 0, 3))
            run._free += sequence.blocks
    ends = [run.add(tokens) for run in runs]
    for run, sequence in zip(runs, ends, strict=True):
        run.step((sequence, 0, 3))
    assert torch.equal(ends[0].logits[2], ends[1].logits[2])


def test_too_little_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path / "model", "llama")
    with pytest.raises(DeviceError, match="with every layer on disk, 2 of them"):
        open_decoder(path, "cpu", 0.05)
    monkeypatch.setattr(plain_weights, "_goes_to_disk", lambda _device: False)
    spec, size = read_spec(path), open_decoder(path, "cpu").weight_bytes
    with pytest.raises(DeviceError, match="neither the GPU nor the host"):
        load_decoder(
            path,
            spec,
            device=torch.device("cpu"),
            dtype=torch.float32,
            kernels=select("reference"),
            weights_memory_bytes=int(0.8 * size),
            host_memory_bytes=size // 4,
        )


def test_layers_on_disk_serve_the_next_start(tmp_path: Path) -> None:
    """Norms among them, which are not as the checkpoint has them."""
    path = checkpoint(tmp_path / "model", "gemma3")
    want, size = logits(open_decoder(path, "cpu")), open_decoder(path, "cpu").weight_bytes
    written = []
    for _start in range(2):
        decoder = load_decoder(
            path,
            read_spec(path),
            device=torch.device("cpu"),
            dtype=torch.float32,
            kernels=select("reference"),
            fingerprint="a",
            weights_memory_bytes=int(0.8 * size),
        )
        assert_same_bits(logits(decoder), want)
        (file,) = (tmp_path / "cache").rglob("*.bin")
        written.append(file.stat().st_ino)
    assert written[0] == written[1]


def test_plain_torch_with_layers_on_disk_gives_the_same_tokens(smollm2_gguf: Path) -> None:
    said: list[str] = []

    def tokens(memory: int | None) -> list[tuple[int, ...]]:
        with LLM(
            str(smollm2_gguf),
            kernels="reference",
            dtype="float32",
            max_model_len=256,
            weights_memory_bytes=memory,
            say=said.append,
        ) as llm:
            found = llm.generate([[1, 2, 3], list(range(5, 60))], GREEDY)
            return [each.choices[0].token_ids for each in found]

    want = tokens(None)
    assert not any(line.startswith("on disk") for line in said)
    assert tokens(330_000_000) == want
    (line,) = [line for line in said if line.startswith("on disk")]
    assert 3 <= int(line.split()[2]) < 30 and "GB/s: a decode step of about" in line


def test_tensors_lie_one_behind_the_other() -> None:
    wanted: list[tuple[torch.dtype, tuple[int, ...]]] = [
        (torch.int8, (3, 5)),
        (torch.float32, (7,)),
        (torch.float16, (0, 4)),
        (torch.float8_e4m3fn, (257,)),
        (torch.bfloat16, (2, 2)),
    ]
    size = FlatSize()
    for dtype, shape in wanted:
        assert size.take(dtype, shape).shape == shape
    assert size.bytes == 256 + 256 + 0 + 512 + 256
    buffer = torch.zeros(size.bytes, dtype=torch.uint8)
    flat = Flat(buffer)
    for number, (dtype, shape) in enumerate(wanted):
        each = flat.take(dtype, shape)
        assert (each.dtype, each.shape, each.data_ptr() % 64) == (dtype, shape, 0)
        each.view(torch.uint8).fill_(number + 1)
    counts = torch.bincount(buffer.int(), minlength=6).tolist()
    assert counts[1:] == [15, 28, 0, 257, 8]


Clock = dict[str, int]


@dataclass
class FakeStream:
    """Knows what has happened before what is launched on it next (a vector clock)."""

    name: str
    clock: Clock = field(default_factory=dict)

    def tick(self) -> Clock:
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        return dict(self.clock)

    def join(self, other: Clock) -> None:
        for name, count in other.items():
            self.clock[name] = max(count, self.clock.get(name, 0))

    def wait_stream(self, other: FakeStream) -> None:
        self.join(other.clock)

    def wait_event(self, event: FakeEvent) -> None:
        self.join(event.clock)


class FakeEvent:
    def __init__(self) -> None:
        self.clock: Clock = {}

    def record(self, stream: FakeStream) -> None:
        self.clock = dict(stream.clock)


class FakeDevice:
    """Stands in for torch.cuda; `copies`: when each was launched, `into`: the last of a slot."""

    Event = FakeEvent

    def __init__(self, slots: list[Tensor]) -> None:
        self.compute = FakeStream("compute")
        self.copies: list[Clock] = []
        self.into: dict[int, Clock] = {}
        self._slots = slots

    def Stream(self, _device: torch.device) -> FakeStream:  # noqa: N802 - torch's name
        return FakeStream("copy")

    def current_stream(self, _device: torch.device) -> FakeStream:
        return self.compute

    def synchronize(self, _device: torch.device) -> None:
        """Only what is measured needs it."""

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before = [slot._version for slot in self._slots]
        yield
        self.copies.append(stream.tick())
        for place, slot in enumerate(self._slots):
            if slot._version != before[place]:
                self.into[place] = self.copies[-1]


def open_host_layers(
    layers: tuple[int, ...], num_slots: int
) -> tuple[HostLayers, list[Tensor], FakeDevice]:
    """Of a layer's bytes each is its ordinal."""
    slots = [torch.zeros(4, dtype=torch.uint8) for _ in range(num_slots)]
    device = FakeDevice(slots)
    sources = [torch.full((4,), n, dtype=torch.uint8) for n in range(len(layers))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_device_module", lambda _device: device)
        return HostLayers(layers, sources, slots), slots, device


@settings(max_examples=60, deadline=None)
@given(
    num_layers=st.integers(2, 7),
    num_slots=st.integers(2, 4),
    jumps=st.lists(st.integers(0, 6), max_size=8),
)
def test_copies_and_layers_wait_for_each_other(
    num_layers: int, num_slots: int, jumps: list[int]
) -> None:
    num_slots = min(num_slots, num_layers)
    stream, slots, device = open_host_layers(tuple(range(num_layers)), num_slots)
    # Passes of all layers, and such as begin anywhere and end at once.
    for layer in [*range(num_layers), *(jump % num_layers for jump in jumps), *range(num_layers)]:
        before, launched = len(device.copies), dict(device.compute.clock)
        stream.acquire(layer)
        place = layer % num_slots
        assert int(slots[place][0]) == layer
        assert device.compute.clock["copy"] >= device.into[place]["copy"]
        for copy in device.copies[before:]:
            assert copy.get("compute", 0) >= launched.get("compute", 0)
        device.compute.tick()  # the layer
        before = len(device.copies)
        stream.release(layer)
        assert len(device.copies) - before <= 1, "a layer's end frees one slot"
        for copy in device.copies[before:]:
            assert copy["compute"] == device.compute.clock["compute"]


def test_a_pass_that_goes_on_copies_each_layer_once() -> None:
    stream, slots, device = open_host_layers((1, 2, 4, 7, 8), 2)
    assert (stream.size_bytes, stream.slot_bytes) == (20, 8)
    counts = []
    for _ in range(4):
        before = len(device.copies)
        for ordinal, layer in enumerate(stream.layers):
            stream.acquire(layer)
            assert int(slots[ordinal % 2][0]) == ordinal
            stream.release(layer)
        counts.append(len(device.copies) - before)
    assert counts[1:] == [5, 5, 5]
