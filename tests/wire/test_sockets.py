"""The two sockets: what they do when the other side is not there, or does not read."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from zps.errors import HubError, HubUnreachable
from zps.wire import sockets
from zps.wire.sockets import Dealer, Router, host_id, readable

PATIENCE_S = 20.0


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/s"


def receive(router: Router) -> list[bytes]:
    assert router.socket.poll(PATIENCE_S * 1000)
    frames = router.receive()
    assert frames is not None
    return frames


def greet(router: Router, dealer: Dealer) -> bytes:
    """The routing id under which the router knows this dealer."""
    dealer.send([b"hello"], PATIENCE_S)
    return receive(router)[0]


def turn(router: Router) -> list[bytes]:
    """What the hub's loop does; libzmq looks at what has changed in a poll, not in a send."""
    router.socket.poll(10)
    assert router.receive() is None
    return router.flush()


def test_messages_go_both_ways(context, address):
    router, dealer = Router(context, address, 4096), Dealer(context, address, 4096)
    peer = greet(router, dealer)
    assert router.receive() is None
    assert router.send(peer, [b"welcome", memoryview(b"xyz")[1:]])
    assert dealer.receive(PATIENCE_S) == [b"welcome", b"yz"]
    assert dealer.receive(0) is None


def test_every_dealer_has_a_fresh_identity(context, address):
    router = Router(context, address, 4096)
    peers = [greet(router, Dealer(context, address, 4096)) for _ in range(3)]
    assert len(set(peers)) == 3


def test_an_unknown_peer_is_not_sent_to_in_silence(context, address):
    router = Router(context, address, 4096)
    assert router.send(b"nobody", [b"x"]) is False
    assert not router.backlog


def test_a_peer_that_does_not_read_fills_its_own_queue_only(context, address, monkeypatch):
    monkeypatch.setattr(sockets, "MAX_QUEUED_BYTES", 1 << 20)
    router = Router(context, address, 1 << 20)
    slow, good = Dealer(context, address, 1 << 20), Dealer(context, address, 1 << 20)
    slow_id, good_id = greet(router, slow), greet(router, good)
    block = bytes(256 << 10)
    sent = 0
    while router.send(slow_id, [block]):  # it never blocks, and ends
        sent += 1
        assert sent < 1000
    assert sent > 4  # the queue alone holds that many
    assert router.send(good_id, [b"still here"])
    assert good.receive(PATIENCE_S) == [b"still here"]
    assert not router.backlog  # what waited for the slow one has been given up


def test_what_waited_is_sent_in_order_once_there_is_room(context, address):
    router, dealer = Router(context, address, 4096), Dealer(context, address, 4096)
    peer = greet(router, dealer)
    count = 0
    while not router.backlog:
        assert router.send(peer, [b"%d" % count, bytes(4000)])
        count += 1
    for _ in range(5):
        assert router.send(peer, [b"%d" % count, bytes(4000)])
        count += 1
    for expected in range(count):
        while (frames := dealer.receive(0.01)) is None:
            assert turn(router) == []
        assert frames[0] == b"%d" % expected
    assert turn(router) == []
    assert not router.backlog


def test_a_queue_to_a_peer_that_has_left_is_given_up(context, address):
    router, dealer = Router(context, address, 1 << 20), Dealer(context, address, 1 << 20)
    peer = greet(router, dealer)
    while not router.backlog:
        router.send(peer, [bytes(256 << 10)])
    dealer.close()
    while not (gone := turn(router)):
        pass
    assert gone == [peer]
    assert not router.backlog


BUSY = """
import os, sys, zmq
from zps.wire.sockets import HWM, Dealer, Router

context = zmq.Context()
router = Router(context, sys.argv[1], 4096)
peer = os.fork()
if peer == 0:
    dealer = Dealer(zmq.Context(), sys.argv[1], 4096)
    for number in range(100 * HWM):  # more than what anybody holds for a hub that does not read
        if not dealer.socket.poll(500, zmq.POLLOUT) or not dealer.try_send([bytes(1000)]):
            break
    os.kill(os.getpid(), 9)
os.waitpid(peer, 0)
router.monitor.poll(2000)
while router.socket.poll(100):
    assert router.receive()
print("alive")
"""


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_a_hub_that_is_busy_outlives_a_peer_that_ends_with_messages_unread(address, kind):
    if kind == "tcp":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    hub = subprocess.run(
        [sys.executable, "-c", BUSY, address], capture_output=True, timeout=PATIENCE_S, check=False
    )
    assert (hub.returncode, hub.stdout) == (0, b"alive\n"), hub.stderr


def test_a_dealer_queues_nothing_to_a_hub_that_is_not_there(context, address):
    dealer = Dealer(context, address, 4096)
    with pytest.raises(HubUnreachable, match=f"at {address} for 0.2 s"):
        dealer.send([b"x"], 0.2)
    router = Router(context, address, 4096)
    dealer.send([b"y"], PATIENCE_S)
    assert receive(router)[1:] == [b"y"]


def test_a_place_where_nothing_can_listen_is_an_error_and_keeps_nothing_open(context, tmp_path):
    with pytest.raises(HubError, match="cannot listen at ipc:///proc/none/s"):
        Router(context, "ipc:///proc/none/s", 4096)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(HubError, match=f"cannot listen at {address}: .*in use"):
            Router(context, address, 4096)
    context.term()  # would wait for ever for a socket that was left open


def test_an_impostor_does_not_get_what_is_for_another(context, address):
    router, dealer = Router(context, address, 4096), Dealer(context, address, 4096)
    peer = greet(router, dealer)
    impostor = context.socket(zmq.DEALER)
    impostor.setsockopt(zmq.ROUTING_ID, peer)
    impostor.connect(address)
    impostor.send(b"me too")
    second = Dealer(context, address, 4096)
    greet(router, second)  # by now the impostor's message would have come
    assert router.send(peer, [b"secret"])
    assert dealer.receive(PATIENCE_S) == [b"secret"]
    assert not impostor.poll(0)


def test_a_process_is_readable_once_it_has_ended():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    pidfd = os.pidfd_open(process.pid)
    assert not readable(pidfd)
    process.kill()
    assert readable(pidfd, PATIENCE_S)
    os.close(pidfd)
    process.communicate()


def test_the_host_is_the_boot_and_the_pid_namespace():
    boot, namespace = host_id().split("/")
    assert boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert os.readlink("/proc/self/ns/pid") == f"pid:[{namespace}]"
