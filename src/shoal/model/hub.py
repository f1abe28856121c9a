"""A model from the Hugging Face hub, or a mirror of it, through huggingface_hub's cache.

Fetches what shoal loads (safetensors or one GGUF file, JSON, chat template) and never a
pickle. huggingface_hub resumes cut downloads and reads HF_TOKEN, HF_ENDPOINT, HF_HOME and
HF_HUB_OFFLINE. It is imported inside functions: most commands never need it.

Knows nothing of what is in the files beyond the names of weight shards.
"""

from __future__ import annotations

import glob
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal.core.errors import ModelError, ModelNotFoundError, UnsupportedModelError
from shoal.model.cache import plain_disk_errors, require_space

Progress = Callable[[int, int], None]

_log = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_PART_OF_SEVERAL = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


class _NoNetworkError(Exception):
    """The hub could not be reached; the message says why."""


def fetch(
    repo: str,
    hint: str | None,
    *,
    revision: str | None,
    token: str | None,
    endpoint: str | None,
    offline: bool,
    progress: Progress | None,
) -> Path:
    """The folder with safetensors, or the .gguf file, of `repo` ("org/name").

    A cached snapshot serves when the hub is out of reach, and at once when `revision` is a
    full commit hash.

    Args:
        hint: which file of a GGUF repo: its name, or its quantisation such as "Q4_K_M".

    Raises:
        ModelNotFoundError: no such repo, revision or file; no access; not cached and offline.
        ModelError: the hub failed, the repo holds no weights we load, or the disk is full.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        try:
            return _cached(repo, hint, revision)
        except ModelNotFoundError:
            _log.debug("%s at %s is not cached whole", repo, revision)
    if not (offline or is_offline()):
        try:
            return _download(repo, hint, revision, token, endpoint, progress)
        except _NoNetworkError as reason:
            _log.warning("cannot reach the hub (%s): looking for %s in the cache", reason, repo)
    return _cached(repo, hint, revision)


def is_offline() -> bool:
    """The user switched downloads off (HF_HUB_OFFLINE=1)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cached_repos() -> list[tuple[str, Path, int]]:
    """(id, folder, bytes on disk) of each model in Hugging Face's cache."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    return [
        (repo.repo_id, repo.repo_path, repo.size_on_disk)
        for repo in repos
        if repo.repo_type == "model"
    ]


def choose(names: Iterable[str], repo: str, hint: str | None) -> list[str]:
    """Of a repo's file names, those to fetch; a single .gguf, or safetensors and what they need.

    Raises:
        ModelError: nothing there that we load, or several files fit.
    """
    top = sorted(name for name in names if "/" not in name)
    shards = [name for name in top if name.endswith(".safetensors")]
    if hint is None and shards:
        if any(not name.startswith("consolidated") for name in shards):
            # Mistral's repos hold their weights twice, once in a format of their own.
            shards = [name for name in shards if not name.startswith("consolidated")]
        return shards + [name for name in top if name.endswith((".json", ".jinja"))]
    ggufs = [name for name in sorted(names) if _is_model_gguf(name)]
    if not ggufs:
        raise ModelError(
            f"{repo} holds no {'.gguf' if hint else '.safetensors or .gguf'} file, and shoal "
            f"loads no pickled weights (.bin, .pt); choose a repo that holds them"
        )
    fits = [name for name in ggufs if hint is None or _fits(name, hint)]
    if len(fits) != 1:
        what = "several .gguf files" if hint is None else f"{len(fits)} .gguf files for {hint!r}"
        raise ModelNotFoundError(
            f"{repo} holds {what}; name one, such as {repo}:{(fits or ggufs)[0]} "
            f"(there are: {', '.join(ggufs)})"
        )
    if _PART_OF_SEVERAL.search(fits[0]):
        raise UnsupportedModelError(
            f"{fits[0]} of {repo} is one part of a split GGUF; shoal reads whole files: choose "
            f"another, or join the parts with llama-gguf-split --merge"
        )
    return fits


def _is_model_gguf(name: str) -> bool:
    return name.endswith(".gguf") and not Path(name).name.startswith("mmproj")


def _fits(name: str, hint: str) -> bool:
    if hint.endswith(".gguf"):
        return name == hint
    stem = re.escape(hint)
    return re.search(rf"(^|[-._/]){stem}(-\d{{5}}-of-\d{{5}})?\.gguf$", name, re.I) is not None


def _download(
    repo: str,
    hint: str | None,
    revision: str | None,
    token: str | None,
    endpoint: str | None,
    progress: Progress | None,
) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    hub_cache = Path(constants.HF_HUB_CACHE)
    with plain_errors(repo, revision, endpoint or constants.ENDPOINT):
        api = HfApi(endpoint=endpoint, token=token, library_name="shoal")
        info = api.model_info(repo, revision=revision, files_metadata=True)
        size_of = {file.rfilename: file.size or 0 for file in info.siblings or []}
        wanted = choose(list(size_of), repo, hint)
        total = sum(size_of[name] for name in wanted)
        snapshot = hub_cache / f"models--{repo.replace('/', '--')}" / "snapshots" / str(info.sha)
        missing = sum(size_of[name] for name in wanted if not (snapshot / name).exists())
        require_space(hub_cache, missing)
        with plain_disk_errors(hub_cache, missing, "HF_HOME"):
            folder = snapshot_download(
                repo,
                revision=revision,
                token=token,
                endpoint=endpoint,
                allow_patterns=[glob.escape(name) for name in wanted],
                tqdm_class=_reporting_bar(total - missing, total, progress),
                library_name="shoal",
            )
    return _usable(Path(folder), wanted)


def _cached(repo: str, hint: str | None, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    where = repo if revision is None else f"{repo} at {revision}"
    remedy = f"run `shoal models pull {repo}` once with network access"
    try:
        # No pattern matches: we only ask where the snapshot is, and judge it ourselves.
        found = snapshot_download(
            repo, revision=revision, local_files_only=True, allow_patterns="?/\n"
        )
    except LocalEntryNotFoundError as error:
        raise ModelNotFoundError(
            f"{where} is not in the Hugging Face cache and the hub was not asked or not reached; "
            f"{remedy}"
        ) from error
    folder = Path(found)
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    try:
        wanted = choose(files, repo, hint)
    except ModelError as error:
        raise ModelNotFoundError(f"{where} is cached only in part ({error}); {remedy}") from error
    index = folder / "model.safetensors.index.json"
    if index.name in wanted:
        shards = _listed_shards(index)
    else:
        shards = {name for name in wanted if _PART_OF_SEVERAL.search(name)}
    missing = {*shards, *([] if wanted[0].endswith(".gguf") else ["config.json"])} - set(wanted)
    if missing:
        raise ModelNotFoundError(
            f"{where} is cached only in part: {', '.join(sorted(missing))} is missing; {remedy}"
        )
    return _usable(folder, wanted)


def _listed_shards(index: Path) -> set[str]:
    try:
        return set(map(str, json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"{index} is not a safetensors index"
        raise ModelError(f"{what}; delete it, and fetch it again") from error


def _usable(folder: Path, wanted: list[str]) -> Path:
    return folder / wanted[0] if wanted[0].endswith(".gguf") else folder


@contextmanager
def plain_errors(repo: str, revision: str | None, endpoint: str) -> Iterator[None]:
    """Turn huggingface_hub's errors into ours, one remedy each."""
    from huggingface_hub import errors

    # Their HTTP client's root error: another library in each major version.
    transport_error: type[Exception] = errors.HfHubHTTPError.__mro__[1]
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{repo} is gated; accept its terms at {endpoint}/{repo}, then pass a token that "
            f"has access with --hf-token or HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{endpoint} has no model {repo}, or it is private; check the spelling, or pass a "
            f"token that has access with --hf-token or HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(
            f"{repo} has no revision {revision!r}; give a branch, tag or commit with --revision"
        ) from error
    except errors.HFValidationError as error:
        raise ModelNotFoundError(
            f"{repo!r} is no Hugging Face id ({error}); ids look like org/name"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        remedy = "check the token" if status in (401, 403) else "try again later"
        raise ModelError(f"{endpoint} answered {status} for {repo}; {remedy}") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, transport_error) as error:
        raise _NoNetworkError(str(error) or type(error).__name__) from error


def _reporting_bar(done: int, total: int, progress: Progress | None) -> Any:
    """A silent progress bar class that reports bytes to `progress`."""
    from huggingface_hub.utils.tqdm import tqdm

    state = {"done": done}

    class ReportingBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            if self._counts and progress is not None:
                state["done"] += int(n or 0)
                progress(min(state["done"], total), total)

    return ReportingBar
