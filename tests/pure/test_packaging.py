"""What pip, make and Docker are told agrees with the tree, as far as reading can tell."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def constraints() -> dict[str, str]:
    lines = [line for line in read("constraints.txt").splitlines() if not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    return {canonical(name): version for name, version in pairs}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def project() -> dict[str, object]:
    return dict(tomllib.loads(read("pyproject.toml"))["project"])


def requirements() -> list[str]:
    described = tomllib.loads(read("pyproject.toml"))["project"]
    return [*described["dependencies"], *described["optional-dependencies"]["dev"]]


PINNED_BY_TORCH = {"triton"}  # CUDA builds of torch need one version each: see constraints.txt


@pytest.mark.parametrize("line", requirements())
def test_every_dependency_is_pinned_within_its_range(line: str) -> None:
    requirement = Requirement(line)
    name = canonical(requirement.name)
    if name in PINNED_BY_TORCH:
        assert name not in constraints(), "no CUDA build of torch could be installed beside it"
        return
    assert requirement.specifier.contains(constraints()[name])


def test_constraints_hold_for_any_machine() -> None:
    versions = constraints()
    assert "shoal" not in versions
    assert [
        name for name, version in versions.items() if not re.fullmatch(r"[\w.]+", version)
    ] == []


def test_every_dependency_has_its_reason() -> None:
    log = read("docs/log.md")
    named = {canonical(Requirement(line).name) for line in requirements()}
    unexplained = {name for name in named if name not in log and not name.startswith("types-")}
    assert unexplained == set()


def test_licence_files_exist() -> None:
    for name in project()["license-files"]:  # type: ignore[attr-defined]
        assert (ROOT / name).is_file()
    assert "Apache License" in read("LICENSE")


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) of the Dockerfile, continued lines joined."""
    lines = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", read("Dockerfile"), flags=re.M))
    return [tuple(line.split(maxsplit=1)) for line in lines.splitlines() if line.strip()]  # type: ignore[misc]


def given(instruction: str) -> list[str]:
    return [rest for name, rest in instructions() if name == instruction]


def is_ignored(path: str) -> bool:
    """By .dockerignore: the last pattern that matches decides."""
    ignored = False
    for line in read(".dockerignore").splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if line and not line.startswith("#") and fnmatch.fnmatch(path, pattern):
            ignored = not line.startswith("!")
    return ignored


def test_docker_copies_what_exists_and_is_not_ignored() -> None:
    sources = [
        source
        for rest in given("COPY")
        if not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert {"constraints.txt", "pyproject.toml", "src"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert [source for source in sources if is_ignored(source)] == []
    assert is_ignored(".venv")
    assert is_ignored(".git")


def test_docker_copies_what_the_package_is_built_from() -> None:
    copied = " ".join(given("COPY"))
    described = project()
    for name in [described["readme"], *described["license-files"]]:  # type: ignore[misc]
        assert str(name) in copied


def test_docker_serves_as_nobody_in_particular_with_a_health_check() -> None:
    assert given("USER") == ["1000"]
    assert "http://127.0.0.1:8000/health" in given("HEALTHCHECK")[0]
    assert given("EXPOSE") == ["8000"]
    assert given("ENTRYPOINT") == ['["shoal", "serve"]']
    assert "-c constraints.txt" in " ".join(given("RUN"))
    assert len(given("FROM")) == 2
    minimum = str(project()["requires-python"]).removeprefix(">=3.")
    for image in given("FROM"):
        version = re.match(r"python:3\.(\d+)-slim", image)
        assert version is not None
        assert int(version[1]) >= int(minimum)
