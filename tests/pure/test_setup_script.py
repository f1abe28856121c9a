"""scripts/setup.sh in a small tree with a pretended pip: when it installs, and what it says."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = "src/shoal/kernels/cpu/csrc"
GROUP_CSRC = "src/shoal/comm/csrc"
LIBRARY = "src/shoal/kernels/cpu/_library.stub.so"
TOOLS = ("sh", "cat", "cksum", "dirname", "df", "awk", "flock", "grep", "ls", "rm", "tail", "touch")
PIP = f"""#!/bin/sh
case "$*" in *install*) ;; *) exit 0 ;; esac
echo "$*" >>installs
if [ -e compiles ]; then touch {LIBRARY}; fi
"""

Setup = Callable[[], tuple[int, str]]


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What the script reads, a compiler that works, and nothing else on PATH."""
    tree = tmp_path / "tree"
    for sources in (CSRC, GROUP_CSRC):
        shutil.copytree(ROOT / sources, tree / sources)
    (tree / "scripts").mkdir()
    for name in ("pyproject.toml", "constraints.txt", "setup.py", "scripts/setup.sh"):
        shutil.copy(ROOT / name, tree / name)
    for folder in (tree / "path", tree / ".venv/bin"):
        folder.mkdir(parents=True)
    program(tree / ".venv/bin/python", PIP)
    program(tree / ".venv/bin/shoal", "")
    program(tree / "path/uname", "#!/bin/sh\necho x86_64\n")
    program(tree / "path/g++", "")
    (tree / "compiles").touch()
    for tool in TOOLS:
        if found := shutil.which(tool):
            (tree / "path" / tool).symlink_to(found)
    return tree


@pytest.fixture
def setup(tree: Path) -> Setup:
    """Runs it: how often pip has installed since the tree was made, and what was said."""

    def run() -> tuple[int, str]:
        result = subprocess.run(
            [tree / "path/sh", "scripts/setup.sh", "serve"],
            cwd=tree,
            env={"PATH": str(tree / "path")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (result.returncode, result.stderr) == (0, "")
        return len((tree / "installs").read_text().splitlines()), result.stdout

    return run


def test_it_installs_once_and_says_what_takes_long(setup: Setup) -> None:
    installs, said = setup()
    assert installs == 1
    assert "compiling the CPU kernels" in said
    assert "ready" in said
    assert setup() == (1, "")


@pytest.mark.parametrize(
    "name",
    [
        *("pyproject.toml", "constraints.txt", "setup.py"),
        *(f"{CSRC}/team.cpp", f"{CSRC}/layers.h", f"{GROUP_CSRC}/group.cpp"),
    ],
)
def test_it_installs_again_when_what_is_built_has_changed(
    setup: Setup, tree: Path, name: str
) -> None:
    setup()
    with (tree / name).open("a") as file:
        file.write("\n")
    assert setup()[0] == 2


def test_it_builds_the_kernels_once_there_is_a_compiler(setup: Setup, tree: Path) -> None:
    (tree / "path/g++").unlink()
    (tree / "compiles").unlink()
    assert "no C++ compiler" in setup()[1]
    assert setup() == (1, "")
    program(tree / "path/g++", "")
    (tree / "compiles").touch()
    installs, said = setup()
    assert installs == 2
    assert "compiling" in said


def test_kernels_that_do_not_compile_are_told_and_no_old_ones_are_left(
    setup: Setup, tree: Path
) -> None:
    (tree / LIBRARY).touch()
    (tree / "compiles").unlink()
    assert "did not compile" in setup()[1]
    assert not (tree / LIBRARY).exists()
