"""Conversions that every supported GPU can do, written in bits: fp8, rounding, tanh; and the gate.

Triton's own fp8 needs compute capability 8.9; these are the same numbers on 8.0. Knows nothing
of what is converted.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

PLAIN = 0
INT8 = 1
FP8 = 2
INT4 = 3
"""How numbers are kept: as they are, or as codes."""


@triton.jit
def e4m3_to_float(code):
    """fp32 of float8_e4m3fn bits in an int32; the one NaN code reads as 480."""
    # Sign, exponent and mantissa move to fp32's places; the exponents' biases differ by 120.
    bits = ((code << 24) >> 4) & -2014314496  # 0x87F00000
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def float_to_e4m3(x):
    """The nearest float8_e4m3fn (ties to even) of an fp32, as uint8; saturates at 448."""
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    small = tl.minimum(tl.abs(x), 448.0) * 7.52316384526264e-37
    bits = small.to(tl.int32, bitcast=True)
    code = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    return (code | sign).to(tl.uint8)


@triton.jit
def round_half_even(x):
    """The nearest whole number of an fp32 below 2^22 in size."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def tanh(x):
    shrunk = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def to_number(codes, kind: tl.constexpr, dtype: tl.constexpr):
    """Codes without their scale, exact in any dtype; fp8 comes as uint8."""
    if kind == 2:
        return e4m3_to_float(codes.to(tl.int32)).to(dtype)
    return codes.to(dtype)


@triton.jit
def gated(gate, up, IS_SILU: tl.constexpr, dtype: tl.constexpr):
    """activation(gate) * up of fp32, each step rounded to `dtype` as single operations would."""
    wide = gate.to(dtype).to(tl.float32)
    if IS_SILU:
        wide = wide * tl.sigmoid(wide)
    else:
        inner = 0.7978845608028654 * (wide + 0.044715 * wide * wide * wide)
        wide = 0.5 * wide * (1.0 + tanh(inner))
    return (wide.to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)).to(dtype)
