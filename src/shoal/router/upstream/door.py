"""What all upstreams behind one door have in common: the model, under its names.

Each may call it otherwise. Who serves something else is not let in, rather than asked for what it
would answer wrongly. Of those whose streams others can go on with, one kind is chosen, which holds
as long as one of it is in service: so it changes when the last one has been upgraded. Knows
nothing of sockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from shoal.router.upstream.checks import CheckError, Found


class Door:
    """
    Args:
        names: public name and what upstreams may call it; none: the names of the first upstream.
    """

    def __init__(self, names: Sequence[tuple[str, str]] = ()) -> None:
        self._aliases: dict[str, list[str]] = {}
        for public, theirs in names:
            known = self._aliases.setdefault(public, [public])
            if theirs not in known:
                known.append(theirs)
        self._continuation: str | None = None
        # Of upstreams that are in service, by their names.
        self._continuations: dict[str, str] = {}
        self._listeners: list[Callable[[], None]] = []
        self._is_named = asyncio.Event()
        if self._aliases:
            self._is_named.set()

    @property
    def names(self) -> tuple[str, ...]:
        """By which clients ask for it."""
        return tuple(self._aliases)

    async def named(self) -> None:
        """Wait until there are names."""
        await self._is_named.wait()

    def admit(self, found: Found) -> dict[str, str]:
        """What an upstream calls the model, by public name.

        Raises:
            CheckError: it serves another one, or it is not known which.
        """
        listed = ", ".join(found.names[:8])
        if not self._aliases:
            if not found.is_one_model:
                raise CheckError(f"it lists several models ({listed}); say which with --model-name")
            self._aliases = {name: [name] for name in found.names}
            self._is_named.set()
        called = {
            public: next((each for each in theirs if each in found.names), None)
            for public, theirs in self._aliases.items()
        }
        known = next((each for each in called.values() if each is not None), None)
        if known is None:
            wanted = next(iter(self._aliases))
            raise CheckError(
                f"it lists {listed}, not {wanted}; if that is the same model, say "
                f"--model-name {wanted}={found.names[0]}"
            )
        return {public: theirs or known for public, theirs in called.items()}

    def entered(self, upstream: str, continuation: str | None) -> None:
        """It is in service, and goes on with streams of those that say the same."""
        self.left(upstream)
        if continuation is None:
            return
        self._continuations[upstream] = continuation
        if self._continuation not in self._continuations.values():
            self._continuation = continuation
            for tell in self._listeners:
                tell()

    def left(self, upstream: str) -> None:
        """It is not in service any more."""
        self._continuations.pop(upstream, None)

    def can_continue(self, continuation: str | None) -> bool:
        """Whether who says so goes on exactly with what others behind this door began."""
        return continuation is not None and continuation == self._continuation

    def tells(self, listener: Callable[[], None]) -> None:
        """Call it when another kind was chosen."""
        self._listeners.append(listener)
