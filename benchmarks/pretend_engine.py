"""An engine process without a model: every running request gets one token a step.

    python benchmarks/pretend_engine.py STEP_MS FD

Speaks the wire of a real one (`shoal/wire/messages.py`), so that a server in front of it can be
measured at any pace with next to no compute beside it. Knows nothing of HTTP.
"""

from __future__ import annotations

import socket
import sys
import threading
import time

from shoal.core.request import GenerateRequest, Output
from shoal.core.stats import EngineInfo, EngineStats
from shoal.wire.channel import Codec, ThreadChannel
from shoal.wire.messages import Cancel, FromEngine, News, Ready, Submit, ToEngine

_INFO = EngineInfo(
    max_model_len=8192,
    num_kv_blocks=32768,
    max_num_seqs=64,
    max_num_batched_tokens=512,
    max_waiting=256,
    device="pretended",
    dtype="none",
)
_FIRST_TOKEN = 1000
_IDLE_S = 0.005


class PretendEngine:
    """Tokens at a fixed pace, over whatever requests there are."""

    def __init__(self, step_s: float, fd: int) -> None:
        codec: Codec[ToEngine, FromEngine] = Codec(ToEngine)
        self._channel: ThreadChannel[ToEngine, FromEngine] = ThreadChannel(
            socket.socket(fileno=fd), codec
        )
        self._step_s = step_s
        self._running: dict[str, tuple[GenerateRequest, int]] = {}
        self._gone = False

    def run(self) -> None:
        """Step until the router is gone."""
        self._channel.send(Ready(_INFO))
        threading.Thread(target=self._listen, daemon=True).start()
        due_s, num_steps = time.perf_counter(), 0
        while not self._gone:
            due_s = max(due_s + self._step_s, time.perf_counter() - self._step_s)
            time.sleep(max(due_s - time.perf_counter(), 0.0) if self._running else _IDLE_S)
            outputs = [self._step(request_id) for request_id in list(self._running)]
            num_steps += 1
            stats = EngineStats(num_running=len(self._running), steps=num_steps)
            self._channel.send(News(outputs, stats))

    def _step(self, request_id: str) -> Output:
        request, num_done = self._running[request_id]
        num_done += 1
        finished = num_done == request.sampling.max_tokens
        if finished:
            del self._running[request_id]
        else:
            self._running[request_id] = (request, num_done)
        return Output(
            request_id=request_id,
            token_ids=(_FIRST_TOKEN + num_done,),
            finish="length" if finished else None,
            num_cached_tokens=0 if num_done == 1 else None,
        )

    def _listen(self) -> None:
        for message in self._channel.receive():
            match message:
                case Submit(request):
                    self._running[request.request_id] = (request, 0)
                case Cancel(request_id):
                    self._running.pop(request_id, None)
        self._gone = True


if __name__ == "__main__":
    PretendEngine(float(sys.argv[1]) / 1000, int(sys.argv[2])).run()
