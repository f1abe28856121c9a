"""The compiled CPU path: packed weights, and a range of layers as one call of a C++ library.

The library is built when shoal is installed, if there is a compiler; csrc/shoal_cpu.h is its
interface. Plain torch (`kernels/reference.py`) stays the definition of what it computes. Knows
nothing of checkpoints, requests or HTTP.
"""
