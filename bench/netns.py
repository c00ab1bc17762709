"""Two hosts on one machine: network namespaces, joined by a cable with a speed.

    with network(rate="1gbit") as (left, right):
        with left.entered():
            server = subprocess.Popen(...)      # lives on that host, as do its own children
        with right.entered():
            ...
        left.counters().bytes                   # what has crossed the cable

Namespaces, unlike processes, stay when whoever made them is killed. Their names say who that was,
and `sweep` removes what the dead have left. Both hosts share everything but the network: processes,
files and the boot id are those of this machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from .ending import terminable
from .peers.base import BenchError

__all__ = ["Counters", "Host", "bandwidth", "network", "sweep", "unavailable"]

_PREFIX = "zpsb"
_NAME = re.compile(rf"{_PREFIX}-(\d+)-(\d+)-[0-9a-f]+[lr]")  # process, its start, salt, side
_NAMESPACES = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_ADDRESSES = ipaddress.ip_network("10.222.7.0/30")
_BURST_BYTES = 256 << 10  # more than a segment that TCP hands over whole
_QUEUE_MS = 50
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Counters:
    """What one end of the cable has sent and received, with the headers of its frames."""

    sent_bytes: int
    received_bytes: int
    sent_packets: int
    received_packets: int

    @property
    def bytes(self) -> int:
        return self.sent_bytes + self.received_bytes

    @property
    def packets(self) -> int:
        return self.sent_packets + self.received_packets

    def __sub__(self, before: Counters) -> Counters:
        return Counters(
            self.sent_bytes - before.sent_bytes,
            self.received_bytes - before.received_bytes,
            self.sent_packets - before.sent_packets,
            self.received_packets - before.received_packets,
        )


@dataclass(frozen=True, slots=True)
class Host:
    """One end: its namespace, its network device and its address there."""

    namespace: str
    device: str
    address: str

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What this thread opens or starts meanwhile is on this host: sockets and processes.

        Other threads, and sockets that are open already, stay where they are.
        """
        with open("/proc/thread-self/ns/net") as before:
            with open(_NAMESPACES / self.namespace) as there:
                _setns(there.fileno())
            try:
                yield
            finally:
                _setns(before.fileno())

    def counters(self) -> Counters:
        """Since the cable was laid."""
        shown = _run("ip", "-n", self.namespace, "-s", "-j", "link", "show", "dev", self.device)
        (link,) = json.loads(shown)
        there, here = link["stats64"]["rx"], link["stats64"]["tx"]
        return Counters(here["bytes"], there["bytes"], here["packets"], there["packets"])


def unavailable() -> str | None:
    """None, or why there can be no such network here."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} of iproute2 cannot be found"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    try:
        with network("1gbit"):
            return None
    except BenchError as error:
        return str(error)


@contextmanager
def network(rate: str) -> Iterator[tuple[Host, Host]]:
    """Two hosts and a cable of this rate each way, in tc's words: "1gbit".

    All of it goes with the `with` block, also after a failure, Ctrl-C or SIGTERM; what a killed run
    has left goes when the next one starts. Raises BenchError when the system refuses.
    """
    sweep()
    stem = f"{_PREFIX}-{os.getpid()}-{_start_of(os.getpid())}-{secrets.token_hex(2)}"
    device = f"{_PREFIX}{secrets.token_hex(4)}"  # a device's name has 15 characters at most
    first, second = (str(address) for address in _ADDRESSES.hosts())
    left = Host(f"{stem}l", f"{device}l", first)
    right = Host(f"{stem}r", f"{device}r", second)
    with ExitStack() as stack:
        stack.enter_context(terminable())
        for host in (left, right):
            stack.callback(_remove, host.namespace)
            _run("ip", "netns", "add", host.namespace)
        _lay_cable(left, right)
        for host in (left, right):
            _bring_up(host, rate)
        yield left, right


def sweep() -> list[str]:
    """Remove the namespaces of runs that are no more; returns their names."""
    gone = []
    for path in _NAMESPACES.glob(f"{_PREFIX}-*"):
        named = _NAME.fullmatch(path.name)
        if named and _start_of(int(named[1])) != int(named[2]):
            _remove(path.name)
            gone.append(path.name)
    return gone


def bandwidth(sender: Host, receiver: Host, nbytes: int) -> float:
    """Bytes a second that one plain TCP connection carries, from its first byte to its last."""
    with receiver.entered(), socket.create_server((receiver.address, 0)) as server:
        at = server.getsockname()
        with sender.entered(), socket.create_connection(at) as out:
            come, _ = server.accept()
            with come:
                return _time_stream(out, come, nbytes)


def _time_stream(out: socket.socket, come: socket.socket, nbytes: int) -> float:
    def send() -> None:
        chunk = memoryview(bytes(_CHUNK_BYTES))
        for at in range(0, nbytes, _CHUNK_BYTES):
            out.sendall(chunk[: nbytes - at])

    sending = threading.Thread(target=send)
    room = bytearray(_CHUNK_BYTES)
    began = time.perf_counter()
    sending.start()
    left = nbytes
    while left:
        left -= come.recv_into(room)
    took = time.perf_counter() - began
    sending.join()
    return nbytes / took


# --- parts ---------------------------------------------------------------------------------------


def _lay_cable(left: Host, right: Host) -> None:
    ends = [("name", h.device, "netns", h.namespace) for h in (left, right)]
    _run("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])


def _bring_up(host: Host, rate: str) -> None:
    at = ("-n", host.namespace)
    _run("ip", *at, "address", "add", f"{host.address}/{_ADDRESSES.prefixlen}", "dev", host.device)
    _run("ip", *at, "link", "set", "lo", "up")
    _run("ip", *at, "link", "set", host.device, "up")
    shaper = ("tbf", "rate", rate, "burst", str(_BURST_BYTES), "latency", f"{_QUEUE_MS}ms")
    _run("tc", *at, "qdisc", "add", "dev", host.device, "root", *shaper)


def _remove(namespace: str) -> None:
    """The cable first: a process that outlives the run would keep the namespace alive, and it."""
    for device in _devices(namespace):
        with contextlib.suppress(BenchError):
            _run("ip", "-n", namespace, "link", "delete", device)
    with contextlib.suppress(BenchError):
        _run("ip", "netns", "delete", namespace)


def _devices(namespace: str) -> list[str]:
    try:
        shown = json.loads(_run("ip", "-n", namespace, "-j", "link", "show"))
    except BenchError:  # it was never made
        return []
    return [link["ifname"] for link in shown if link.get("ifname", "").startswith(_PREFIX)]


def _start_of(pid: int) -> int | None:
    """When a process began, in ticks since boot: with its number a name that nobody else has."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None


def _setns(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise BenchError(f"cannot enter a network namespace: {os.strerror(code)}")


def _run(*command: str) -> str:
    try:
        # Its own session: Ctrl-C must not end the command that cleans up.
        done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    except OSError as error:
        raise BenchError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        said = done.stderr.strip() or f"code {done.returncode}"
        raise BenchError(f"`{' '.join(command)}` is refused: {said}")
    return done.stdout
