"""The two sockets and their options, each with its reason here or beside it.

A hub's ROUTER never blocks and never loses a message silently: an unknown peer is an error
(`ROUTER_MANDATORY`), a slow one fills a byte-bounded queue of ours. A worker's DEALER never queues
to a hub that is not there (`IMMEDIATE`).
"""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import zmq
from zmq.utils.monitor import recv_monitor_message

from zps.errors import HubError, HubUnreachable

HWM = 16  # it counts messages, however large: the default, 1000, would be gigabytes of buckets
ZERO_COPY_BYTES = 64 << 10  # below it the tracker of a zero-copy send costs more than the copy
SLACK_BYTES = 64 << 10
DEAD_S = 10  # a host that says nothing for so long is gone
MAX_QUEUED_BYTES = 64 << 20
_LOCAL_BUFFER_BYTES = 256 << 10

Frame = bytes | memoryview


def host_id() -> str:
    """Equal in two processes exactly when they can open each other's /proc/<pid>/fd."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def readable(fd: int, timeout_s: float = 0.0) -> bool:
    """Whether `fd` is readable before the time is over; a pidfd is once its process has ended."""
    poller = select.poll()  # select() knows no descriptor above 1023
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))


class Router:
    """The hub's socket. One thread owns it. Raises HubError when it cannot listen there."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, max_bytes: int):
        self.socket = context.socket(zmq.ROUTER)
        _common(self.socket, max_bytes, address)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # Whoever comes with the routing id of another does not get its answers.
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 0)
        # A stranger that says nothing does not keep its connection.
        self.socket.setsockopt(zmq.HANDSHAKE_IVL, 2000)
        try:
            self.socket.bind(address)
        except zmq.ZMQError as error:
            self.socket.close()
            raise HubError(f"cannot listen at {address}: {error.strerror}") from None
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._header: zmq.Frame | None = None
        self._queues: dict[bytes, deque[list[Frame]]] = {}
        self._queued_bytes: dict[bytes, int] = {}

    def receive(self) -> list[Frame] | None:
        """One message as [peer, header, payload...], or None when there is none.

        Large payload frames are read where they lie.
        """
        try:
            peer = self.socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        frames: list[Frame] = [peer]
        if self.socket.getsockopt(zmq.RCVMORE):
            self._header = self.socket.recv(copy=False)
            frames += [self._header.bytes, *_payload(self.socket, self._header.more)]
        return frames

    def connection(self) -> int:
        """The descriptor of the connection over which the last message came."""
        assert self._header is not None
        return int(self._header.get(zmq.SRCFD))

    def lost(self) -> list[int]:
        """The descriptors of connections that have ended since the last call."""
        return _ended(self.monitor)

    def send(self, peer: bytes, frames: Sequence[Frame]) -> bool:
        """Send now or queue; False when the peer is gone or has stopped reading."""
        queue = self._queues.get(peer)
        if not queue:
            sent = self._try_send(peer, frames)
            if sent is not None:
                return sent
            queue = self._queues.setdefault(peer, deque())
        size = sum(len(frame) for frame in frames)
        if queue and self._queued_bytes.get(peer, 0) + size > MAX_QUEUED_BYTES:
            self.forget(peer)
            return False
        queue.append(list(frames))
        self._queued_bytes[peer] = self._queued_bytes.get(peer, 0) + size
        return True

    def flush(self) -> list[bytes]:
        """Send what waited for room; returns the peers that turned out to be gone."""
        gone = []
        for peer, queue in list(self._queues.items()):
            while queue:
                sent = self._try_send(peer, queue[0])
                if sent is None:
                    break
                if not sent:
                    gone.append(peer)
                    break
                self._queued_bytes[peer] -= sum(len(frame) for frame in queue.popleft())
            if not queue or peer in gone:
                self.forget(peer)
        return gone

    @property
    def backlog(self) -> bool:
        return bool(self._queues)

    def is_clear(self, peer: bytes) -> bool:
        """Whether nothing waits for room on its way to `peer`."""
        return peer not in self._queues

    def forget(self, peer: bytes) -> None:
        self._queues.pop(peer, None)
        self._queued_bytes.pop(peer, None)

    def close(self) -> None:
        _close(self.socket, self.monitor)  # the last refusals may leave

    def _try_send(self, peer: bytes, frames: Sequence[Frame]) -> bool | None:
        try:
            _send(self.socket, (peer, *frames), zmq.NOBLOCK)
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.ENOTSOCK):
                return False
            raise
        return True


