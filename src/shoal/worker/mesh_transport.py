"""Messages among workers over the mesh: a header that msgspec encodes, then a tensor's bytes.

Knows nothing of Steps or of who is sent what.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec
import torch
from torch import Tensor

from shoal.core.errors import WireError
from shoal.wire.mesh import Mesh
from shoal.wire.worker_messages import Activations, PeerMessage
from shoal.worker.stage import FromPeer

log = logging.getLogger(__name__)

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class MeshTransport:
    """Sends, and passes on what comes.

    Args:
        mesh: this worker's.
        hidden_size: of activations.
    """

    def __init__(self, mesh: Mesh, hidden_size: int) -> None:
        self._mesh = mesh
        self._hidden_size = hidden_size
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[PeerMessage] = msgspec.msgpack.Decoder(PeerMessage)

    def send(self, peer: str, message: PeerMessage, hidden_TE: Tensor | None = None) -> None:
        payload: memoryview | bytes = b""
        if hidden_TE is not None:
            payload = hidden_TE.cpu().contiguous().view(torch.uint8).numpy().data
        self._mesh.send(peer, self._encoder.encode(message), payload)

    def pump(self, post: Callable[[FromPeer], None]) -> None:
        """Pass on what comes, for ever."""
        while True:
            try:
                arrived = self._mesh.receive(timeout_s=None)
                if arrived is not None:
                    _peer, header, payload = arrived
                    post(self._decode(header, payload))
            except (WireError, msgspec.DecodeError) as error:
                log.error("a message of another worker is left out: %s", error)

    def _decode(self, header: bytes, payload: memoryview) -> FromPeer:
        message = self._decoder.decode(header)
        if not isinstance(message, Activations):
            return FromPeer(message)
        dtype = _DTYPES.get(message.dtype)
        if dtype is None or message.num_tokens < 1:
            raise WireError(f"activations of {message.num_tokens} tokens in {message.dtype}")
        if len(payload) != message.num_tokens * self._hidden_size * dtype.itemsize:
            raise WireError(
                f"{len(payload)} bytes for {message.num_tokens} tokens of {self._hidden_size} "
                f"numbers in {message.dtype}"
            )
        numbers = torch.frombuffer(bytearray(payload), dtype=dtype)
        return FromPeer(message, numbers.view(message.num_tokens, self._hidden_size))
