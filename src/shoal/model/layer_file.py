"""Weights of layers in a file, one layer after another, read into memory as they are wanted.

    one line of JSON (sizes, checksums) | layer | layer | ...      each on pages of its own

A file with a name serves later starts too; it appears by rename, so it is whole or absent. Knows
nothing of what the bytes mean.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import weakref
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from shoal.core.errors import DeviceError

_MAX_HEADER_BYTES = 1 << 24
_ALIGNMENT = 4096
_log = logging.getLogger(__name__)


class LayerFile:
    """The weights of some layers, one after another, in a file.

    It is kept under a name where it can serve a later start, and read again then; without one it
    is gone with this process.

    Args:
        path: None: it has no name.
        sizes: of each layer, in bytes.
        folder: where it lies, if it has no name.
        write: gives the bytes of a layer; called in order, and only if the file is not there yet.

    Raises:
        DeviceError: no room for it on the disk.
    """

    def __init__(
        self,
        path: Path | None,
        folder: Path,
        sizes: Sequence[int],
        write: Callable[[int], Tensor],
    ) -> None:
        self.sizes = tuple(sizes)
        self._starts = _starts(sizes)
        self._sums: list[int] = []
        self._fd = self._kept(path)
        if self._fd is None:
            self._fd = self._made(path, folder, write)
        weakref.finalize(self, os.close, self._fd)

    @property
    def size_bytes(self) -> int:
        return sum(self.sizes)

    def read(self, index: int, target: Tensor) -> None:
        """All bytes of a layer.

        Raises:
            DeviceError: the disk fails.
        """
        assert self._fd is not None
        view = memoryview(target.numpy())[: self.sizes[index]]  # type: ignore[arg-type]
        done, start = 0, self._starts[index]
        try:
            while done < len(view):
                count = os.preadv(self._fd, [view[done:]], start + done)
                if count == 0:
                    raise OSError("it has become shorter")
                done += count
        except OSError as error:
            raise DeviceError(f"weights on disk can't be read: {error}; start again") from error

    def is_whole(self, index: int, target: Tensor) -> bool:
        """Whether a layer that was just read is what was written."""
        view = memoryview(target.numpy())[: self.sizes[index]]  # type: ignore[arg-type]
        return _checksum(view) == self._sums[index]

    def _kept(self, path: Path | None) -> int | None:
        if path is None or not path.is_file():
            return None
        try:
            with path.open("rb") as file:
                header = json.loads(file.readline(_MAX_HEADER_BYTES))
            if header["sizes"] != list(self.sizes) or len(header["sums"]) != len(self.sizes):
                raise ValueError("it is of other layers")
            if path.stat().st_size < self._starts[-1] + self.sizes[-1]:
                raise ValueError("it is cut short")
            self._sums = header["sums"]
            return os.open(path, os.O_RDONLY)
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("weights in %s are not used: %s", path, error)
            return None

    def _made(self, path: Path | None, folder: Path, write: Callable[[int], Tensor]) -> int:
        folder.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=folder, prefix=".streamed.")
        try:
            for index, size in enumerate(self.sizes):
                view = memoryview(write(index).numpy())[:size]  # type: ignore[arg-type]
                self._sums.append(_checksum(view))
                _write_all(fd, view, self._starts[index])
            header = json.dumps({"sizes": list(self.sizes), "sums": self._sums}).encode() + b"\n"
            assert len(header) <= self._starts[0], "the header's room is as large as any needs"
            _write_all(fd, memoryview(header), 0)
            if path is None:
                Path(name).unlink()
            else:
                Path(name).replace(path)
        except OSError as error:
            os.close(fd)
            Path(name).unlink(missing_ok=True)
            raise DeviceError(
                f"{self.size_bytes / 2**30:.1f} GiB of weights fit neither the memory nor the disk "
                f"of {folder}: {error}; free some space, or use --quantize int4"
            ) from error
        return fd


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each layer begins: pages of their own, behind room for the header."""
    header = _ALIGNMENT * (1 + 64 * len(sizes) // _ALIGNMENT)
    starts = [header]
    for size in sizes[:-1]:
        starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    return starts


def _checksum(view: memoryview) -> int:
    """Of the sums of 64-bit words of each page, which reads at memory's pace; and of what is left.

    Finds any bit that has changed, and any page that is elsewhere.
    """
    whole = len(view) // _ALIGNMENT * _ALIGNMENT
    words = np.frombuffer(view[:whole], np.uint64).reshape(-1, _ALIGNMENT // 8)
    return zlib.crc32(view[whole:], zlib.crc32(words.sum(axis=1)))


def _write_all(fd: int, view: memoryview, start: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], start + done)
