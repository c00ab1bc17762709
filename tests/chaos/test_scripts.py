"""A script with `zps.init()` and a hub of its own, ended in every way: nothing is left.

Nothing means: no process of it, no file in its runtime directory, and nobody who maps the memory
that its hub had.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.chaos.lives import until
from tests.workers import PATIENCE_S, ROOT

TRAIN = """
import sys, torch, zps

zps.init(bucket_bytes=4096)
model = torch.nn.Linear(40, 50)
opt = zps.Optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
for _ in range(3):
    opt.zero_grad()
    model(torch.ones(2, 40)).sum().backward()
    opt.step()
print("ready", flush=True)
line = sys.stdin.readline()
"""


def job_processes(runtime_dir: Path) -> set[int]:
    """Processes that were started with this runtime directory."""
    mark = f"ZPS_RUNTIME_DIR={runtime_dir}\0".encode()
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environ = (folder / "environ").read_bytes()
        except OSError:
            continue  # it has ended, or belongs to somebody else
        if mark in environ:
            found.add(int(folder.name))
    return found


def segments(pid: int) -> set[str]:
    """The inodes of the shared segments that a process maps."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {line.split()[4] for line in lines if "/memfd:zps-" in line}


def holders(inodes: set[str]) -> set[int]:
    """The processes that map any of these segments."""
    pids = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return {pid for pid in pids if segments(pid) & inodes}


class Script:
    def __init__(self, process: subprocess.Popen[str], runtime_dir: Path):
        self.process = process
        self.runtime_dir = runtime_dir
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == "ready\n", process.communicate()
        (self.hub,) = job_processes(runtime_dir) - {process.pid}
        self.memory = segments(self.hub)
        assert len(self.memory) == 4  # control, weights, slots, bell
        assert holders(self.memory) == {process.pid, self.hub}

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def end(self) -> tuple[int, str]:
        """Exit code and standard error."""
        _, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, err

    def assert_nothing_is_left(self) -> None:
        until(lambda: not job_processes(self.runtime_dir), "no process of the job is alive")
        assert list(self.runtime_dir.iterdir()) == []
        assert holders(self.memory) == set()


@contextmanager
def script(tmp_path: Path, code: str) -> Iterator[Script]:
    (tmp_path / "train.py").write_text(TRAIN + code)
    runtime_dir = tmp_path / "run"
    base = {name: value for name, value in os.environ.items() if not name.startswith("ZPS_")}
    environ = {"PYTHONPATH": str(ROOT), "ZPS_RUNTIME_DIR": str(runtime_dir), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        env={**base, **environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield Script(process, runtime_dir)
        finally:
            process.kill()


def press_ctrl_c(job: Script) -> None:
    os.killpg(job.process.pid, signal.SIGINT)


def kill_hub(job: Script) -> None:
    os.kill(job.hub, signal.SIGKILL)
    job.go_on()


STEP = "model(torch.ones(2, 40)).sum().backward(); opt.step()\n"
Ending = tuple[str, Callable[[Script], None], int, str]
ENDINGS: dict[str, Ending] = {
    "its end": ("", Script.go_on, 0, ""),
    "shutdown": ("zps.shutdown(); print(model.weight.sum().item())\n", Script.go_on, 0, ""),
    "sys.exit": ("sys.exit(3)\n", Script.go_on, 3, ""),
    "an exception": ("raise RuntimeError('boom')\n", Script.go_on, 1, "RuntimeError: boom"),
    "os._exit": ("import os; os._exit(4)\n", Script.go_on, 4, ""),
    "Ctrl-C": ("", press_ctrl_c, -signal.SIGINT, "KeyboardInterrupt"),
    "SIGTERM": ("", lambda job: job.process.terminate(), -signal.SIGTERM, ""),
    "SIGKILL": ("", lambda job: job.process.kill(), -signal.SIGKILL, ""),
    "the hub's SIGKILL": (f"while True: {STEP}", kill_hub, 1, "HubLost"),
    "the hub's SIGKILL, and nothing more": ("", kill_hub, 0, ""),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_nothing_is_left_after(tmp_path, name):
    code, end, expected, text = ENDINGS[name]
    with script(tmp_path, code) as job:
        end(job)
        exit_code, err = job.end()
        job.assert_nothing_is_left()
        assert exit_code == expected, err
        assert text in err
        if job.process.returncode == 0:
            assert "lost" not in err


def test_a_forked_child_ends_without_ending_the_job(tmp_path):
    code = "import os\nif os.fork() == 0: sys.exit(0)\nassert os.wait()[1] == 0\n" + STEP
    with script(tmp_path, code) as job:
        job.go_on()
        assert job.end() == (0, "")
        job.assert_nothing_is_left()
