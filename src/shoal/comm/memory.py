"""The memory of a group in shared memory: made by whoever starts the ranks. Loads no torch."""

from __future__ import annotations

import fcntl
import os

from shoal.comm.library import load_library


def is_available() -> bool:
    """Whether the library is built, and loads here."""
    try:
        load_library()
    except OSError:
        return False
    return True


def create_memory(*sizes: int) -> int:
    """Memory for groups of so many ranks, one behind the other; pages nobody uses cost nothing.

    Returns:
        A file descriptor for `pass_fds`; the caller closes it.

    Raises:
        OSError: no library, or no memory.
    """
    num_bytes = sum(load_library().shoal_group_bytes(size) for size in sizes)
    fd = os.memfd_create("shoal-group", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    # A rank that could shrink it could crash the others.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd
