"""An engine process: started by a router with one end of a socket pair, ends with it.

    python -m shoal.cli.engine_process FD

Knows nothing of HTTP or of other replicas.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

from shoal.assembly import LoadedEngine, load_engine
from shoal.core.errors import RequestError, ShoalError, WireError
from shoal.core.request import ErrorInfo, Output
from shoal.core.stats import EngineStats
from shoal.engine.events import Cancel as CancelEvent
from shoal.engine.events import DrainInstance as DrainInstanceEvent
from shoal.engine.events import EndLease as EndLeaseEvent
from shoal.engine.events import InstancesSlow, Lend, Receive
from shoal.engine.events import LendPrefix as LendPrefixEvent
from shoal.engine.events import Submit as SubmitEvent
from shoal.policy.straggler import InstanceTimes
from shoal.wire.channel import Codec, ThreadChannel
from shoal.wire.loading import LoadingReport
from shoal.wire.messages import (
    Cancel,
    DrainInstance,
    EndLease,
    FromEngine,
    Launch,
    LaunchFailed,
    LendKV,
    LendPrefix,
    Loading,
    News,
    Ready,
    ReceiveKV,
    StepsTook,
    Submit,
    ToEngine,
)

log = logging.getLogger(__name__)

Channel = ThreadChannel[ToEngine, FromEngine]

_STEPS_EVERY_S, _MOST_STEPS = 1.0, 512


def main() -> None:
    """Serve the router at the other end until it is gone."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    codec: Codec[ToEngine, FromEngine] = Codec(ToEngine)
    channel: Channel = ThreadChannel(socket.socket(fileno=int(sys.argv[1])), codec)
    messages = channel.receive()
    first = next(messages, None)
    if not isinstance(first, Launch):
        sys.exit("the first message of an engine process must be Launch")
    loaded: Future[LoadedEngine] = Future()
    threading.Thread(target=_listen, args=(messages, loaded), daemon=True).start()
    engine = _load(channel, first)
    channel.send(Ready(engine.info))
    loaded.set_result(engine)
    threading.Thread(target=_tell_steps, args=(channel, engine), daemon=True).start()
    engine.loop.run()
    engine.executor.close()
    channel.close()
    # Device threads may be in the middle of a Step nobody waits for.
    os._exit(0)


def _load(channel: Channel, launch: Launch) -> LoadedEngine:
    def report(outputs: list[Output], stats: EngineStats) -> None:
        try:
            channel.send(News(outputs, stats))
        except WireError:
            for output in outputs:
                _send_alone(channel, output, stats)

    try:
        return load_engine(
            launch.options,
            report,
            say=lambda line: channel.send(Loading(line=line)),
            progress=LoadingReport(channel.send),
            replica=launch.replica,
            hosts=launch.hosts,
            kv_keys=launch.kv_keys,
            tell_kv=channel.send,
            record=launch.record,
        )
    except ShoalError as error:
        channel.send(LaunchFailed(str(error)))
        channel.close()
        sys.exit(1)


def _tell_steps(channel: Channel, engine: LoadedEngine) -> None:
    """What Steps take, from time to time: it is nobody's hurry."""
    times, slow = InstanceTimes(), tuple[tuple[int, float], ...]()
    while True:
        time.sleep(_STEPS_EVERY_S)
        steps, now = engine.executor.steps_taken()[-_MOST_STEPS:], time.monotonic()
        for step in steps:
            times.note(step, now)
        if (slow_now := times.slow(now)) != slow:
            slow = slow_now
            engine.loop.post(InstancesSlow(slow))
        if steps:
            try:
                channel.send(StepsTook(steps))
            except WireError as error:
                log.debug("times of Steps are not told: %s", error)


def _send_alone(channel: Channel, output: Output, stats: EngineStats) -> None:
    """One output of news that were too large together; if it alone is, its request fails."""
    try:
        channel.send(News([output], stats))
    except WireError as error:
        failure = ErrorInfo.of(RequestError(f"the result is too large: {error}"))
        output = Output(request_id=output.request_id, finish="error", error=failure)
        channel.send(News([output], stats))


def _listen(messages: Iterator[ToEngine], loaded: Future[LoadedEngine]) -> None:
    """Post what the router says; its end, however it comes, is ours."""
    try:
        for message in messages:
            match message:
                case Submit(request):
                    loaded.result().loop.post(SubmitEvent(request))
                case Cancel(request_id):
                    loaded.result().loop.post(CancelEvent(request_id))
                case LendKV(lease_id, request_id, ttl_s, ahead):
                    loaded.result().loop.post(Lend(lease_id, request_id, ttl_s, ahead))
                case LendPrefix(lease_id, names, ttl_s):
                    loaded.result().loop.post(LendPrefixEvent(lease_id, names, ttl_s))
                case DrainInstance(instance, is_drained):
                    loaded.result().loop.post(DrainInstanceEvent(instance, is_drained))
                case EndLease(lease_id):
                    loaded.result().loop.post(EndLeaseEvent(lease_id))
                case ReceiveKV(offer, ttl_s):
                    loaded.result().loop.post(Receive(offer, ttl_s))
                case Launch():
                    log.error("a second Launch is ignored")
    except (OSError, ShoalError):
        log.exception("the router cannot be understood any more")
    finally:
        if not loaded.done():
            os._exit(0)
        loaded.result().loop.stop()


if __name__ == "__main__":
    main()
