"""From what a user calls a model to files on this machine, and what is cached here.

A model is a catalogue name, a local folder with safetensors, a local .gguf file, or a
Hugging Face id: org/name, org/name:file.gguf, org/name:Q4_K_M. A catalogue name wins over
a file of that name (write ./name for the file).

Knows nothing of what the files hold; no torch.
"""

from __future__ import annotations

import difflib
import errno
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shoal.core.errors import ModelError, ModelNotFoundError
from shoal.model import catalogue, hub
from shoal.model.cache import plain_disk_errors
from shoal.model.fingerprint import fingerprint

_SHOWN_CHARS = 100
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(:(?P<hint>[^:]+))?")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """Files of a model on this machine.

    Attributes:
        name: what to call it: the catalogue name or hub id, else the file's or folder's name.
        path: a folder with safetensors, or a .gguf file.
        fingerprint: content identity, for naming KV blocks (see `fingerprint.py`).
    """

    name: str
    path: Path
    fingerprint: str


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model that needs no download; `source` is "catalogue" or "huggingface"."""

    name: str
    path: Path
    size_bytes: int
    source: str


def resolve(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    offline: bool = False,
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ResolvedModel:
    """Find `model`, downloading it if it is not here yet.

    Args:
        revision, token, endpoint: of the Hugging Face hub; None: HF_TOKEN, HF_ENDPOINT, main.
        offline: use only what is cached (HF_HUB_OFFLINE=1 does the same).
        verify: read a cached catalogue model whole and fetch a damaged one anew.
        progress: called with (bytes done, bytes in all) while downloading, from any thread.

    Raises:
        ModelNotFoundError: no such model, no access to it, or no network to fetch it.
        ModelError: it holds no weights we load, or the disk is full or read-only.
    """
    entries = catalogue.load_catalogue()
    if model in entries:
        path = catalogue.fetch(
            entries[model],
            offline=offline or hub.is_offline(),
            verify=verify,
            progress=progress,
        )
        return ResolvedModel(model, path, fingerprint(path))
    if (local := _local(model)) is not None:
        return local
    match = _HUB_ID.fullmatch(model)
    if match is None or model.startswith(("./", "../")) or match["repo"].endswith(".gguf"):
        raise ModelNotFoundError(_unknown(model, list(entries)))
    path = hub.fetch(
        match["repo"],
        match["hint"],
        revision=revision,
        token=token,
        endpoint=endpoint,
        offline=offline,
        progress=progress,
    )
    return ResolvedModel(model, path, fingerprint(path))


def list_cached() -> list[CachedModel]:
    """Models in shoal's cache and in Hugging Face's, by name."""
    found = [
        CachedModel(entry.name, entry.path, _size_bytes(entry.folder), "catalogue")
        for entry in catalogue.load_catalogue().values()
        if entry.path.is_file()
    ]
    found += [
        CachedModel(name, path, size_bytes, "huggingface")
        for name, path, size_bytes in hub.cached_repos()
    ]
    return sorted(found, key=lambda model: model.name)


def find_cached(name: str) -> CachedModel:
    """The cached model `name`.

    Raises:
        ModelNotFoundError: it is in neither cache.
    """
    for model in list_cached():
        if model.name == name:
            return model
    raise ModelNotFoundError(f"{name} is not cached; `shoal models` lists what is")


def remove(name: str) -> None:
    """Delete the cached model `name`; a local file or folder of the user's is never touched.

    Raises:
        ModelNotFoundError: it is in neither cache.
        ModelError: the cache is read-only.
    """
    model = find_cached(name)
    in_catalogue = model.source == "catalogue"
    folder = model.path.parent if in_catalogue else model.path
    with plain_disk_errors(folder, 0, "SHOAL_CACHE" if in_catalogue else "HF_HOME"):
        shutil.rmtree(folder)


def _local(model: str) -> ResolvedModel | None:
    """A file or folder of that name, if there is one."""
    try:
        local = Path(model).expanduser()
        if not model or not local.exists():
            return None
        path = _local_weights(local)
        return ResolvedModel(_local_name(local), path, fingerprint(path))
    except RuntimeError:  # ~nobody
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # a prompt, as like as not
            return None
        raise ModelError(
            f"{model} cannot be read: {error.strerror}; give a folder or file that this user may "
            "read"
        ) from error


def _local_name(local: Path) -> str:
    resolved = local.resolve()
    return resolved.stem if resolved.suffix == ".gguf" else resolved.name


def _local_weights(local: Path) -> Path:
    if local.is_file():
        if local.suffix != ".gguf":
            raise ModelError(
                f"{local} is no model file; give a .gguf file or a folder with safetensors"
            )
        return local
    if any(local.glob("*.safetensors")):
        if not (local / "config.json").is_file():
            raise ModelError(f"{local} holds safetensors but no config.json; add the model's own")
        return local
    ggufs = sorted(local.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        raise ModelError(f"{local} holds {len(ggufs)} .gguf files; name one, such as {ggufs[0]}")
    raise ModelError(
        f"{local} holds no .safetensors or .gguf file, and shoal loads no pickled weights "
        f"(.bin, .pt); convert it with transformers' save_pretrained"
    )


def _unknown(model: str, names: list[str]) -> str:
    near = difflib.get_close_matches(model.lower(), names, n=3, cutoff=0.5)
    if near:
        return f"there is no model {model!r}; did you mean {' or '.join(near)}?"
    shown = model if len(model) <= _SHOWN_CHARS else model[:_SHOWN_CHARS] + "..."
    return (
        f"there is no model {shown!r} here; give a catalogue name ({', '.join(names)}), a folder "
        f"with safetensors, a .gguf file, or a Hugging Face id (org/name)"
    )


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
