"""Somebody is killed behind, at or above a node hub: the others end or go on, and soon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.chaos.lives import Driver, until
from tests.integration.nodes import Cluster, node_settings, nodes
from tests.ports import free_port
from tests.workers import PATIENCE_S, ROOT
from zps.errors import RankOutOfRange
from zps.hub.process import HubProcess
from zps.relay import process as relay
from zps.worker.worker import Worker

#: What a worker may take to hear of a death two hubs away, seconds.
SOON_S = 3.0


@contextmanager
def lives(cluster: Cluster) -> Iterator[list[Driver]]:
    """Processes of all ranks, which have declared their tensors."""
    drivers: list[Driver] = []
    try:
        drivers.extend(
            Driver(cluster.address(rank), rank, cluster.world) for rank in range(cluster.world)
        )
        for driver in drivers:
            driver.begin("declare", "mean")
        for driver in drivers:
            driver.answer()
        yield drivers
    finally:
        for driver in drivers:
            driver.end()


def kill(hub: HubProcess) -> float:
    at_s = time.monotonic()
    hub.popen.kill()
    hub.popen.wait()
    return at_s


def push_all(drivers: list[Driver], value: float = 1.0) -> None:
    for driver in drivers:
        driver.ask("push", value=value + driver.rank)
        driver.begin("wait")


def assert_lost(driver: Driver, at_s: float, *words: str) -> None:
    failure = driver.failure()
    assert failure.kind == "HubLost", failure
    for word in words:
        assert word in failure.text
    assert 0 <= failure.at_s - at_s < SOON_S


def wait_for_end(hub: HubProcess) -> int | None:
    until(lambda: hub.poll() is not None, "the hub has ended")
    return hub.poll()


def assert_nothing_left(cluster: Cluster) -> None:
    for hub in (cluster.top, *cluster.hubs):
        hub.stop()
    assert list(cluster.runtime_dir.iterdir()) == []


def test_a_killed_workers_node_goes_on_with_the_rest(tmp_path):
    with nodes(tmp_path) as cluster, lives(cluster) as drivers:
        push_all(drivers)
        assert [d.answer() for d in drivers] == [{"a": 2.5, "b": 2.5}] * 4
        push_all(drivers[:3])
        assert not any(driver.answered for driver in drivers[:3])
        drivers[3].kill()
        assert [d.answer() for d in drivers[:3]] == [{"a": 2.0, "b": 2.0}] * 3
        push_all(drivers[:3], 4.0)
        assert [d.answer() for d in drivers[:3]] == [{"a": 5.0, "b": 5.0}] * 3
        assert drivers[2].ask("stats")["live"] == [2]
        assert drivers[2].ask("stats")["upstream"]["live"] == [0, 1]
        for driver in drivers[:3]:
            driver.ask("close")
        assert_nothing_left(cluster)


def test_what_a_killed_worker_had_pushed_counts(tmp_path):
    with nodes(tmp_path) as cluster, lives(cluster) as drivers:
        drivers[1].ask("push", ["a"], value=9.0)
        until(lambda: drivers[0].ask("stats")["waiting_for"] == [0, 1], "its push has come")
        drivers[1].kill()
        rest = [drivers[0], *drivers[2:]]
        push_all(rest)
        for driver in rest:
            assert driver.answer() == pytest.approx({"a": (1 + 9 + 3 + 4) / 4, "b": 8 / 3})


def test_a_node_whose_workers_all_die_is_one_worker_that_dies(tmp_path):
    with nodes(tmp_path) as cluster, lives(cluster) as drivers:
        push_all(drivers[:2])
        for driver in drivers[2:]:
            driver.kill()
        assert [d.answer() for d in drivers[:2]] == [{"a": 1.5, "b": 1.5}] * 2
        assert wait_for_end(cluster.hubs[1]) == 0
        assert drivers[0].ask("stats")["upstream"]["live"] == [0]


def test_on_death_abort_ends_the_job_on_every_node(tmp_path):
    with nodes(tmp_path, on_death="abort") as cluster, lives(cluster) as drivers:
        push_all(drivers[:3])
        at_s = drivers[3].kill()
        assert_lost(drivers[2], at_s, "rank 3", "on_death is abort")
        for driver in drivers[:2]:
            assert_lost(driver, at_s, "hub of all nodes", "on_death is abort")
        assert [wait_for_end(hub) for hub in (cluster.top, *cluster.hubs)] == [0, 0, 0]
        assert_nothing_left(cluster)


def test_a_killed_node_hub_is_one_worker_that_dies(tmp_path):
    with nodes(tmp_path) as cluster, lives(cluster) as drivers:
        push_all(drivers[:3])
        at_s = kill(cluster.hubs[1])
        assert_lost(drivers[2], at_s, f"(process {cluster.hubs[1].pid}) has ended")
        assert [d.answer() for d in drivers[:2]] == [{"a": 1.5, "b": 1.5}] * 2
        push_all(drivers[:2], 3.0)
        assert [d.answer() for d in drivers[:2]] == [{"a": 3.5, "b": 3.5}] * 2
        for driver in drivers[:2]:
            driver.ask("close")
        assert_nothing_left(cluster)


def test_a_node_cannot_come_back_into_a_running_job(tmp_path):
    with nodes(tmp_path) as cluster, lives(cluster) as drivers:
        kill(cluster.hubs[1])
        settings = node_settings(cluster.top.address, 1, cluster.runtime_dir, count=2, world=4)
        with relay.start(settings) as hub:
            again = Driver(hub.address, 2, 4)
            again.begin("declare", "mean")
            failure = again.failure()
            assert failure.kind == "Rejected"
            assert "node 1 cannot join a running job" in failure.text
            again.end()
        push_all(drivers[:2])
        assert [d.answer() for d in drivers[:2]] == [{"a": 1.5, "b": 1.5}] * 2


@pytest.mark.parametrize("tcp", [False, True], ids=["ipc", "tcp"])
def test_a_killed_hub_of_all_nodes_ends_them_and_is_named(tmp_path, tcp):
    with nodes(tmp_path, tcp=tcp) as cluster, lives(cluster) as drivers:
        push_all(drivers[:3])
        at_s = kill(cluster.top)
        for driver in drivers[:3]:
            assert_lost(driver, at_s, f"the hub of all nodes at {cluster.top.address}")
        drivers[3].begin("barrier")
        assert drivers[3].failure().kind in ("HubLost", "Closed")
        assert [wait_for_end(hub) for hub in cluster.hubs] == [0, 0]
        assert_nothing_left(cluster)


def test_workers_that_train_hear_of_it_too(tmp_path):
    with nodes(tmp_path) as cluster, lives(cluster) as drivers:
        for driver in drivers:
            driver.begin("train", 5)
        for driver in drivers:
            driver.answer()
            driver.begin("train", 1_000_000)
        at_s = kill(cluster.top)
        for driver in drivers:
            assert_lost(driver, at_s, "hub of all nodes")


def test_a_hub_of_all_nodes_that_is_told_to_end_says_so_to_every_worker(tmp_path):
    with nodes(tmp_path) as cluster, lives(cluster) as drivers:
        push_all(drivers[:3])
        at_s = time.monotonic()
        cluster.top.popen.send_signal(signal.SIGTERM)
        for driver in drivers[:3]:
            assert_lost(driver, at_s, "hub of all nodes", "the hub was stopped")


def test_a_stopped_hub_of_all_nodes_is_waited_for(tmp_path):
    with nodes(tmp_path) as cluster, lives(cluster) as drivers:
        cluster.top.popen.send_signal(signal.SIGSTOP)
        push_all(drivers)
        # Its loop turns all the same: a node hub never waits for what is above it.
        with pytest.raises(RankOutOfRange):
            Worker(cluster.address(0), rank=2, world_size=4)
        cluster.top.popen.send_signal(signal.SIGCONT)
        assert [d.answer() for d in drivers] == [{"a": 2.5, "b": 2.5}] * 4


def test_a_worker_that_finishes_early_blocks_nobody(tmp_path):
    with nodes(tmp_path) as cluster, lives(cluster) as drivers:
        push_all(drivers)
        assert [d.answer() for d in drivers] == [{"a": 2.5, "b": 2.5}] * 4
        for driver in drivers[1:]:
            driver.ask("close")
        push_all(drivers[:1], 7.0)
        assert drivers[0].answer() == {"a": 7.0, "b": 7.0}


SCRIPT = """
import os, torch, zps
zps.init()
torch.manual_seed(zps.rank())
model = torch.nn.Linear(3, 2)
opt = zps.Optimizer(torch.optim.Adam(model.parameters(), lr=0.1), model)
for _ in range(4):
    opt.zero_grad()
    model(torch.full((2, 3), zps.rank() + 1.0)).pow(2).mean().backward()
    opt.step()
place = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
assert place[:2] == [str(zps.rank()), str(zps.world_size())]
print("at", *place, model.weight.sum().item(), "nodes", zps.stats()["upstream"]["world_size"])
zps.barrier()
zps.shutdown()
"""
PLACES = ["0 4 0 2", "1 4 1 2", "2 4 0 2", "3 4 1 2"]


@contextmanager
def top_hub(tmp_path: Path, **settings: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a hub of two nodes, and the environment of what works with it."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("ZPS_")}
    environ |= {"PYTHONPATH": str(ROOT), "ZPS_RUNTIME_DIR": str(tmp_path / "run"), **settings}
    (tmp_path / "train.py").write_text(SCRIPT)
    address = f"tcp://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "zps", "hub", "--bind", address, "--world-size", "2"]
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE) as top:
        assert top.stderr is not None
        top.stderr.readline()
        try:
            yield address, environ
        finally:
            top.terminate()


def outputs(processes: list[subprocess.Popen[str]]) -> list[str]:
    """The lines that workers printed, sorted; all of them have ended well."""
    lines = []
    for process in processes:
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, err
        lines += [line[line.index("at ") + 3 :] for line in out.splitlines()]
    return sorted(lines)


def assert_all_trained_together(lines: list[str]) -> None:
    assert [line[:7] for line in lines] == PLACES
    assert len({line[7:] for line in lines}) == 1
    assert all(line.endswith("nodes 2") for line in lines)


def test_zps_launch_on_two_nodes(tmp_path):
    with top_hub(tmp_path) as (address, environ):
        command = [sys.executable, "-m", "zps", "launch", "-n", "2", "--nodes", "2", "--node-hub"]
        processes = [
            subprocess.Popen(
                [*command, "--node-rank", node, "--set", f"hub={address}", "train.py"],
                cwd=tmp_path,
                env=environ,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for node in "01"
        ]
        assert_all_trained_together(outputs(processes))
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("compression", ["none", "int8"])
def test_torchruns_variables_on_two_nodes(tmp_path, compression):
    with top_hub(tmp_path, ZPS_COMPRESSION=compression) as (address, environ):
        environ |= {"ZPS_NODE_HUB": "1", "ZPS_HUB": address, "MASTER_ADDR": "x", "MASTER_PORT": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, "train.py"],
                cwd=tmp_path,
                env=environ
                | dict(
                    zip(
                        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
                        place.split(),
                        strict=True,
                    )
                ),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for place in PLACES
        ]
        assert_all_trained_together(outputs(processes))
    assert list((tmp_path / "run").iterdir()) == []
