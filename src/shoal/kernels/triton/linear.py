"""x @ weight.T with a weight in few bits: which kernel for how many tokens.

    T tokens   F rows and K columns of the weight   G groups of columns

    T <= 2      dot products straight from the codes, in fp32 (`linear_vector.py`)
    T <= 256    tiles undone to x's dtype on their way to the tensor cores (`linear_tiles.py`)
    beyond      the weight undone to x's dtype as a whole, then torch: reading and writing it
                costs little beside the product; so does any shape the above do not take

Scaled fp8 products (torch._scaled_mm) are not used: they would round x to fp8 too, and so
compute something else than the reference does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.quantized import QuantizedWeight
from shoal.kernels.triton.dequantize import dequantize
from shoal.kernels.triton.linear_tiles import tiles_linear
from shoal.kernels.triton.linear_vector import vector_linear

MAX_VECTORS = 2
MAX_TILED = 256
_WORD_BYTES = 4
_CODES_PER_WORD = {"int8": 4, "fp8": 4, "int4": 8}


def linear(x_TK: Tensor, weight: Tensor | QuantizedWeight, bias_F: Tensor | None) -> Tensor:
    """As the reference. Plain weights are torch's (cuBLAS)."""
    if isinstance(weight, Tensor):
        return torch.nn.functional.linear(x_TK, weight, bias_F)
    if len(x_TK) > MAX_TILED or not _in_words(weight):
        return torch.nn.functional.linear(x_TK, dequantize(weight, x_TK.dtype), bias_F)
    product = vector_linear if len(x_TK) <= MAX_VECTORS else tiles_linear
    return product(x_TK.contiguous(), weight, bias_F)


def _in_words(weight: QuantizedWeight) -> bool:
    """Whether codes can be read four bytes at a time, each word within one group."""
    per_word = _CODES_PER_WORD[weight.format]
    aligned = weight.codes.is_contiguous() and weight.codes.data_ptr() % _WORD_BYTES == 0
    return aligned and weight.shape[1] % per_word == 0 and weight.group_size % per_word == 0
