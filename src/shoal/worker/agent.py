"""What stands beside a worker on a machine that is not its executor's: starts it, and ends with it.

    executor ═══ CURVE, TCP ═══ agent ── socket pair ── worker process

The worker is the same process as on the executor's own machine, and so is what it is told. The
agent ends it when the executor says so or has not been heard for a while; the worker ends with
its agent in any case. Keys: each side makes its own pair, and only public halves are handed over by
whoever placed the agent. Knows nothing of Steps, or of who placed it.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import zmq

from shoal.core.errors import ShoalError, WireError
from shoal.wire.agent_link import EXECUTOR, AgentLink, Kind
from shoal.wire.curve import MeshKeys
from shoal.wire.mesh import Mesh

log = logging.getLogger(__name__)

_READ_BYTES = 1 << 20
_ORPHANED_S = 6.0
_LOOK_EVERY_S = 0.25
_NOT_INHERITED = ("SHOAL_API_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


class Agent:
    """
    Args:
        name: of the worker.
        address: of this machine's interface, for the agent's own sockets.
        executor_public: the executor's key, Z85.
    """

    def __init__(self, name: str, address: str, executor_public: str) -> None:
        public, secret = (half.decode() for half in zmq.curve_keypair())
        keys = MeshKeys(name, secret, {name: public, EXECUTOR: executor_public})
        self._mesh = Mesh(keys, address)
        self._public = public

    def introduce(self) -> tuple[str, str]:
        """The agent's public key, and where its sockets are."""
        return self._public, self._mesh.address

    def find_model(self, path: str, name: str, fingerprint: str) -> tuple[str, str]:
        """Where a model is on this machine, and what is wrong with it, if anything is.

        Args:
            path: where it is on the executor's.
            name: what the user called it: fetched here, if nothing stands at `path`.
        """
        if Path(path).exists():
            return path, ""
        from shoal.model.store import resolve

        try:
            found = resolve(name)
        except ShoalError as error:
            return "", f"there is no {path} on {socket.gethostname()} ({error}); copy it there"
        if found.fingerprint != fingerprint:
            return "", f"{name} is another model on {socket.gethostname()}; copy {path} there"
        return str(found.path), ""

    def start(self, executor_address: str, num_threads: int | None, module: str) -> int:
        """Start the worker, which `module` is; its process id.

        Called in the main thread, as the worker ends with the thread that started it.
        """
        self._mesh.connect(EXECUTOR, executor_address)
        ours, theirs = socket.socketpair()
        env = {name: each for name, each in os.environ.items() if name not in _NOT_INHERITED}
        env.pop("OMP_NUM_THREADS", None)
        if num_threads is not None:
            env["OMP_NUM_THREADS"] = str(num_threads)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=env,
            )
        relay = _Relay(AgentLink(self._mesh, EXECUTOR), ours, process)
        threading.Thread(target=relay.listen, name="shoal-agent-in", daemon=True).start()
        threading.Thread(target=relay.tell, name="shoal-agent-out", daemon=True).start()
        return process.pid


class _Relay:
    """Carries bytes both ways until one side is gone; then this process ends."""

    def __init__(
        self, link: AgentLink, worker: socket.socket, process: subprocess.Popen[bytes]
    ) -> None:
        self._link = link
        self._worker = worker
        self._process = process
        self._over = threading.Event()

    def listen(self) -> None:
        """What the executor says."""
        try:
            while not self._over.is_set():
                arrived = self._link.receive(_LOOK_EVERY_S)
                is_killed = arrived is not None and arrived[0] is Kind.KILL
                if is_killed or self._link.silent_s > _ORPHANED_S:
                    break
                if arrived is not None:
                    self._worker.sendall(arrived[1])
        except (OSError, WireError) as error:
            log.warning("the executor cannot be followed any more: %s", error)
        finally:
            self._process.send_signal(signal.SIGKILL)
            if not self._over.wait(_ORPHANED_S):
                log.warning("the worker did not end; it ends with this process")
            self._link.close()
            os._exit(0)

    def tell(self) -> None:
        """What the worker says, and at last how it ended."""
        try:
            while chunk := self._worker.recv(_READ_BYTES):
                self._link.send(Kind.DATA, chunk)
            self._link.send(Kind.ENDED, str(self._process.wait()).encode())
        except (OSError, WireError) as error:
            log.warning("the executor does not take what the worker says: %s", error)
        finally:
            self._process.kill()
            self._process.wait()
            threading.Event().wait(_LOOK_EVERY_S)  # for what is queued to leave
            self._over.set()