class Dealer:
    """A worker's socket to one hub. Its owner guards it with a lock."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, max_bytes: int):
        self.socket = context.socket(zmq.DEALER)
        _common(self.socket, max_bytes, address)
        self.socket.setsockopt(zmq.IMMEDIATE, 1)
        # A ROUTER without handover ignores whoever comes with an id that is taken.
        self.socket.setsockopt(zmq.ROUTING_ID, b"w" + os.urandom(15))
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.monitor_descriptor = int(self.monitor.getsockopt(zmq.FD))
        self.socket.connect(address)
        self.address = address
        self._cut = False

    def send(self, frames: Sequence[Frame], timeout_s: float) -> None:
        """Send; raises HubUnreachable when the hub has taken nothing for `timeout_s` seconds."""
        if not self.socket.poll(int(timeout_s * 1000), zmq.POLLOUT):
            raise HubUnreachable(
                f"no hub took a message at {self.address} for {timeout_s:g} s. "
                "Is it running (`zps hub`, `zps launch`), and is ZPS_HUB its address?"
            )
        self.socket.send_multipart(frames, copy=True)

    def try_send(self, frames: Sequence[Frame]) -> bool:
        """Send now; False when the hub takes nothing at present."""
        try:
            _send(self.socket, frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self, timeout_s: float) -> list[Frame] | None:
        """One message as [header, payload...], or None after `timeout_s` seconds."""
        if not self.socket.poll(int(timeout_s * 1000), zmq.POLLIN):
            return None
        header = self.socket.recv()
        return [header, *_payload(self.socket, bool(self.socket.getsockopt(zmq.RCVMORE)))]

    def is_cut(self) -> bool:
        """Whether the connection has ended, if only for a while."""
        self._cut = bool(_ended(self.monitor)) or self._cut
        return self._cut

    def close(self) -> None:
        _close(self.socket, self.monitor)  # the goodbye may leave, a dead hub does not hold us


def _close(socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
    if not socket.closed:
        socket.disable_monitor()
        monitor.close()
        socket.close(linger=200)


def _send(socket: zmq.Socket[bytes], frames: Sequence[Frame], flags: int) -> None:
    """Large frames are not copied: their memory must not change before they have left."""
    last = len(frames) - 1
    for i, frame in enumerate(frames):
        more = zmq.SNDMORE if i < last else 0
        socket.send(frame, flags | more, copy=len(frame) < ZERO_COPY_BYTES)


def _payload(socket: zmq.Socket[bytes], more: bool) -> list[Frame]:
    frames: list[Frame] = []
    while more:
        part = socket.recv(copy=False)
        # A small one lies in a buffer that many share, and would keep all of it alive.
        frames.append(part.buffer if len(part) >= ZERO_COPY_BYTES else part.bytes)
        more = part.more
    return frames


def _ended(monitor: zmq.Socket[bytes]) -> list[int]:
    found = []
    while monitor.poll(0):
        found.append(int(recv_monitor_message(monitor, zmq.NOBLOCK)["value"]))
    return found


def _common(socket: zmq.Socket[bytes], max_bytes: int, address: str) -> None:
    if address.startswith(("ipc://", "tcp://127.", "tcp://localhost:", "tcp://[::1]:")):
        # What one end writes the other reads while it is in cache; the system would grow these.
        socket.setsockopt(zmq.SNDBUF, _LOCAL_BUFFER_BYTES)
        socket.setsockopt(zmq.RCVBUF, _LOCAL_BUFFER_BYTES)
    # A longer frame than there can be ends the connection before memory is got for it.
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes + SLACK_BYTES)
    socket.setsockopt(zmq.SNDHWM, HWM)
    socket.setsockopt(zmq.RCVHWM, HWM)
    socket.setsockopt(zmq.LINGER, 0)  # a peer that is gone holds nobody up; `close` waits a little
    # The system looks who is there, and no heartbeat of ZMTP: libzmq 4.3.5 aborts the process when
    # one is due on a connection that ended while RCVHWM held its input back.
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, DEAD_S // 2)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, DEAD_S - DEAD_S // 2)
    socket.setsockopt(zmq.TCP_MAXRT, DEAD_S * 1000)  # the same for one that should acknowledge data
