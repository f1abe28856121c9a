"""The import table and the house rules that a parser can see, enforced on every file of src/.

Looks at imports anywhere in a file: inside functions and under TYPE_CHECKING too. The table
is the one that docs/architecture.md shows to readers; a test holds the two together.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src"

ALLOWED: dict[str, str] = {
    "server": "router text observe core",
    "router": "engine policy wire text observe core",
    "engine": "executor policy wire observe core",
    "executor": "worker policy wire core",
    "worker": "model comm kernels kvstore wire core",
    "model": "comm kernels core",
    "cluster": "plan_file kernels comm core",
    "planner": "policy cluster core",
    "doctor": "planner policy plan_file cluster core",
    "sim": "router engine planner policy core",
    "comm": "core",
    "kvstore": "core",
    "policy": "core",
    "plan_file": "core",
    "lab": "plan_file core",
    "probe": "executor worker model cluster wire comm kernels core",
    "text": "core",
    "wire": "core",
    "observe": "core",
    "kernels": "",
    "core": "",
}
"""Room → rooms it may import, besides itself."""

COMPOSITION_ROOTS = {"cli", "llm", "assembly"}
"""May import every room. What `shoal/__init__.py` offers comes from these and core."""

EXCEPTIONS = {
    (room, "shoal.model.spec") for room in ("engine", "sim", "planner")
}  # reads a ModelSpec without torch

WITHOUT_TORCH = {
    *("core", "text", "wire", "router", "engine", "server", "observe", "policy"),
    *("plan_file", "lab", "cluster", "planner", "sim", "doctor"),
}
TORCH = {"torch", "triton", "transformers"}

NOWHERE = {
    "transformers": "it is the reference of tests, not a dependency",
    "pickle": "it runs what it reads",
    "cPickle": "it runs what it reads",
    "dill": "it runs what it reads",
    "cloudpickle": "it runs what it reads",
    "joblib": "it pickles",
    "marshal": "it trusts what it reads",
    "shelve": "it pickles",
    "torch.load": "it pickles; weights come from safetensors and GGUF",
    "torch.multiprocessing": "it pickles; workers start by subprocess",
    "multiprocessing": "it pickles; workers start by subprocess",
}

STATE_MACHINES = {
    "engine": {
        "state",
        "scheduler",
        "sequence",
        "blocks",
        "decode_run",
        "events",
        "flight",
        "intake",
        "places",
        "pools",
        "recovery",
        "transfers",
    },
    "sim": {
        *("cost", "pipeline", "replica", "driver", "faults", "prompts", "setup", "from_plan"),
        *("records", "report", "page", "plots", "instance_seconds"),
    },
    "router": {
        *("state", "events", "moves", "records", "alarms", "watch", "health"),
        *("hedges", "stragglers"),
    },
}
"""Modules that are told the time and do no I/O; so is all of policy/ and core/ but its clock."""

IMPURE = {"time", "random", "datetime", "secrets", "asyncio", "threading", "socket", "subprocess"}

MAX_LINES = 400


def violations(path: Path, source: str) -> Iterator[str]:
    """House rules that `source`, standing at `path` under src/, breaks."""
    tree = ast.parse(source)
    module = path.relative_to(SRC).with_suffix("").parts
    package = module[:-1]  # a package's __init__ and its modules resolve `.` alike
    for line, target in _imports(tree, package):
        for reason in _import_reasons(module, target):
            yield f"{path.relative_to(ROOT)}:{line}: {target}: {reason}"
    for line, reason in _other_reasons(tree, module):
        yield f"{path.relative_to(ROOT)}:{line}: {reason}"
    num_lines = source.count("\n")
    if num_lines > MAX_LINES:
        yield f"{path.relative_to(ROOT)}: {num_lines} lines; {MAX_LINES} at most: split it"


def _imports(tree: ast.Module, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of all that is imported; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and _last_name(node.func) in {
            "import_module",
            "__import__",
        }:
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant):
                yield node.lineno, str(argument.value)


def _import_reasons(module: tuple[str, ...], target: str) -> Iterator[str]:
    room = module[1]
    top = target.split(".")[0]
    for name, why in NOWHERE.items():
        if target == name or target.startswith(name + "."):
            yield f"imported nowhere in src/: {why}"
    if top == "shoal":
        if not _may_import(room, target):
            allowed = ALLOWED.get(room)
            yield (
                f"{room} is not in the import table: add it there"
                if allowed is None
                else f"{room} may import only: {allowed or 'no other room'}"
            )
    elif room == "core" and top not in sys.stdlib_module_names:
        yield "core imports the standard library only"
    elif room in WITHOUT_TORCH and top in TORCH:
        yield f"{room} holds no torch"
    if top in IMPURE and target not in {"random", "random.Random"} and _is_told_the_time(module):
        yield "no clock, chance or I/O here: `now` and `rng` are arguments"


def _may_import(room: str, target: str) -> bool:
    parts = target.split(".")
    other = parts[1] if len(parts) > 1 else ""
    if room in COMPOSITION_ROOTS or other == room:
        return True
    if room in {"__init__", "__main__"}:
        return other in COMPOSITION_ROOTS | {"core"}
    if any(room == who and (target + ".").startswith(what + ".") for who, what in EXCEPTIONS):
        return True
    return other in ALLOWED.get(room, "").split()


def _is_told_the_time(module: tuple[str, ...]) -> bool:
    room, name = module[1], module[-1]
    return (
        name in STATE_MACHINES.get(room, set())
        or room == "policy"
        or (room == "core" and name != "clock")
    )


def _other_reasons(tree: ast.Module, module: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            yield node.lineno, f"torch.load: {NOWHERE['torch.load']}"
        elif isinstance(node, ast.expr) and _is_told_the_time(module) and _is_chance(node):
            yield node.lineno, f"{ast.unparse(node)}: chance comes as an argument, a random.Random"
        elif isinstance(node, ast.Global):
            yield node.lineno, "global: two engines live side by side in one process"
        elif (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, ast.FloorDiv)
            and _last_name(node.right).endswith("world_size")
            and module[1:] != ("core", "split")
        ):
            yield node.lineno, "// world_size stands only in core/split.py: splits are uneven"
    for statement in tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and _is_empty_container(
            statement.value
        ):
            yield (
                statement.lineno,
                "an empty container at module level waits to be filled: a global",
            )


def _is_chance(node: ast.expr) -> bool:
    match node:
        case ast.Attribute(value=ast.Name(id="random"), attr=name):
            return name != "Random"
        case ast.Call(func=function):
            return _last_name(function) == "Random"
    return False


_CONTAINERS = {"list", "dict", "set", "defaultdict", "deque", "Counter", "OrderedDict"}


def _is_empty_container(value: ast.expr | None) -> bool:
    match value:
        case ast.List(elts=[]) | ast.Dict(keys=[]):
            return True
        case ast.Call(args=args) if _last_name(value.func) in _CONTAINERS:
            return not args or _last_name(value.func) == "defaultdict"
    return False


def _last_name(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


# --- the house as it stands ---

FILES = sorted(SRC.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_file_keeps_the_house_rules(path: Path) -> None:
    assert list(violations(path, path.read_text(encoding="utf-8"))) == []


def test_every_room_is_in_the_table() -> None:
    rooms = {path.parent.name for path in SRC.glob("shoal/*/__init__.py")}
    rooms |= {path.stem for path in SRC.glob("shoal/[a-z]*.py")}
    assert rooms >= {"core", "engine", "router", "server", "text"}
    assert rooms - ALLOWED.keys() - COMPOSITION_ROOTS == set()


def test_state_machines_exist_under_the_names_checked() -> None:
    missing = [
        f"{room}/{name}.py"
        for room, names in STATE_MACHINES.items()
        for name in names
        if not (SRC / "shoal" / room / f"{name}.py").exists()
    ]
    assert missing == []


def test_docs_show_the_same_table() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    shown = {
        room: set(rooms.split()) - {"—"}
        for row in re.findall(r"^(?:[a-z_]+ )+ *→ .*$", text, flags=re.MULTILINE)
        for left, _, rooms in [row.partition("→")]
        for room in left.split()
    }
    assert shown == {room: set(rooms.split()) for room, rooms in ALLOWED.items()}


@pytest.mark.parametrize(
    "module",
    [
        "core",
        "text",
        "wire",
        "engine",
        "policy",
        "router",
        "server",
        "observe",
        "model.spec",
        "model.store",
        "plan_file",
        "lab",
        "cluster",
        "policy",
        "planner",
        "doctor",
        "sim",
        "cli.main",
    ],
)
def test_import_loads_no_torch(module: str) -> None:
    program = (
        f"import pkgutil, sys, shoal.{module} as room\n"
        "for found in pkgutil.walk_packages(getattr(room, '__path__', ()), room.__name__ + '.'):\n"
        "    if not found.name.endswith('__main__'): __import__(found.name)\n"
        f"print(*sorted({sorted(TORCH)} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


# --- the checker itself: each rule catches its offence ---


@pytest.mark.parametrize(
    ("where", "source", "complaint"),
    [
        ("text/x.py", "from shoal.engine.state import EngineState\n", "text may import only: core"),
        ("text/x.py", "from shoal import engine\n", "text may import only: core"),
        ("text/x.py", "from ..engine import state\n", "text may import only: core"),
        ("text/__init__.py", "from ..engine import state\n", "text may import only: core"),
        ("router/x.py", "import shoal.server.app\n", "router may import only"),
        ("policy/x.py", "import importlib\nimportlib.import_module('shoal.sim')\n", "policy may"),
        (
            "kernels/x.py",
            "import typing as t\nif t.TYPE_CHECKING:\n    from shoal.core import step\n",
            "kernels may import only: no other room",
        ),
        ("engine/x.py", "def f():\n    import torch.nn\n", "engine holds no torch"),
        ("engine/x.py", "from shoal.model.decoder import Decoder\n", "engine may import only"),
        ("engine/x.py", "from shoal.model.specification import x\n", "engine may import only"),
        ("attic/x.py", "from shoal.core import step\n", "attic is not in the import table"),
        ("core/x.py", "import numpy\n", "core imports the standard library only"),
        ("model/x.py", "from transformers import AutoModel\n", "imported nowhere"),
        ("wire/x.py", "import pickle\n", "imported nowhere"),
        ("worker/x.py", "from torch import multiprocessing\n", "imported nowhere"),
        ("worker/x.py", "from multiprocessing import shared_memory\n", "imported nowhere"),
        ("model/x.py", "import torch\nweights = torch.load('x')\n", "torch.load"),
        ("model/x.py", "def f(n, tp): return n // tp.world_size\n", "// world_size"),
        ("engine/state.py", "import time\n", "`now` and `rng` are arguments"),
        ("policy/x.py", "from random import random\n", "`now` and `rng` are arguments"),
        ("policy/x.py", "import random\nx = random.random()\n", "chance comes as an argument"),
        ("policy/x.py", "import random\nx = random.Random(0)\n", "chance comes as an argument"),
        ("router/x.py", "_seen: dict[str, int] = {}\n", "a global"),
        ("router/x.py", "_seen = set()\n", "a global"),
        ("router/x.py", "def f():\n    global x\n    x = 1\n", "two engines live side by side"),
        ("cli/x.py", "x = 1\n" * 401, "401 lines"),
        ("__init__.py", "from shoal.engine import state\n", "__init__ is not in the import table"),
    ],
)
def test_checker_catches(where: str, source: str, complaint: str) -> None:
    found = list(violations(SRC / "shoal" / where, source))
    assert len(found) >= 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("engine/x.py", "from shoal.model.spec import read_spec\n"),
        ("engine/x.py", "from shoal.model import spec\n"),
        ("cli/x.py", "import torch\nfrom shoal.server.app import app\n"),
        ("llm.py", "from shoal.engine.loop import Engine\n"),
        ("__init__.py", "from shoal.llm import LLM\n"),
        ("__main__.py", "from shoal.cli.main import main\n"),
        ("core/split.py", "def even(n, world_size): return n // world_size\n"),
        ("core/clock.py", "import time\n"),
        ("policy/x.py", "import random\ndef f(rng: random.Random): return rng.random()\n"),
        ("router/driver.py", "import time\n_NAMES = {'a': 1}\n"),
    ],
)
def test_checker_lets_pass(where: str, source: str) -> None:
    assert list(violations(SRC / "shoal" / where, source)) == []
