"""Messages among workers over the mesh: a header that msgspec encodes, then a tensor's bytes.

    hidden states   coded as was chosen for the peer and their size; large ones by a thread, so
                    that the next Step runs meanwhile
    all else        sent at once

Knows nothing of Steps or of who is sent what.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import SimpleQueue

import msgspec
import torch
from torch import Tensor

from shoal.comm.codec import decode, encode, encoded_bytes
from shoal.core.errors import WireError
from shoal.core.link_forms import FormSteps, form_of
from shoal.wire.mesh import Mesh
from shoal.wire.peer_messages import Activations, PeerMessage
from shoal.worker.stage import FromPeer, Unsent

log = logging.getLogger(__name__)

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_LARGE_BYTES = 64 << 10
"""To code and to copy less takes no longer than to wake a thread."""

Post = Callable[[FromPeer | Unsent], None]


@dataclass(frozen=True, slots=True, eq=False)
class _Parcel:
    peer: str
    message: Activations
    hidden_TE: Tensor


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
        self._forms: Mapping[str, FormSteps] = {}
        self._outbox: SimpleQueue[_Parcel] = SimpleQueue()

    def set_forms(self, forms: Mapping[str, FormSteps]) -> None:
        """How hidden states are coded for each peer; from any thread."""
        self._forms = dict(forms)

    def send(self, peer: str, message: PeerMessage, hidden_TE: Tensor | None = None) -> None:
        if hidden_TE is None or not isinstance(message, Activations):
            self._mesh.send(peer, self._encoder.encode(message))
        elif hidden_TE.numel() * hidden_TE.element_size() < _LARGE_BYTES:
            self._send_hidden(_Parcel(peer, message, hidden_TE))
        else:
            self._outbox.put(_Parcel(peer, message, hidden_TE))

    def run(self, post: Post) -> None:
        """Start to send what is large, and to pass on what comes, for ever."""
        for work in (self._pump, self._send_all):
            threading.Thread(target=work, args=(post,), daemon=True).start()

    def _pump(self, post: Post) -> None:
        while True:
            try:
                arrived = self._mesh.receive(timeout_s=None)
                if arrived is not None:
                    _peer, header, payload = arrived
                    post(self._decode(header, payload))
            except (WireError, msgspec.DecodeError) as error:
                log.error("a message of another worker is left out: %s", error)

    def _send_all(self, post: Post) -> None:
        while True:
            parcel = self._outbox.get()
            try:
                self._send_hidden(parcel)
            except Exception as error:  # noqa: BLE001 - a device's too; the Step fails by it
                post(Unsent(parcel.message, parcel.peer, error))

    @torch.inference_mode()
    def _send_hidden(self, parcel: _Parcel) -> None:
        hidden_TE, message = parcel.hidden_TE, parcel.message
        form = form_of(self._forms.get(parcel.peer, ()), len(hidden_TE))
        if form != "exact":
            message = msgspec.structs.replace(message, form=form)
        payload = encode(hidden_TE, form).cpu().numpy().data
        self._mesh.send(parcel.peer, self._encoder.encode(message), payload)

    def _decode(self, header: bytes, payload: memoryview) -> FromPeer:
        message = self._decoder.decode(header)
        if not isinstance(message, Activations):
            return FromPeer(message)
        dtype = _DTYPES.get(message.dtype)
        if dtype is None or message.num_tokens < 1:
            raise WireError(f"activations of {message.num_tokens} tokens in {message.dtype}")
        needed = encoded_bytes(message.num_tokens, self._hidden_size, message.form, dtype)
        if len(payload) != needed:
            raise WireError(
                f"{len(payload)} bytes for {message.num_tokens} tokens of {self._hidden_size} "
                f"numbers in {message.dtype}, sent as {message.form}; that takes {needed}"
            )
        data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        try:
            hidden_TE = decode(data, message.form, message.num_tokens, self._hidden_size, dtype)
        except ValueError as error:
            raise WireError(f"activations that cannot be read: {error}") from error
        return FromPeer(message, hidden_TE)
