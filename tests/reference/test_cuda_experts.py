"""The kernels for mixtures of experts of the set "cuda", held to the reference.

Run as test_cuda_kernels.py is: on a GPU, or in Triton's interpreter.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from kernel_cases import make_weight

from shoal.core.split import WHOLE_SHARE
from shoal.kernels import ExpertWeights, QuantizedWeight, select
from shoal.kernels.experts import slots

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = torch.float16 if INTERPRETED else torch.bfloat16
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ALL = [(expert, 0, WHOLE_SHARE) for expert in range(6)]
SOME = [(1, 0, WHOLE_SHARE), (2, 20_000, 50_000), (4, 0, 30_000), (5, 65_000, WHOLE_SHARE)]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def weight_of(kind: str, rows: int, columns: int, dtype: torch.dtype) -> Any:
    if kind == "plain":
        return draw(rows, columns, seed=rows, dtype=dtype) * columns**-0.5
    made = make_weight(
        kind.removesuffix("_min"),  # type: ignore[arg-type]
        rows,
        columns,
        32 if columns % 32 == 0 else 8,
        device=DEVICE,
        minimums=kind.endswith("_min"),
    )
    return QuantizedWeight(
        made.format, made.codes, made.scales_FG * columns**-0.5, made.minimums_FG
    )


def check(
    shares: list[tuple[int, int, int]],
    num_tokens: int,
    *,
    kind: str = "plain",
    dtype: torch.dtype = torch.float32,
    hidden: int = 32,
    columns: int = 64,
    num_active: int = 2,
    activation: Any = "silu",
    phase: int = 0,
    ids_TK: torch.Tensor | None = None,
) -> None:
    num_experts = 6
    experts = ExpertWeights(
        slots(num_experts, shares).to(DEVICE),
        weight_of(kind, len(shares) * 2 * columns, hidden, dtype),
        weight_of(kind, len(shares) * hidden, columns, dtype),
    )
    x_TE = draw(num_tokens, hidden, seed=1, dtype=dtype)
    if ids_TK is None:
        scores = draw(num_tokens, num_experts, seed=num_tokens)
        ids_TK = scores.argsort(-1)[:, :num_active].contiguous()
    weights_TK = draw(*ids_TK.shape, seed=5).abs() + 0.1
    at = torch.tensor(phase, device=DEVICE)
    given = x_TE, ids_TK.to(DEVICE), weights_TK, experts, at, activation
    cuda, reference = select("cuda"), select("reference")
    assert cuda.experts is not reference.experts
    got, want = cuda.experts(*given), reference.experts(*given)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    limit = TOLERANCE[dtype] * max(1.0, float(want.float().abs().max()))
    assert float((got.float() - want.float()).abs().max()) <= limit


@pytest.mark.parametrize("shares", [ALL, SOME, SOME[:1]], ids=["all", "some", "one"])
@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_experts_of_any_share(shares: list[tuple[int, int, int]], num_tokens: int) -> None:
    check(shares, num_tokens, phase=40503 * num_tokens % WHOLE_SHARE)


@pytest.mark.parametrize("kind", ["plain", "int8", "int4", "int4_min", "fp8"])
@pytest.mark.parametrize("num_tokens", [2, 20])
def test_experts_in_few_bits(kind: str, num_tokens: int) -> None:
    check(SOME, num_tokens, kind=kind, dtype=HALF, activation="gelu_tanh")


@pytest.mark.parametrize("num_tokens", [2, 20])
def test_experts_of_sizes_that_fill_no_tile(num_tokens: int) -> None:
    check(ALL, num_tokens, hidden=40, columns=24, num_active=3)
    check(ALL, num_tokens, kind="int4", hidden=40, columns=24, num_active=1)


@pytest.mark.parametrize("num_tokens", [3, 90])
def test_all_tokens_to_one_expert_and_some_to_none(num_tokens: int) -> None:
    """6 is no expert: ranks that are sent tokens get such ids (model/expert_exchange.py)."""
    same = torch.tensor([[4, 6]]).expand(num_tokens, 2).contiguous()
    check(ALL, num_tokens, ids_TK=same)
    check(SOME, num_tokens, ids_TK=same, phase=65_535)
    check(SOME[:1], num_tokens, ids_TK=same)


def test_more_pairs_than_are_looked_at_at_once() -> None:
    check(SOME, 700, hidden=16, columns=32, num_active=2, phase=12_345)


@pytest.mark.parametrize("renormalises", [True, False])
@pytest.mark.parametrize(
    ("num_experts", "groups", "active_groups", "num_active"),
    [(8, 1, 1, 2), (60, 1, 1, 4), (12, 4, 2, 3), (160, 8, 3, 6), (5, 1, 1, 5)],
)
def test_route(
    num_experts: int, groups: int, active_groups: int, num_active: int, renormalises: bool
) -> None:
    x_TE, router_XE = draw(9, 32, seed=1, dtype=HALF), draw(num_experts, 32, seed=2)
    x_TE[3] = 0  # all are equal: the first are chosen
    rules = {
        "num_active": num_active,
        "renormalises": renormalises,
        "scale": 2.5,
        "num_groups": groups,
        "num_active_groups": active_groups,
    }
    assert select("cuda").route is not select("reference").route
    ids, weights = select("cuda").route(x_TE, router_XE, **rules)  # type: ignore[arg-type]
    want_ids, want_weights = select("reference").route(x_TE, router_XE, **rules)  # type: ignore[arg-type]
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want_weights)
    assert ids.dtype == want_ids.dtype
    assert ids[3].tolist() == list(range(num_active))
