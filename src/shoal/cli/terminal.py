"""What commands show besides their result: byte bars, and a model opened in this process.

All of it goes to stderr: stdout carries results alone. Knows nothing of any one command.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

    from shoal.llm import LLM
    from shoal.model.store import ResolvedModel

_CONTROL = {code: None for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Without control characters: a model's words must not steer the terminal."""
    return text.translate(_CONTROL)


@contextmanager
def byte_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A callback (done bytes, bytes in all) that draws a bar, on a terminal, once it is called."""
    bar: Progress | None = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if not sys.stderr.isatty():
            return  # nor import what would draw it
        if bar is None:
            bar = _start_bar()
            bar.add_task(label, total=total)
        bar.update(bar.task_ids[0], completed=done, total=total)

    try:
        yield show
    finally:
        if bar is not None:
            bar.stop()


def find_model(
    model: str, revision: str | None, token: str | None, *, verify: bool = False
) -> ResolvedModel:
    """`resolve` with a bar for the download."""
    from shoal.model.store import resolve

    with byte_bar(f"downloading {model}") as progress:
        return resolve(model, revision=revision, token=token, verify=verify, progress=progress)


def open_model(model: str, revision: str | None, token: str | None, **options: Any) -> LLM:
    """The model loaded, with bars on the way; on several devices, also what runs where.

    Args:
        options: keyword arguments of `LLM`.
    """
    path = find_model(model, revision, token).path
    from shoal.llm import LLM

    sizes = (options.get("tensor_parallel_size", 1), options.get("pipeline_parallel_size", 1))
    if options.get("plan") is not None or max(sizes) > 1:
        options["say"] = _say
    with byte_bar("loading weights") as progress:
        return LLM(str(path), progress=progress, **options)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _start_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    bar.start()
    return bar
