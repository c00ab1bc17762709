"""`zps launch` with a real hub and real workers, ended in every way there is."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PATIENCE_S = 60

START = """
import os, signal, torch, zps
rank = int(os.environ["ZPS_RANK"])
"""
JOIN = """
worker = zps.Worker()
worker.declare({"x": torch.zeros(3)}, rule="sum")
def total():
    value = torch.full((3,), float(rank + 1))
    worker.push_pull({"x": value}).wait(30)
    return value.tolist()
"""
WORK = f"{START}{JOIN}print('total', total())\n"
#: Has joined, says so, and waits to be ended.
WAIT = f"{WORK}print('ready', os.getpid())\nsignal.pause()\n"


class Launched:
    def __init__(self, process: subprocess.Popen[str], runtime_dir: Path) -> None:
        self.process = process
        self.runtime_dir = runtime_dir
        self.pids: list[int] = []

    def wait_until_ready(self, count: int) -> None:
        """Read output until `count` workers have said `ready`."""
        assert self.process.stdout is not None
        while len(self.pids) < count:
            line = self.process.stdout.readline()
            assert line, "the job ended before its workers were ready"
            if " ready " in line:
                self.pids.append(int(line.split()[-1]))

    def hub_pid(self) -> int:
        (pid,) = self.hub_pids()
        return pid

    def hub_pids(self) -> list[int]:
        return [int(home.name.partition("-")[0]) for home in self.runtime_dir.iterdir()]

    def end(self) -> tuple[int, list[str], str]:
        """Exit code, output, and what the launcher and the workers said on standard error."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, sorted(out.splitlines()), err

    def wait_until_nothing_is_left(self) -> None:
        for pid in self.pids:
            _wait_until_gone(pid)
        for lock in self.runtime_dir.glob("*/lock"):
            with lock.open() as file:  # its hub holds it for as long as it lives
                fcntl.flock(file, fcntl.LOCK_EX)


def _wait_until_gone(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], PATIENCE_S)[0], f"process {pid} is still there"
    finally:
        os.close(fd)


@contextmanager
def launched(tmp_path: Path, code: str, *options: str) -> Iterator[Launched]:
    script = tmp_path / "train.py"
    script.write_text(code)
    runtime_dir = tmp_path / "run"
    base = {name: value for name, value in os.environ.items() if not name.startswith("ZPS_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "zps", "launch", "-n", "2", *options, str(script)],
        env={**base, "ZPS_RUNTIME_DIR": str(runtime_dir)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield Launched(process, runtime_dir)
        finally:
            process.kill()


def test_a_job_starts_works_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with launched(tmp_path, f"{WORK}worker.close()\n") as job:
        code, out, err = job.end()
        assert (code, err) == (0, "")
        assert out == ["[0] total [3.0, 3.0, 3.0]", "[1] total [3.0, 3.0, 3.0]"]
        assert list(job.runtime_dir.iterdir()) == []


def test_a_failure_before_all_have_joined_stops_those_who_wait(tmp_path: Path) -> None:
    code = f"{START}if rank == 1: raise SystemExit(3)\n{JOIN}"
    with launched(tmp_path, code) as job:
        exit_code, _, err = job.end()
        assert exit_code == 3
        assert "rank 1 exited with code 3 before all workers had joined" in err
        assert list(job.runtime_dir.iterdir()) == []


def test_after_all_have_joined_the_survivors_of_a_death_go_on(tmp_path: Path) -> None:
    code = f"{WORK}if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\nprint('then', total())\n"
    with launched(tmp_path, f"{code}worker.close()\n") as job:
        exit_code, out, err = job.end()
        assert exit_code == 128 + signal.SIGKILL
        assert "rank 1 was killed by SIGKILL; the others go on (on_death=shrink)" in err
        assert "[0] then [1.0, 1.0, 1.0]" in out


def test_a_killed_hub_is_named_and_the_workers_end_with_hub_lost(tmp_path: Path) -> None:
    with launched(tmp_path, f"{WORK}print('ready', 0)\nwhile True: total()\n") as job:
        job.wait_until_ready(2)
        job.pids.clear()
        hub = job.hub_pid()
        os.kill(hub, signal.SIGKILL)
        exit_code, _, err = job.end()
        assert exit_code == 1
        assert f"the hub (pid {hub}) was killed by SIGKILL" in err
        assert "HubLost" in err
        assert list(job.runtime_dir.iterdir()) == []


SEVERAL = """
import zps
hubs = os.environ["ZPS_HUB"].split(",")
worker = zps.Worker()
worker.declare({"x": torch.zeros(3), "y": torch.zeros(3)}, rule="sum")
names = sorted(name for channel in worker.channels for name in channel.layout.index)
def total():
    given = {name: torch.full((3,), float(rank + 1)) for name in "xy"}
    worker.push_pull(given).wait(30)
    return [given[name].tolist() for name in "xy"]
print(len(hubs), len(worker.channels), names, total())
"""


def test_several_hubs_share_a_job_and_end_with_it(tmp_path: Path) -> None:
    with launched(tmp_path, f"{START}{SEVERAL}worker.close()\n", "--hubs", "2") as job:
        code, out, err = job.end()
        assert (code, err) == (0, "")
        line = "2 2 ['x', 'y'] [[3.0, 3.0, 3.0], [3.0, 3.0, 3.0]]"
        assert out == [f"[0] {line}", f"[1] {line}"]
        assert list(job.runtime_dir.iterdir()) == []


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_several_hubs_that_is_killed_ends_the_job(tmp_path: Path, which: int) -> None:
    code = f"{START}{SEVERAL}print('ready', 0)\nwhile True: total()\n"
    with launched(tmp_path, code, "--hubs", "2") as job:
        job.wait_until_ready(2)
        job.pids.clear()
        hub = job.hub_pids()[which]
        os.kill(hub, signal.SIGKILL)
        exit_code, _, err = job.end()
        assert exit_code == 1
        assert f"the hub (pid {hub}) was killed by SIGKILL" in err
        assert err.count("HubLost: the hub at ") == 2
        assert list(job.runtime_dir.iterdir()) == []


def test_ctrl_c_ends_workers_and_hub(tmp_path: Path) -> None:
    with launched(tmp_path, WAIT) as job:
        job.wait_until_ready(2)
        os.killpg(job.process.pid, signal.SIGINT)
        exit_code, _, err = job.end()
        assert exit_code == 128 + signal.SIGINT
        assert err.count("KeyboardInterrupt") == 2
        job.wait_until_nothing_is_left()
        assert list(job.runtime_dir.iterdir()) == []


def test_a_killed_launcher_takes_workers_and_hub_along(tmp_path: Path) -> None:
    with launched(tmp_path, WAIT) as job:
        job.wait_until_ready(2)
        job.process.kill()
        job.wait_until_nothing_is_left()
