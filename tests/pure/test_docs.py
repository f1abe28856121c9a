"""What the documents name exists: files, links, make targets, commands, flags, Python names."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "shoal"
DOCS = sorted(
    [
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ]
)
COMMANDS = (
    *("serve", "chat", "generate", "models", "bench", "simulate", "eval", "quantize", "lab"),
    *("up", "join", "down", "probe", "plan", "doctor", "replay", "route"),
)
SUFFIXES = (".py", ".md", ".sh", ".toml", ".txt", ".yaml")

every_doc = pytest.mark.parametrize("doc", DOCS, ids=lambda doc: str(doc.relative_to(ROOT)))


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def inline_code(text: str) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def named_paths(text: str) -> list[str]:
    """Inline code that looks like a path of ours: `engine/`, `core/step.py`, `tests/pure`."""
    tops = {entry.name for place in (ROOT, PACKAGE) for entry in place.iterdir() if entry.is_dir()}
    return [
        code
        for code in inline_code(text)
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", code)
        and (code.endswith((*SUFFIXES, "/")) or ("/" in code and code.split("/")[0] in tops))
    ]


def exists(path: str) -> bool:
    return any((place / path).exists() for place in (ROOT, PACKAGE))


@every_doc
def test_named_files_exist(doc: Path) -> None:
    paths = named_paths(doc.read_text(encoding="utf-8"))
    assert [path for path in paths if not exists(path)] == []


@every_doc
def test_links_lead_somewhere(doc: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", doc.read_text(encoding="utf-8"))
    assert [target for target in targets if not (doc.parent / target).exists()] == []


@every_doc
def test_make_targets_exist(doc: Path) -> None:
    text = doc.read_text(encoding="utf-8")
    code = [*inline_code(text), *code_blocks(text, "sh")]
    named = {target for piece in code for target in re.findall(r"\bmake ([a-z][a-z-]*)", piece)}
    assert named - makefile_targets() == set()


def makefile_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][a-z-]*):", makefile, flags=re.MULTILINE))


def test_readme_tree_is_the_tree() -> None:
    (tree,) = code_blocks((ROOT / "README.md").read_text(encoding="utf-8"), "text")
    shown = set(re.findall(r"^  ([\w.]+)/? ", tree, flags=re.MULTILINE))
    there = {
        entry.name
        for entry in PACKAGE.iterdir()
        if (entry / "__init__.py").exists()
        or (entry.suffix == ".py" and not entry.stem.startswith("__"))
    }
    assert shown == there
    tops = re.findall(r"^([\w./]+)", tree, flags=re.MULTILINE)
    assert len(tops) >= 4
    assert [top for top in tops if not (ROOT / top).exists()] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_names_the_command_and_it_exists(command: str) -> None:
    assert f"`shoal {command}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "Usage" in shoal_help(command)


@every_doc
def test_named_commands_and_flags_exist(doc: Path) -> None:
    text = doc.read_text(encoding="utf-8")
    code = [*inline_code(text), *"\n".join(code_blocks(text, "sh")).splitlines()]
    for piece in code:
        if found := re.match(r"(?:\.venv/bin/)?shoal ([a-z]+)", piece):
            assert found[1] in COMMANDS, piece
    flags = {flag for piece in code for flag in re.findall(r"^(?:shoal .*)?(--[a-z-]+)", piece)}
    known = "".join(shoal_help(command) for command in COMMANDS)
    assert [flag for flag in sorted(flags - {"--help"}) if flag not in known] == []


@cache
def shoal_help(command: str) -> str:
    program = "from shoal.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, command, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@every_doc
def test_python_snippets_compile_and_name_what_exists(doc: Path) -> None:
    for snippet in code_blocks(doc.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shoal"):
                spec = importlib.util.find_spec(str(node.module))
                assert spec is not None, node.module
                source = Path(str(spec.origin)).read_text(encoding="utf-8")
                defined = {getattr(item, "name", "") for item in ast.walk(ast.parse(source))}
                assert {alias.name for alias in node.names} <= defined
