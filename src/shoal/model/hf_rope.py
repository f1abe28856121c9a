"""Reads a RopeSpec from config.json, in the spelling of transformers 4 or 5.

transformers 4: rope_theta, rope_scaling {type | rope_type, factor, ...}, rope_local_base_freq
transformers 5: rope_parameters {rope_theta, rope_type, ...}, or one such object per layer type
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from shoal.core.errors import UnsupportedModelError
from shoal.core.model_spec import RopeSpec
from shoal.model.fields import Fields

_TYPES = ("default", "linear", "llama3", "yarn")


def read_rope(fields: Fields, layer_type: str) -> RopeSpec:
    """The rope of layers of `layer_type` ("full_attention" or "sliding_attention")."""
    parameters = _parameters(fields, layer_type)
    kind = parameters.text("rope_type", parameters.text("type", "default"))
    if kind not in _TYPES:
        raise UnsupportedModelError(
            f"{parameters.source}: rope type {kind!r} is not supported; shoal runs "
            f"{', '.join(_TYPES)}"
        )
    if parameters.number("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"{parameters.source}: partial_rotary_factor is "
            f"{parameters.values['partial_rotary_factor']}; shoal rotates whole heads only"
        )
    theta = parameters.above(1, "rope_theta", 10_000.0)
    if kind == "linear":
        return RopeSpec(theta=theta, scaling="linear", factor=parameters.above(0, "factor"))
    if kind == "llama3":
        low = parameters.above(0, "low_freq_factor")
        return RopeSpec(
            theta=theta,
            scaling="llama3",
            factor=parameters.above(0, "factor"),
            low_freq_factor=low,
            high_freq_factor=parameters.above(low, "high_freq_factor"),
            original_max_positions=_original_max_positions(fields, parameters),
        )
    if kind == "yarn":
        return _yarn(fields, parameters, theta)
    return RopeSpec(theta=theta)


def _parameters(fields: Fields, layer_type: str) -> Fields:
    """One flat object for the layer type, whatever the spelling."""
    defaults: dict[str, Any] = {
        key: fields.values[key] for key in ("rope_theta", "partial_rotary_factor") if key in fields
    }
    is_local = layer_type == "sliding_attention" and "rope_local_base_freq" in fields
    if is_local:
        defaults["rope_theta"] = fields.values["rope_local_base_freq"]
    if "rope_parameters" in fields:
        given = fields.child("rope_parameters")
        if any(isinstance(value, Mapping) for value in given.values.values()):
            given = given.child(layer_type)
        return Fields(given.source, {**defaults, **given.values})
    # Gemma 3 scales its global layers only.
    if "rope_scaling" in fields and not is_local:
        given = fields.child("rope_scaling")
        return Fields(given.source, {**defaults, **given.values})
    return Fields(fields.source, defaults)


def _original_max_positions(fields: Fields, parameters: Fields) -> int:
    return parameters.positive(
        "original_max_position_embeddings", fields.positive("max_position_embeddings")
    )


def _yarn(fields: Fields, parameters: Fields, theta: float) -> RopeSpec:
    if not parameters.flag("truncate", True):
        raise UnsupportedModelError(
            f"{parameters.source}: yarn with truncate=false is not supported"
        )
    original = _original_max_positions(fields, parameters)
    # A null factor means: as far as the declared context stretches the original one.
    factor = parameters.above(0, "factor", fields.positive("max_position_embeddings") / original)
    return RopeSpec(
        theta=theta,
        scaling="yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=parameters.above(0, "beta_fast", 32.0),
        beta_slow=parameters.above(0, "beta_slow", 1.0),
        attention_factor=_attention_factor(parameters, factor),
    )


def _attention_factor(parameters: Fields, factor: float) -> float:
    """What cos and sin are multiplied by (arXiv 2309.00071, section 3.4; DeepSeek's mscale)."""
    if "attention_factor" in parameters:
        return parameters.above(0, "attention_factor")
    mscale = parameters.number("mscale", 0.0)
    mscale_all_dim = parameters.number("mscale_all_dim", 0.0)
    if mscale and mscale_all_dim:
        return yarn_scale(factor, mscale) / yarn_scale(factor, mscale_all_dim)
    return yarn_scale(factor, 1.0)


def yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0
