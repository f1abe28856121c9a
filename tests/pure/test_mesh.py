"""Messages between workers: who sent them is certain, strangers are refused, silence is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import psutil
import pytest
import zmq

from shoal.core.errors import WireError
from shoal.wire import mesh as mesh_module
from shoal.wire import pulse
from shoal.wire.curve import MeshKeys, make_keys
from shoal.wire.mesh import MAX_HEADER_BYTES, Mesh

Make = Callable[[str], list[Mesh]]


@pytest.fixture
def make() -> Iterator[Make]:
    """Meshes of these names, all connected to all."""
    made: list[Mesh] = []

    def start(names: str) -> list[Mesh]:
        keys = make_keys(names)
        meshes = [Mesh(keys[name]) for name in names]
        made.extend(meshes)
        for one in meshes:
            for other in meshes:
                if other is not one:
                    one.connect(other.name, other.address)
        return meshes

    yield start
    for mesh in made:
        mesh.close()


def got(mesh: Mesh, timeout_s: float = 60) -> tuple[str, bytes, bytes]:
    message = mesh.receive(timeout_s)
    assert message is not None
    return message[0], message[1], bytes(message[2])


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("num_bytes", [0, 1, 2304, 100_000, 5_000_000])
def test_a_message_comes_with_its_senders_name(make: Make, num_bytes: int) -> None:
    a, b, c = make("abc")
    payload = bytearray(range(256)) * (num_bytes // 256 + 1)
    a.send("b", b"first", memoryview(payload)[:num_bytes])
    sent = bytes(payload[:num_bytes])
    payload[:] = bytes(len(payload))  # sent is sent
    assert got(b) == ("a", b"first", sent)
    c.send("b", b"second")
    assert got(b) == ("c", b"second", b"")
    b.send("a", b"back")
    assert got(a) == ("b", b"back", b"")


def test_messages_of_one_sender_stay_in_order(make: Make) -> None:
    a, b = make("ab")
    for number in range(200):
        a.send("b", b"%d" % number, bytes(number * 50))
    assert [got(b)[1] for _ in range(200)] == [b"%d" % number for number in range(200)]


def test_a_worker_can_send_to_itself_from_any_thread(make: Make) -> None:
    (a,) = make("a")
    assert a.receive(0) is None
    timer = threading.Timer(0.1, lambda: a.send("a", b"wake", b"up"))
    timer.start()
    assert got(a) == ("a", b"wake", b"up")
    timer.join()


def test_receiving_ends_at_the_timeout(make: Make) -> None:
    (a,) = make("a")
    assert a.receive(0.05) is None


def test_a_peer_that_was_not_connected_is_an_error(make: Make) -> None:
    a, b = make("ab")
    a.disconnect("b")
    with pytest.raises(WireError, match="b is not connected"):
        a.send("b", b"x")
    with pytest.raises(WireError, match="no key for z"):
        a.connect("z", b.address)
    with pytest.raises(WireError, match="no endpoint"):
        a.connect("b", "somewhere else")
    with pytest.raises(WireError, match="is not connected"):
        a.send("b", b"x")
    assert a.heard("b") == float("inf")
    a.connect("b", b.address)
    a.send("b", b"again")
    assert got(b)[1] == b"again"


def test_a_peer_that_takes_nothing_does_not_hold_the_sender_up() -> None:
    keys = make_keys("ab")
    a = Mesh(keys["a"])
    a.connect("b", "tcp://127.0.0.1:1 tcp://127.0.0.1:1")  # nobody is there
    with pytest.raises(WireError, match="takes none"):
        for _ in range(1000):
            a.send("b", b"x", b"y")
    a.close()


def test_messages_over_the_limits_are_not_sent(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh_module, "MAX_PAYLOAD_BYTES", 1000)
    a, b = make("ab")
    with pytest.raises(WireError, match="payload of 1001"):
        a.send("b", b"", bytes(1001))
    with pytest.raises(WireError, match=f"header of {MAX_HEADER_BYTES + 1}"):
        a.send("b", bytes(MAX_HEADER_BYTES + 1))
    a.send("b", b"fits", bytes(1000))
    assert got(b)[1] == b"fits"
    monkeypatch.setattr(mesh_module, "MAX_PAYLOAD_BYTES", 1 << 30)
    a.send("b", b"b's limit is as before", bytes(100_000))
    assert b.receive(0.5) is None
    b.send("a", b"b is well")
    assert got(a)[1] == b"b is well"


def test_a_message_of_other_parts_is_refused(make: Make) -> None:
    a, b = make("ab")
    a._peers["b"].send_multipart([b"1", b"2", b"3"])
    with pytest.raises(WireError, match="a sent 3 parts"):
        b.receive(60)


def knock(address: str, setup: Callable[[zmq.Socket[bytes]], None]) -> None:
    """Send to both ports as a stranger."""
    with zmq.Context() as context:
        sockets = [context.socket(zmq.PUSH) for _ in address.split()]
        for socket, endpoint in zip(sockets, address.split(), strict=True):
            socket.linger = 0
            setup(socket)
            socket.connect(endpoint)
            socket.send_multipart([b"let", b"me in"])
        time.sleep(0.5)
        for socket in sockets:
            socket.close()


def with_key_of_nobody(server: str) -> Callable[[zmq.Socket[bytes]], None]:
    def setup(socket: zmq.Socket[bytes]) -> None:
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
        socket.curve_serverkey = server.encode()

    return setup


def test_strangers_are_refused(make: Make) -> None:
    a, b = make("ab")
    server = a._keys.public["a"]
    knock(a.address, lambda socket: None)
    knock(a.address, with_key_of_nobody(server))
    knock(a.address, with_key_of_nobody(zmq.curve_keypair()[0].decode()))
    assert a.num_refused >= 2
    assert a.receive(0.2) is None
    b.send("a", b"friend")
    assert got(a) == ("b", b"friend", b"")


def test_raw_bytes_do_no_harm(make: Make) -> None:
    import socket

    a, b = make("ab")
    for endpoint in a.address.split():
        host, port = endpoint.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 1000)
    b.send("a", b"friend")
    assert got(a)[1] == b"friend"


def test_who_connects_knows_whom_it_gets() -> None:
    """Where another worker listens, a message for b is not delivered."""
    keys = make_keys("abc")
    a, c = Mesh(keys["a"]), Mesh(keys["c"])
    a.connect("b", c.address)
    a.send("b", b"secret")
    assert c.receive(0.5) is None
    a.close()
    c.close()


def test_a_name_cannot_be_borrowed(make: Make) -> None:
    a, b = make("ab")
    liar = Mesh(replace(b._keys, name="a", secret=b._keys.secret))
    liar._keys = MeshKeys("b", b._keys.secret, b._keys.public)
    liar.connect("a", a.address)
    liar.send("a", b"I am a")
    assert got(a)[0] == "b"
    liar.close()


def test_keys_are_not_printed() -> None:
    keys = make_keys("ab")["a"]
    assert keys.secret not in repr(keys)


def test_it_listens_on_one_interface() -> None:
    mesh = Mesh(make_keys("a")["a"], "127.0.0.1")
    listening = {
        (each.laddr.ip, each.laddr.port)
        for each in psutil.Process().net_connections()
        if each.status == psutil.CONN_LISTEN
    }
    ports = {int(endpoint.rpartition(":")[2]) for endpoint in mesh.address.split()}
    assert len(ports) == 2
    assert {("127.0.0.1", port) for port in ports} <= listening
    mesh.close()
    with pytest.raises(WireError, match=r"cannot listen on 192\.0\.2\.77"):
        Mesh(make_keys("a")["a"], "192.0.2.77")


def test_two_meshes_side_by_side(make: Make) -> None:
    a, b = make("ab")
    other_a, other_b = make("ab")
    a.send("b", b"one")
    other_a.send("b", b"two")
    assert got(b)[1] == b"one"
    assert got(other_b)[1] == b"two"
    other_a.connect("b", b.address)  # of the other mesh: another key
    other_a.send("b", b"lost")
    assert b.receive(0.3) is None


def test_a_peer_is_heard_and_its_distance_is_known(make: Make) -> None:
    a, b = make("ab")
    wait_until(lambda: a.latency("b") is not None)
    wait_until(lambda: a.heard("b") < 1)
    assert a.latency("b") > 0
    assert a.round_trip("b", 64) > 0
    assert a.round_trip("b", 1 << 20) > 0
    b.close()
    with pytest.raises(WireError, match="did not say"):
        a.round_trip("b", 64, timeout_s=0.1)
    wait_until(lambda: a.heard("b") > 1)
    b.__init__(a._keys)  # type: ignore[misc]  # so that the fixture can close it


def test_a_cut_link_is_silent_and_heals(make: Make) -> None:
    a, b = make("ab")
    wait_until(lambda: b.latency("a") is not None)
    a.set_link("b", cut=True)
    a.send("b", b"later")
    assert b.receive(1.2) is None
    wait_until(lambda: b.heard("a") > 0.9)
    a.set_link("b")
    assert got(b) == ("a", b"later", b"")
    wait_until(lambda: b.heard("a") < 0.4)
    a.send("b", b"as before")
    assert got(b)[1] == b"as before"


def test_a_peer_that_was_silent_for_long_is_connected_anew(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "_SILENCE_S", 0.6)
    a, b = make("ab")
    wait_until(lambda: b.latency("a") is not None)
    before = b._peers["a"]
    a.set_link("b", cut=True)
    wait_until(lambda: b.heard("a") > 0.8)
    a.set_link("b")
    wait_until(lambda: b._peers["a"] is not before)
    b.send("a", b"hello")
    assert got(a) == ("b", b"hello", b"")


def test_a_slow_link_takes_its_time_and_keeps_the_order(make: Make) -> None:
    a, b = make("ab")
    a.send("b", b"warm")
    got(b)
    a.set_link("b", bandwidth_bytes_per_s=1e6, latency_s=0.1)
    began = time.monotonic()
    for number in range(3):
        a.send("b", b"%d" % number, bytes(100_000))
    arrivals = []
    for number in range(3):
        assert got(b)[1] == b"%d" % number
        arrivals.append(time.monotonic() - began)
    for arrived, expected in zip(arrivals, (0.2, 0.3, 0.4), strict=True):
        assert arrived > expected - 0.01
    a.set_link("b", bandwidth_bytes_per_s=1e3)
    a.set_link("b")
    a.send("b", b"at once, not in 100 s", bytes(100_000))
    got(b)


def test_a_slow_link_is_bounded_too(make: Make) -> None:
    a, _ = make("ab")
    a.set_link("b", cut=True)
    with pytest.raises(WireError, match="lab link"):
        for _ in range(1000):
            a.send("b", b"x")


def test_large_messages_do_not_hold_up_the_pulse(make: Make) -> None:
    a, b = make("ab")
    wait_until(lambda: b.latency("a") is not None)
    a.set_link("b", bandwidth_bytes_per_s=1e4)
    a.send("b", b"takes 300 s", bytes(3_000_000))
    for _ in range(3):
        wait_until(lambda: b.heard("a") > 0.1)
        wait_until(lambda: b.heard("a") < 0.1)  # another beat
    assert b.receive(0) is None


PEER = """
import json, sys
from shoal.wire.curve import MeshKeys
from shoal.wire.mesh import Mesh
mesh = Mesh(MeshKeys(*json.loads(sys.stdin.readline())))
print(mesh.address, flush=True)
mesh.connect("a", sys.stdin.readline().strip())
while True:
    sender, header, payload = mesh.receive(None)
    mesh.send("a", header, payload)
"""


def test_processes_and_one_that_is_started_again() -> None:
    keys = make_keys("ab")
    a = Mesh(keys["a"])

    def start() -> subprocess.Popen[str]:
        peer = subprocess.Popen(
            [sys.executable, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert peer.stdin is not None
        assert peer.stdout is not None
        own = keys["b"]
        peer.stdin.write(json.dumps([own.name, own.secret, dict(own.public)]) + "\n")
        peer.stdin.write(a.address + "\n")
        peer.stdin.flush()
        a.connect("b", peer.stdout.readline().strip())
        return peer

    for number in (b"1", b"2"):
        peer = start()
        a.send("b", number, b"payload")
        assert got(a, 20) == ("b", number, b"payload")
        peer.kill()
        peer.communicate()
        wait_until(lambda: a.heard("b") > 1.5)
    a.close()
