"""Content identity of a checkpoint, cheap enough for every start.

KV blocks are named by it, so two places that hold the same weights must agree, wherever
the files lie, and different weights must differ. Hashing gigabytes at every start is too
slow, so each file counts with its size and with samples of its bytes: its first MiB (the
header: tensor names, shapes, types), its last 64 KiB, and 64 windows of 4 KiB spread
evenly between. Training moves nearly every weight, so samples tell fine-tunes apart; an
edit that touches only bytes between the windows goes unnoticed. Files up to a MiB count
whole. Of a folder only config.json and the safetensors files count: a new chat template
or tokenizer changes token ids, which block names carry already.

Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

_HEAD_BYTES = 2**20
_TAIL_BYTES = 2**16
_WINDOW_BYTES = 2**12
_NUM_WINDOWS = 64


def fingerprint(path: Path) -> str:
    """SHA-256 (hex) over sizes and samples of a .gguf file or of a safetensors folder."""
    digest = hashlib.sha256(b"shoal checkpoint 1\n")
    if path.is_dir():
        for file in sorted([path / "config.json", *path.glob("*.safetensors")]):
            digest.update(f"{file.name}\n".encode())
            _add(digest, file)
    else:
        _add(digest, path)  # without its name: a renamed file holds the same weights
    return digest.hexdigest()


def _add(digest: hashlib._Hash, file: Path) -> None:
    with file.open("rb") as handle:
        size = handle.seek(0, io.SEEK_END)
        digest.update(f"{size}\n".encode())
        for offset, length in _samples(size):
            handle.seek(offset)
            digest.update(handle.read(length))


def _samples(size: int) -> list[tuple[int, int]]:
    """(offset, length) of the bytes that count."""
    middle = size - _HEAD_BYTES - _TAIL_BYTES
    if middle <= 0:
        return [(0, size)]
    windows = [
        (_HEAD_BYTES + middle * index // _NUM_WINDOWS, _WINDOW_BYTES)
        for index in range(_NUM_WINDOWS)
    ]
    return [(0, _HEAD_BYTES), *windows, (size - _TAIL_BYTES, _TAIL_BYTES)]
