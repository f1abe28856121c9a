"""SamplingParams written by hand: what is taken, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from shoal.core.errors import InvalidRequestError
from shoal.core.request import SamplingParams


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("stop", "xyz e", ("xyz e",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop_token_ids", [1, 2], (1, 2)),
        ("stop_token_ids", {7}, (7,)),
        ("logit_bias", {5: 1.5, 6: -100}, ((5, 1.5), (6, -100))),
        ("logit_bias", [[5, 1.5]], ((5, 1.5),)),
        ("temperature", 0, 0),
    ],
)
def test_handy_forms_become_tuples(name: str, given: Any, kept: Any) -> None:
    params = SamplingParams(**{name: given})
    assert getattr(params, name) == kept
    assert replace(params, n=2) == SamplingParams(**{name: kept}, n=2)
    hash(params)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": "hot"},
        {"temperature": None},
        {"max_tokens": 1.5},
        {"n": True},
        {"seed": "7"},
        {"ignore_eos": 1},
        {"grammar": "{}"},
        {"stop": 5},
        {"stop": None},
        {"stop": [5]},
        {"stop": [""]},
        {"stop": ""},
        {"stop_token_ids": 5},
        {"stop_token_ids": ["5"]},
        {"logit_bias": {"5": 1.0}},
        {"logit_bias": {5: "1"}},
        {"logit_bias": [5]},
        {"logit_bias": [(5, 1.0, 2.0)]},
        {"logit_bias": {5: float("nan")}},
        {"logit_bias": {5: float("inf")}},
        {"logit_bias": {5: -101}},
        {"temperature": float("nan")},
        {"top_p": 0},
    ],
    ids=str,
)
def test_wrong_values_are_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(InvalidRequestError, match=name) as refusal:
        SamplingParams(**wrong)
    assert (refusal.value.param, refusal.value.code) == (name, "invalid_value")
