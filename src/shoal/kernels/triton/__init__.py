"""Kernels in Triton: NVIDIA GPUs from compute capability 8.0, or a CPU in Triton's interpreter.

`kernels/cuda.py` puts them together. Each file holds the device code (unchecked by mypy: its
language only looks like Python) and the function that launches it.
"""
