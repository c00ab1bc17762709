"""A hub that is killed: everyone hears of it soon, and nothing of it stays behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.chaos.lives import Driver, Failure, lives, until
from tests.workers import PATIENCE_S
from zps.hub.process import HubProcess
from zps.wire.sockets import readable

#: What a worker may take to hear of its hub's death, seconds.
SOON_S = 2.0


def kill(hub: HubProcess) -> float:
    at_s = time.monotonic()
    hub.popen.kill()
    hub.popen.wait()
    return at_s


def assert_lost(failure: Failure, hub: HubProcess, at_s: float) -> None:
    assert failure.kind == "HubLost"
    assert f"the hub at {hub.address} (process {hub.pid}) has ended" in failure.text
    assert "tart it again" in failure.text
    print(f"HubLost after {failure.at_s - at_s:.3f} s")
    assert 0 <= failure.at_s - at_s < SOON_S


def test_workers_that_wait_raise_hub_lost_and_no_file_stays(hubs):
    hub = hubs.start()
    with lives(hub.address, 3) as drivers:
        for driver in drivers[:2]:
            driver.ask("push")
            driver.begin("wait")
        until(lambda: drivers[2].ask("stats")["waiting_for"] == [2], "two have pushed")
        drivers[2].begin("barrier")
        at_s = kill(hub)
        for driver in drivers:
            assert_lost(driver.failure(), hub, at_s)
        assert list(hubs.runtime_dir.iterdir()) == []
        for driver in drivers:
            driver.begin("push")
            again = driver.failure()
            assert again.kind == "Closed"
            assert "has ended" in again.text


def test_workers_that_train_raise_hub_lost(hubs):
    hub = hubs.start()
    with lives(hub.address, 2) as drivers:
        for driver in drivers:
            driver.begin("train", 10)
        for driver in drivers:
            driver.answer()
            driver.begin("train", 1_000_000)
        at_s = kill(hub)
        for driver in drivers:
            assert_lost(driver.failure(), hub, at_s)


def test_a_worker_that_waits_for_the_others_to_declare_raises_hub_lost(hubs):
    hub = hubs.start()
    drivers = [Driver(hub.address, 0, 3), Driver(hub.address, 1, 3)]
    for driver in drivers:
        driver.begin("declare")
    at_s = kill(hub)
    for driver in drivers:
        assert_lost(driver.failure(), hub, at_s)
        driver.end()


def test_workers_still_read_their_weights_after_the_hub_is_gone(hubs):
    hub = hubs.start()
    with lives(hub.address, 1) as (driver,):
        driver.ask("train", 3)
        driver.ask("weights")
        kill(hub)
        driver.begin("push")
        driver.outcome()
        assert driver.ask("last_weights") == {"a": 3, "b": 3}


def test_a_hub_that_is_told_to_end_says_so(hubs):
    hub = hubs.start()
    with lives(hub.address, 2) as (first, second):
        first.ask("push")
        first.begin("wait")
        hub.popen.send_signal(signal.SIGTERM)
        failure = first.failure()
        assert failure.kind == "HubLost"
        assert "the hub was stopped" in failure.text
        second.begin("barrier")
        assert second.failure().kind == "HubLost"
        until(lambda: hub.poll() is not None, "it has ended")
        assert hub.poll() == 0
        assert list(hubs.runtime_dir.iterdir()) == []


def test_a_stopped_hub_is_waited_for_and_goes_on(hubs):
    hub = hubs.start()
    with lives(hub.address, 2) as (first, second):
        hub.popen.send_signal(signal.SIGSTOP)
        for driver in (first, second):
            driver.ask("push")
            driver.begin("wait")
        hub.popen.send_signal(signal.SIGCONT)
        assert [driver.answer() for driver in (first, second)] == [{"a": 2, "b": 2}] * 2


def test_ctrl_c_reaches_a_worker_that_waits_and_it_can_go_on(hubs):
    with lives(hubs.start().address, 2) as (first, second):
        first.ask("push")
        first.begin("wait")
        first.interrupt()
        assert first.failure().kind == "KeyboardInterrupt"
        second.ask("push")
        assert [driver.ask("wait") for driver in (first, second)] == [{"a": 2, "b": 2}] * 2


PARENT = """
import sys
from pathlib import Path
from zps.config import Settings
from zps.hub.process import HubProcess

hub = HubProcess.start(Settings(runtime_dir=Path(sys.argv[1]), bucket_bytes=4096))
print(hub.pid, hub.address, flush=True)
sys.stdin.read()
"""


@contextmanager
def hub_of_a_parent(runtime_dir: Path) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """A process with a hub; (the process, a pidfd of the hub, its address)."""
    command = [sys.executable, "-c", PARENT, str(runtime_dir)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as parent:
        assert parent.stdout is not None
        pid, address = parent.stdout.readline().split()
        pidfd = os.pidfd_open(int(pid))
        try:
            yield parent, pidfd, address
        finally:
            parent.kill()
            os.close(pidfd)


def test_a_hub_ends_with_its_parent(hubs):
    with hub_of_a_parent(hubs.runtime_dir) as (parent, pidfd, _):
        parent.kill()
        assert readable(pidfd, PATIENCE_S), "the hub outlives its parent"
    assert list(hubs.runtime_dir.iterdir()) == []


def test_workers_are_told_that_the_hub_ends_with_its_parent(hubs):
    with hub_of_a_parent(hubs.runtime_dir) as (parent, _, address):
        first, second = Driver(address, 0, 2), Driver(address, 1, 2)
        first.begin("declare")
        until(lambda: second.ask("stats")["missing"] == [1], "rank 0 waits for rank 1")
        parent.kill()
        failure = first.failure()
        assert failure.kind == "HubLost"
        assert "its parent has ended" in failure.text
        for driver in (first, second):
            driver.end()


def test_a_declaration_to_a_hub_that_is_ending_is_hub_lost_at_every_moment(hubs):
    moments = random.Random(0)
    for _ in range(8):
        hub = hubs.start()
        driver = Driver(hub.address, 0, 2)
        driver.begin("declare")
        driver.process.join(moments.uniform(0, 0.01))  # not a wait for anything: any moment
        hub.popen.terminate()
        assert driver.failure().kind == "HubLost"
        driver.end()
