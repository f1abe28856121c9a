"""A replica that is a server of somebody else's: how the router reaches it, and whether it works.

A request whose attempt fails may go to another upstream; the upstream itself is given up when it
fails a check and none of its streams speaks, and is asked again until it is back. A check is the
generation of one token, made only when no client's request has shown the same for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

from shoal.core.kv import KVOffer
from shoal.core.plan import ReplicaPlan
from shoal.core.request import ErrorInfo, GenerateRequest
from shoal.core.stats import EngineInfo, EngineStats
from shoal.core.step_times import InstanceStep
from shoal.router.driver import Router
from shoal.router.events import (
    AttemptFailed,
    AttemptHeld,
    Event,
    ReplicaLost,
    ReplicaOutputs,
    ReplicaReady,
    ReplicaStuck,
)
from shoal.router.upstream.address import Address
from shoal.router.upstream.attempts import Attempt, UpstreamLimits
from shoal.router.upstream.bodies import body_for
from shoal.router.upstream.checks import CheckError, generates, look
from shoal.router.upstream.connection import Connection, Pool
from shoal.router.upstream.door import Door
from shoal.router.upstream.records import ProxiedOutput, ProxiedRequest

log = logging.getLogger(__name__)

_PATHS = ("/v1/chat/completions", "/v1/completions")


@dataclass(frozen=True, slots=True)
class _Service:
    """What an upstream was found to be.

    Attributes:
        models: what it calls them, by public name.
        continuation: it goes on with streams of those that say the same; None: with nobody's.
    """

    models: Mapping[str, str]
    continuation: str | None
    info: EngineInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckTimes:
    """
    Attributes:
        every_s: a check is made when nothing else showed for so long that an upstream works.
        silence_s: one that has something to answer, and says nothing for so long, is asked whether
            it still listens.
        timeout_s: for each question of it.
        first_retry_s, max_retry_s: pauses while it does not work, each twice the last.
    """

    every_s: float = 30.0
    silence_s: float = 5.0
    timeout_s: float = 20.0
    first_retry_s: float = 0.5
    max_retry_s: float = 10.0


class UpstreamClient:
    """
    Args:
        door: that it stands behind, with others.
    """

    def __init__(
        self,
        address: Address,
        door: Door,
        limits: UpstreamLimits | None = None,
        times: CheckTimes | None = None,
    ) -> None:
        self.name = address.name
        self._address, self._door = address, door
        self._limits, self._times = limits or UpstreamLimits(), times or CheckTimes()
        self._pool = Pool(address)
        self._router: Router | None = None
        # Asking for it with every token costs a system call each time.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._incarnation = 0
        # As the router knows it; None: it is out of service.
        self._service: _Service | None = None
        self._continues = False
        door.tells(self._tell_of_it_anew)
        self._paths: tuple[str, ...] = _PATHS
        self._attempts: dict[str, Attempt] = {}
        self._connecting: set[asyncio.Task[None]] = set()
        self._doubt = asyncio.Event()
        self._spoke_s = 0.0
        self._is_stuck = False
        self._num_prompt_tokens = self._num_output_tokens = 0

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._attempts),
            prompt_tokens=self._num_prompt_tokens,
            output_tokens=self._num_output_tokens,
        )

    @property
    def plan(self) -> ReplicaPlan | None:
        return None

    @property
    def steps_taken(self) -> Collection[InstanceStep]:
        return ()

    # --- for the router ---

    def send(self, request: GenerateRequest) -> None:
        assert isinstance(request, ProxiedRequest), "only text goes to an upstream"
        service, call = self._service, request.call
        assert service is not None, "only who is in service is asked"
        attempt = self._attempts[request.request_id] = Attempt(
            request,
            self,
            self._limits,
            name=self.name,
            model=service.models[call.model],
            continuation=service.continuation if self._continues else None,
        )
        if request.output_ids and not (attempt.tells_ids and call.is_of(service.continuation)):
            attempt.fail("cannot go on with what another model began", status=503)
            return
        self._num_prompt_tokens += len(request.prompt_ids)
        connection = self._pool.idle()
        if connection is not None:
            self._ask(attempt, connection)
        else:
            self._connect(attempt)

    def cancel(self, request_id: str) -> None:
        attempt = self._attempts.get(request_id)
        if attempt is not None:
            attempt.drop()

    def lend(self, lease_id: int, request_id: str, ttl_s: float, *, ahead: bool) -> None:
        _has_no_kv()

    def lend_prefix(self, lease_id: int, names: tuple[bytes, ...], ttl_s: float) -> None:
        _has_no_kv()

    def end_lease(self, lease_id: int) -> None:
        _has_no_kv()

    def receive(self, offer: KVOffer, ttl_s: float) -> None:
        _has_no_kv()

    def drain_instance(self, instance: int, *, is_drained: bool) -> None:
        _has_no_kv()

    async def run(self, router: Router) -> None:
        """Check it, now and then, and say whether requests may be sent there."""
        self._router, self._loop = router, asyncio.get_running_loop()
        while True:
            await self._until_it_works(router)
            reason = await self._until_it_fails(router)
            log.warning("%s is out of service: %s", self.name, reason)
            self._drop_all()
            self._pool.close()
            self._service = None
            self._door.left(self.name)
            router.tell(ReplicaLost(self.name, self._incarnation, reason))
            self._incarnation += 1
            self._is_stuck = False

    async def close(self) -> None:
        self._drop_all()
        for task in self._connecting:
            task.cancel()
        self._pool.close()

    # --- for attempts ---

    def said(self, output: ProxiedOutput) -> None:
        assert self._router is not None
        assert self._loop is not None
        self._spoke_s = self._loop.time()
        self._num_output_tokens += len(output.token_ids)
        self._router.tell(ReplicaOutputs(self.name, self._incarnation, [output]))

    def failed(self, attempt: Attempt, error: ErrorInfo) -> None:
        log.info("%s", error.message)
        if error.status not in (429, 503):  # there is only too much to do
            self._doubt.set()
        failed = AttemptFailed(self.name, self._incarnation, attempt.request.request_id, error)
        # It may be the router that calls.
        asyncio.get_running_loop().call_soon(self._tell, failed)

    def held(self, attempt: Attempt, *, is_held: bool) -> None:
        request_id = attempt.request.request_id
        held = AttemptHeld(self.name, self._incarnation, request_id, is_held)
        asyncio.get_running_loop().call_soon(self._tell, held)

    def again(self, attempt: Attempt) -> None:
        self._connect(attempt)

    def settled(self, attempt: Attempt) -> None:
        self._attempts.pop(attempt.request.request_id, None)

    # ---

    def _tell(self, event: Event) -> None:
        assert self._router is not None
        self._router.tell(event)

    def _ask(self, attempt: Attempt, connection: Connection) -> None:
        request = attempt.request
        body = body_for(request, attempt.model, continues=attempt.tells_ids)
        head = self._address.head("POST", request.call.path, len(body))
        attempt.begin(connection, head + body)

    def _connect(self, attempt: Attempt) -> None:
        task = asyncio.create_task(self._ask_anew(attempt))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _ask_anew(self, attempt: Attempt) -> None:
        try:
            connection = await self._pool.connect()
        except TimeoutError:
            attempt.fail("did not take a connection in time")
        except (OSError, UnicodeError) as error:  # a host's name may be one that no resolver takes
            attempt.fail(f"cannot be connected to: {error}")
        else:
            self._ask(attempt, connection)

    def _drop_all(self) -> None:
        for attempt in list(self._attempts.values()):
            attempt.drop()

    async def _until_it_works(self, router: Router) -> None:
        pause_s, said = self._times.first_retry_s, ""
        while True:
            try:
                service = await self._check()
            except CheckError as error:
                if str(error) != said:
                    said = str(error)
                    log.warning("%s is not in service yet: %s", self.name, said)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, self._times.max_retry_s)
                continue
            log.info("%s is in service, as %s", self.name, ", ".join(set(service.models.values())))
            self._doubt.clear()
            self._door.entered(self.name, service.continuation)
            self._service = service
            self._tell_of_it(router, service)
            return

    def _tell_of_it(self, router: Router, service: _Service) -> None:
        self._continues = self._door.can_continue(service.continuation)
        info = replace(service.info, restarts=not self._continues)
        router.tell(ReplicaReady(self.name, self._incarnation, info))

    def _tell_of_it_anew(self) -> None:
        """The door chose whose streams are gone on with."""
        service, router = self._service, self._router
        if service is None or router is None:
            return
        if self._door.can_continue(service.continuation) != self._continues:
            self._tell_of_it(router, service)

    def _is_another(self, router: Router, found: _Service) -> bool:
        """Whether another server answers there now than the one the router knows; that the same
        one takes more or less than before, it is told."""
        known = self._service
        assert known is not None, "it is in service"
        if (found.models, found.continuation) != (known.models, known.continuation):
            return True
        if found.info != known.info:
            self._service = found
            self._tell_of_it(router, found)
        return False

    async def _until_it_fails(self, router: Router) -> str:
        """The reason."""
        loop, times, num_failed = asyncio.get_running_loop(), self._times, 0
        while True:
            wait_s = times.first_retry_s if num_failed else min(times.silence_s, times.every_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._doubt.wait()
            is_doubted, began_s = self._doubt.is_set() or num_failed > 0, loop.time()
            self._doubt.clear()
            silent_s = began_s - self._spoke_s
            try:
                if is_doubted or silent_s >= times.every_s:
                    if self._is_another(router, await self._check()):
                        return "another server answers there now"
                    num_failed = 0
                    self._tell_stuck(router, False)
                elif self._attempts and silent_s >= times.silence_s:
                    await look(self._address, self._pool, times.silence_s)
            except CheckError as error:
                # Of one that is only busy, or leaves in order, streams still come.
                num_failed = 0 if self._spoke_s >= began_s else num_failed + 1
                if error.is_gone and not self._attempts:
                    return str(error)
                if num_failed >= _MAX_FAILED and not (error.is_busy and self._works_unseen):
                    return str(error)
                self._tell_stuck(router, num_failed > 0)
            if is_doubted:  # at most so often
                await asyncio.sleep(times.first_retry_s)

    @property
    def _works_unseen(self) -> bool:
        """It has requests whose answers come as a whole, perhaps after all others' turns."""
        return any(not each.request.tells_progress for each in self._attempts.values())

    def _tell_stuck(self, router: Router, is_stuck: bool) -> None:
        """What is there may be asked of others too; it still counts if it comes."""
        if is_stuck != self._is_stuck:
            self._is_stuck = is_stuck
            router.tell(ReplicaStuck(self.name, self._incarnation, is_stuck))

    async def _check(self) -> _Service:
        """What it is, if it works.

        Raises:
            CheckError: it does not.
        """
        timeout_s = self._times.timeout_s
        found = await look(self._address, self._pool, timeout_s)
        models = self._door.admit(found)
        model = next(iter(models.values()))
        works = await generates(self._address, self._pool, model, self._paths, timeout_s)
        self._paths = (works, *(path for path in _PATHS if path != works))
        self._spoke_s = asyncio.get_running_loop().time()
        return _Service(models, found.continuation, found.info)


_MAX_FAILED = 2


def _has_no_kv() -> NoReturn:
    raise AssertionError("what upstreams have computed is out of reach")
