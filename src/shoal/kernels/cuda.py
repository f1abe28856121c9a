"""The kernels for NVIDIA GPUs: Triton where torch has nothing or is slower, cuBLAS for the rest.

Nothing here waits for the device or reads a length from the host where a CUDA graph may hold it
(decoding). Runs on a CPU too, in Triton's interpreter (TRITON_INTERPRET=1): for tests.
"""

from __future__ import annotations

from shoal.kernels import KernelSet, reference
from shoal.kernels.triton.activation import gated_activation
from shoal.kernels.triton.attention import attention
from shoal.kernels.triton.experts import experts
from shoal.kernels.triton.linear import linear
from shoal.kernels.triton.norm import add_rms_norm, rms_norm
from shoal.kernels.triton.rope_store import rope_and_store
from shoal.kernels.triton.route import route

KERNELS = KernelSet(
    name="cuda",
    linear=linear,
    rms_norm=rms_norm,
    rope_angles=reference.rope_angles,
    rope=reference.rope,
    store_kv=reference.store_kv,
    attention=attention,
    gated_activation=gated_activation,
    route=route,
    experts=experts,
    add_rms_norm=add_rms_norm,
    rope_and_store=rope_and_store,
    reads_lengths_on_device=True,
)
