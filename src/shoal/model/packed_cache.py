"""Packed weights kept on disk, so that a start need not round or repack them again.

    packed/<key>.bin     one line of JSON (sizes, a checksum for each piece) | the arena's bytes

The key is what the bytes follow from: the checkpoint's content identity, its files' sizes and
times, the formats, the layout's version. A file appears by rename, so it is whole or absent; one
that is damaged is removed and made anew. The least recently used go when there are too many.
Nothing here ever fails a start. Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from shoal.model.cache import models_folder

_LAYOUT = 1
_PIECE_BYTES = 16 << 20
_MAX_FILES = 64  # every rank of a split has its own
_MAX_BYTES = 32 << 30
_MAX_HEADER_BYTES = 1 << 20
_THREADS = 4
_log = logging.getLogger(__name__)


class PackedCache:
    """The place of one set of packed weights.

    Args:
        fingerprint: the checkpoint's; "" keeps nothing.
        checkpoint: its folder or file.
        parts: everything else that the bytes follow from.
    """

    def __init__(self, fingerprint: str, checkpoint: Path, parts: Sequence[object]) -> None:
        self.folder = models_folder().parent / "packed"
        self._path: Path | None = None
        self._all = fingerprint, checkpoint, parts
        if not fingerprint:
            return
        files = sorted(checkpoint.glob("*")) if checkpoint.is_dir() else [checkpoint]
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        text = repr((_LAYOUT, fingerprint, stats, *parts))
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        self._path = self.folder / f"{name}.bin"

    @property
    def path(self) -> Path | None:
        """None: nothing is kept."""
        return self._path

    def of(self, *more: object) -> PackedCache:
        """The place of a part of them."""
        fingerprint, checkpoint, parts = self._all
        return PackedCache(fingerprint, checkpoint, (*parts, *more))

    def read_into(self, data: Tensor) -> bool:
        """Fill `data` (uint8) with the kept bytes; False: there are none that are whole."""
        if self._path is None or not self._path.is_file():
            return False
        try:
            with self._path.open("rb") as file:
                header = json.loads(file.readline(_MAX_HEADER_BYTES))
                sums, start = header["crc32"], file.tell()
            if header["size"] != len(data) or not self._read(self._path, data, start, sums):
                raise ValueError("it is damaged")
            os.utime(self._path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("packed weights in %s are not used: %s", self._path, error)
            self._remove(self._path)
            return False
        return True

    def keep(self, data: Tensor) -> None:
        """Write `data` in the background; it must not change any more. An exit waits for it."""
        if self._path is not None:
            threading.Thread(target=self._write, args=(self._path, data), name="shoal-keep").start()

    def _read(self, path: Path, data: Tensor, start: int, sums: list[int]) -> bool:
        pieces = torch.split(data, _PIECE_BYTES)

        def read(index: int) -> bool:
            view = _bytes(pieces[index])
            with path.open("rb", buffering=0) as file:
                file.seek(start + index * _PIECE_BYTES)
                done = 0
                while done < len(view) and (count := file.readinto(view[done:])):
                    done += count
            return done == len(view) and zlib.crc32(view) == sums[index]

        if len(sums) != len(pieces):
            return False
        with ThreadPoolExecutor(_THREADS, "shoal-read") as pool:
            return all(pool.map(read, range(len(pieces))))

    def _write(self, path: Path, data: Tensor) -> None:
        # Another process, or another thread of this one, may be writing the same.
        partial = path.with_name(f".{path.name}.{threading.get_ident()}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(path.parent).free < 2 * len(data):
                _log.info("packed weights are not kept: little disk space is left")
                return
            self._remove_left_behind(path)
            pieces = [_bytes(piece) for piece in torch.split(data, _PIECE_BYTES)]
            header = {"size": len(data), "crc32": [zlib.crc32(piece) for piece in pieces]}
            with partial.open("wb") as file:
                file.write(json.dumps(header).encode() + b"\n")
                for piece in pieces:
                    file.write(piece)
            partial.replace(path)
            self._forget_old(path.parent)
        except OSError as error:
            _log.warning("packed weights could not be kept in %s: %s", path.parent, error)
            self._remove(partial)

    def _forget_old(self, folder: Path) -> None:
        newest = sorted(folder.glob("*.bin"), key=lambda path: -path.stat().st_mtime)
        total = 0
        for index, path in enumerate(newest):
            total += path.stat().st_size
            if index >= _MAX_FILES or total > _MAX_BYTES:
                self._remove(path)

    def _remove_left_behind(self, path: Path) -> None:
        """What writers that were killed left."""
        for partial in path.parent.glob(f".{path.name}.*"):
            if not Path(f"/proc/{partial.suffix[1:]}").exists():
                self._remove(partial)

    @staticmethod
    def _remove(path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("%s could not be removed: %s", path, error)


def _bytes(piece: Tensor) -> memoryview:
    return memoryview(piece.numpy())  # type: ignore[arg-type]
