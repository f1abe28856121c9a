"""How fast a folder's disk is read: a file is written, dropped from memory, and read again.

Knows nothing of what else lies there; the file is gone afterwards.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

_CHUNK_BYTES = 8 << 20
_LONGEST_WRITE_S = 4.0


def read_rate(folder: Path, size_bytes: int = 256 << 20) -> float:
    """Bytes per second, front to back.

    Raises:
        OSError: nothing can be written there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        written = _write(file.fileno(), size_bytes)
        os.posix_fadvise(file.fileno(), 0, written, os.POSIX_FADV_DONTNEED)
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        began_s, buffer = time.perf_counter(), bytearray(_CHUNK_BYTES)
        while file.readinto(buffer):
            pass
        return written / max(time.perf_counter() - began_s, 1e-9)


def _write(descriptor: int, size_bytes: int) -> int:
    """So much, or what a slow disk takes in a few seconds; all of it is on the disk."""
    chunk, written, began_s = os.urandom(_CHUNK_BYTES), 0, time.perf_counter()
    while written < size_bytes and time.perf_counter() - began_s < _LONGEST_WRITE_S:
        written += os.write(descriptor, chunk)
        os.fdatasync(descriptor)
    return written
