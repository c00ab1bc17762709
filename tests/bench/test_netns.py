"""Two hosts on one machine: what they can do, and what is left of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import netns
from bench.netns import Counters, Host
from bench.peers.base import BenchError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def allowed() -> None:
    if reason := netns.unavailable():
        pytest.skip(reason)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with netns.network("1gbit") as pair:
        yield pair


def exists(host: Host) -> bool:
    return Path("/run/netns", host.namespace).exists()


def devices() -> str:
    return Path("/proc/thread-self/net/dev").read_text()


def counted(left: Host, right: Host, nbytes: int) -> tuple[Counters, Counters]:
    """What both ends count of a stream, once that is the same.

    The last packet, or one of the system's own, may be on its way when it is looked at: after the
    stream it arrives, before it a second stream is needed.
    """
    for _ in range(3):
        before = left.counters(), right.counters()
        netns.bandwidth(left, right, nbytes)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            here, there = left.counters() - before[0], right.counters() - before[1]
            if here == Counters(
                there.received_bytes, there.sent_bytes, there.received_packets, there.sent_packets
            ):
                return here, there
    pytest.fail(f"{here} at one end, {there} at the other")


def test_what_crosses_the_cable_is_counted_at_both_ends(hosts: tuple[Host, Host]) -> None:
    here, there = counted(*hosts, 3_000_000)
    assert 3_000_000 < here.sent_bytes < 3_300_000
    assert here.bytes == there.bytes < 3_300_000
    assert here.packets == there.packets > 10


def test_the_cable_is_no_faster_than_its_rate() -> None:
    with netns.network("50mbit") as (left, right):
        assert netns.bandwidth(left, right, 3_000_000) < 50e6 / 8 * 1.2  # its first burst is free


def test_counters_are_compared_by_their_difference() -> None:
    assert Counters(9, 8, 7, 6) - Counters(1, 2, 3, 4) == Counters(8, 6, 4, 2)


def test_only_the_thread_and_what_it_starts_enter_a_host(hosts: tuple[Host, Host]) -> None:
    left, _ = hosts
    seen: list[str] = []
    with left.entered():
        assert left.device in devices()
        child = subprocess.run(
            [sys.executable, "-c", "print(open('/proc/net/dev').read())"],
            capture_output=True,
            text=True,
            check=True,
        )
    assert left.device in child.stdout
    other = threading.Thread(target=lambda: seen.append(devices()))
    other.start()
    other.join()
    assert left.device not in devices() + seen[0]


def test_a_thread_comes_home_after_an_error(hosts: tuple[Host, Host]) -> None:
    with pytest.raises(RuntimeError), hosts[0].entered():
        raise RuntimeError
    assert hosts[0].device not in devices()


def test_nothing_is_left_after_an_error_or_ctrl_c() -> None:
    for error in (RuntimeError, KeyboardInterrupt):
        kept: list[Host] = []
        with pytest.raises(error):
            fail_with(error, kept)
        assert len(kept) == 2
        assert not any(exists(host) for host in kept)


def fail_with(error: type[BaseException], kept: list[Host]) -> None:
    with netns.network("1gbit") as pair:
        assert all(exists(host) for host in pair)
        kept += pair
        raise error


def test_the_cable_goes_even_while_a_process_holds_on_to_its_host() -> None:
    with netns.network("1gbit") as (left, _):
        with left.entered():
            held = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        inside = Path(f"/proc/{held.pid}/net/dev")
        assert left.device in inside.read_text()
    assert left.device not in inside.read_text()
    held.communicate()


KEEPS = """
import signal, sys
from bench import netns
with netns.network("1gbit") as (left, right):
    print(left.namespace, right.namespace, flush=True)
    signal.pause()
"""


def start_keeper() -> tuple[subprocess.Popen[str], list[str]]:
    """A process that has made a network, and waits; with the names of its namespaces."""
    keeper = subprocess.Popen(
        [sys.executable, "-c", KEEPS], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert keeper.stdout is not None
    return keeper, keeper.stdout.readline().split()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_cleans_up(number: signal.Signals) -> None:
    keeper, names = start_keeper()
    assert len(names) == 2
    keeper.send_signal(number)
    keeper.communicate()
    assert keeper.returncode != 0
    assert not set(names) & set(os.listdir("/run/netns"))


def test_what_a_killed_run_has_left_is_swept_and_the_living_are_spared() -> None:
    living, theirs = start_keeper()
    killed, left = start_keeper()
    killed.kill()
    killed.communicate()
    assert set(left) <= set(os.listdir("/run/netns"))
    netns.sweep()
    now = set(os.listdir("/run/netns"))
    assert not set(left) & now
    assert set(theirs) <= now
    living.terminate()
    living.communicate()


def test_two_networks_do_not_disturb_each_other(hosts: tuple[Host, Host]) -> None:
    with netns.network("1gbit") as others:
        assert others[0].address == hosts[0].address
        netns.bandwidth(*others, 1_000_000)
        assert hosts[0].counters().bytes < 100_000
    assert exists(hosts[0])


def test_what_is_refused_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BenchError, match="tc .* is refused"), netns.network("no rate"):
        pass
    monkeypatch.setattr(netns.os, "geteuid", lambda: 1000)  # type: ignore[attr-defined]
    assert netns.unavailable() == "only root may make network namespaces"
    monkeypatch.setenv("PATH", "/nowhere")
    assert netns.unavailable() == "ip and tc of iproute2 cannot be found"


def test_a_host_reaches_the_other_and_not_this_one(hosts: tuple[Host, Host]) -> None:
    left, right = hosts
    with socket.create_server(("127.0.0.1", 0)) as outside:
        port = outside.getsockname()[1]
        with right.entered(), pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1)
    with right.entered(), socket.create_server((right.address, 0)) as server:
        at = server.getsockname()
        with left.entered():
            socket.create_connection(at).close()
