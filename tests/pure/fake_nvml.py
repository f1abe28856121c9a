"""A pretended NVML: cards by what they answer; what is left out, they do not support."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any


class NvmlError(Exception):
    def __init__(self, value: int, words: str = "Not Supported") -> None:
        super().__init__(words)
        self.value = value


class FakeNvml:
    """
    Args:
        cards: answers of each by question, without "nvmlDeviceGet".
        pairs: answers to questions about two, by question and both indices.
        refuses: instead of starting.
    """

    NVMLError = NvmlError
    NVML_NVLINK_MAX_LINKS = 18

    def __init__(
        self,
        cards: Sequence[Mapping[str, Any]] = (),
        pairs: Mapping[tuple[str, int, int], int] | None = None,
        refuses: NvmlError | None = None,
        cuda: int = 13000,
    ) -> None:
        self.cards, self.pairs, self.refuses, self.cuda = cards, pairs or {}, refuses, cuda
        self.num_open = 0

    def nvmlInit(self) -> None:  # noqa: N802
        if self.refuses is not None:
            raise self.refuses
        self.num_open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.num_open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if not self.cards[index]:
            raise NvmlError(15, "GPU is lost")
        return index

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.65.06"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:  # noqa: N802
        return self.cuda

    def __getattr__(self, name: str) -> Any:
        question = name.removeprefix("nvmlDeviceGet")

        def answer(card: int, *of: int) -> Any:
            if (question, card, *of[:1]) in self.pairs:
                return self.pairs[question, card, of[0]]
            found = self.cards[card].get(question)
            if isinstance(found, dict):
                found = found.get(of[0])
            if found is None:
                raise NvmlError(3)
            return found

        return answer


def h100(index: int, peer: int | None = None, **answers: Any) -> dict[str, Any]:
    """A card; with `peer`, 4 NVLinks lead to it, else 18 to switches."""
    links = range(4 if peer is not None else 18)
    ends = {link: SimpleNamespace(busId=_address(peer)) for link in links if peer is not None}
    return {
        "Name": "NVIDIA H100 80GB HBM3",
        "UUID": f"GPU-{index}",
        "PciInfo": SimpleNamespace(busId=_address(index)),
        "MemoryInfo": SimpleNamespace(total=85_000_000_000, free=84_000_000_000),
        "CudaComputeCapability": (9, 0),
        "CurrentClocksEventReasons": 0,
        "CurrPcieLinkGeneration": 5,
        "CurrPcieLinkWidth": 16,
        "MaxPcieLinkGeneration": 5,
        "MaxPcieLinkWidth": 16,
        "EnforcedPowerLimit": 700_000,
        "PowerManagementDefaultLimit": 700_000,
        "ClockInfo": {1: 1980},
        "MaxClockInfo": {1: 1980},
        "Temperature": {0: 41},
        "PersistenceMode": 1,
        "NvLinkState": dict.fromkeys(links, 1),
        "NvLinkVersion": dict.fromkeys(links, 6),  # 4.0
        "NvLinkRemotePciInfo": ends,
        "NvLinkRemoteDeviceType": dict.fromkeys(links, 0 if ends else 2),
        **answers,
    }


def _address(index: int | None) -> str:
    return f"00000000:{0x10 + (index or 0):02X}:00.0"
