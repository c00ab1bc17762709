from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from zps.launch.output import Pump
from zps.launch.supervise import Job, Spec, Supervisor, describe, exit_code

DRIVER = Path(__file__).with_name("driver.py")
PATIENCE_S = 60

#: Worker code that says its number and then waits to be ended.
WAIT = "import os, signal; print('pid', os.getpid()); signal.pause()"
STUBBORN = (
    "import os, signal\n"
    "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)\n"
    "print('pid', os.getpid())\n"
    "while True: signal.pause()"
)


class FakeHub:
    pid = 4242

    def __init__(self, formed: bool = True, code: int | None = None) -> None:
        self._formed = formed
        self.code = code

    def formed(self) -> bool:
        return self._formed

    def poll(self) -> int | None:
        return self.code


class Run:
    """One job in this process: its code, what the launcher said, what the workers printed."""

    def __init__(self, tmp_path: Path, *codes: str, **rules: object) -> None:
        specs = [
            Spec(rank, [sys.executable, "-u", "-c", code], dict(os.environ))
            for rank, code in enumerate(codes)
        ]
        self.said: list[str] = []
        with (tmp_path / "out").open("w+b") as out, (tmp_path / "err").open("w+b") as err:
            job = Job(specs, **{"hub": FakeHub(), **rules})  # type: ignore[arg-type]
            self.code = Supervisor(job, self.said.append, out.fileno(), err.fileno()).run()
        self.out = (tmp_path / "out").read_text().splitlines()
        self.err = (tmp_path / "err").read_text().splitlines()


# How a job ends


def test_a_job_whose_workers_all_succeed_returns_zero_and_says_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, "print('a')", "print('b')")
    assert (run.code, run.said) == (0, [])
    assert sorted(run.out) == ["[0] a", "[1] b"]


def test_every_worker_leads_a_session_of_its_own(tmp_path: Path) -> None:
    """A Ctrl-C on the terminal must reach it once, through the launcher."""
    run = Run(tmp_path, "import os; print(os.getsid(0) == os.getpid() == os.getpgrp())")
    assert run.out == ["[0] True"]


def test_output_and_errors_stay_apart(tmp_path: Path) -> None:
    run = Run(tmp_path, "import sys; print('o'); print('e', file=sys.stderr)")
    assert (run.out, run.err) == (["[0] o"], ["[0] e"])


def test_the_first_failing_worker_gives_its_code_and_the_others_go_on(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    os.mkfifo(flag)
    survivor = f"open({str(flag)!r}).read(); print('done'); raise SystemExit(9)"
    # Rank 0 waits for a process that rank 1 leaves only when the launcher has said its word.
    fails = "raise SystemExit(3)"
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if "rank 1" in text:
            flag.write_text("")

    specs = [
        Spec(rank, [sys.executable, "-c", code], dict(os.environ))
        for rank, code in enumerate([survivor, fails])
    ]
    assert Supervisor(Job(specs, FakeHub()), say).run() == 3
    assert said == [
        "rank 1 exited with code 3; the others go on (on_death=shrink)",
        "rank 0 exited with code 9",
    ]


def test_a_worker_killed_by_a_signal_gives_128_and_its_number(tmp_path: Path) -> None:
    run = Run(tmp_path, "import os; os.kill(os.getpid(), 9)")
    assert run.code == 128 + 9
    assert run.said == ["rank 0 was killed by SIGKILL"]


def test_a_failure_before_the_job_has_formed_stops_everybody(tmp_path: Path) -> None:
    run = Run(tmp_path, WAIT, "raise SystemExit(3)", hub=FakeHub(formed=False))
    assert run.code == 3
    assert run.said == [
        "rank 1 exited with code 3 before all workers had joined; stopping the others"
    ]


def test_policy_abort_stops_everybody_at_the_first_death(tmp_path: Path) -> None:
    run = Run(tmp_path, WAIT, "raise SystemExit(3)", on_death="abort")
    assert run.code == 3
    assert run.said == ["rank 1 exited with code 3; stopping the others (on_death=abort)"]


def test_a_success_stops_nobody(tmp_path: Path) -> None:
    run = Run(tmp_path, "pass", "print('late')", hub=FakeHub(formed=False), on_death="abort")
    assert (run.code, run.said, run.out) == (0, [], ["[1] late"])


def test_a_hub_that_dies_is_named_and_the_job_fails(tmp_path: Path) -> None:
    run = Run(tmp_path, "pass", hub=FakeHub(code=-9))
    assert run.code == 1
    assert run.said == [
        "the hub (pid 4242) was killed by SIGKILL; the workers end when they notice"
    ]


def test_after_the_hubs_death_nobody_is_stopped_and_a_workers_code_is_kept(tmp_path: Path) -> None:
    hub = FakeHub(code=1, formed=False)
    run = Run(tmp_path, "print('lost'); raise SystemExit(7)", "print('lost too')", hub=hub)
    assert run.code == 7
    assert sorted(run.out) == ["[0] lost", "[1] lost too"]


def test_a_worker_that_ignores_sigterm_is_killed_after_the_grace_period(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    os.mkfifo(pid_file)
    stubborn = STUBBORN.replace("while True", f"open({str(pid_file)!r}, 'w').close()\nwhile True")
    fails = f"open({str(pid_file)!r}).read(); raise SystemExit(3)"
    run = Run(tmp_path, stubborn, fails, on_death="abort", grace_s=0.1)
    assert run.code == 3
    assert run.said[1:] == ["still running after 0.1 s: rank 0; killing"]


def test_the_last_words_of_a_worker_come_before_the_news_of_its_death(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    original = Pump.drain

    def drain(pump: Pump, rank: int | None, timeout_s: float) -> bool:
        done = original(pump, rank, timeout_s)
        events.append(f"output of {rank}: {done}")
        return done

    monkeypatch.setattr(Pump, "drain", drain)
    spec = Spec(0, [sys.executable, "-c", "raise SystemExit(1)"], {})
    assert Supervisor(Job([spec]), events.append).run() == 1
    assert events[:2] == ["output of 0: True", "rank 0 exited with code 1"]


def test_workers_that_fail_at_the_same_moment_are_all_accounted_for(tmp_path: Path) -> None:
    pipes = [tmp_path / "0", tmp_path / "1"]
    for pipe in pipes:
        os.mkfifo(pipe)
    # Each leaves its number to the launcher and ends.
    codes = [
        f"import os; open({str(pipe)!r}, 'w').write(str(os.getpid())); raise SystemExit({code})"
        for pipe, code in zip(pipes, (3, 4), strict=True)
    ]
    said: list[str] = []
    pids: list[int] = []

    class SlowHub(FakeHub):
        def poll(self) -> int | None:
            """Asked before anybody is reaped: by then all have ended."""
            if not pids:
                pids.extend(int(pipe.read_text()) for pipe in pipes)
                for pid in pids:
                    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            return None

    specs = [Spec(n, [sys.executable, "-c", code], {}) for n, code in enumerate(codes)]
    job = Job(specs, SlowHub(), on_death="abort")
    assert Supervisor(job, said.append).run() == 3
    assert said == ["rank 0 exited with code 3; stopping the others (on_death=abort)"]


def test_what_a_worker_has_started_ends_with_it(tmp_path: Path) -> None:
    child = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {WAIT!r}]).pid)"
    run = Run(tmp_path, child)
    assert run.code == 0
    wait_until_gone(int(next(line for line in run.out if "pid" not in line).split()[1]))


def test_a_command_that_cannot_start_fails_like_a_worker(tmp_path: Path) -> None:
    spec = Spec(0, ["/nonexistent/python"], dict(os.environ))
    said: list[str] = []
    with (tmp_path / "err").open("w+b") as err:
        assert Supervisor(Job([spec]), said.append, 1, err.fileno()).run() == 127
    assert said == ["rank 0 exited with code 127"]
    text = (tmp_path / "err").read_text()
    assert text == "[0] cannot run /nonexistent/python: No such file or directory\n"


def test_signal_handlers_are_restored() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGCHLD)}
    Supervisor(Job([Spec(0, [sys.executable, "-c", ""], {})]), print).run()
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize(
    ("code", "text", "shell"),
    [(3, "exited with code 3", 3), (-15, "was killed by SIGTERM", 143), (-50, "SIGRTMIN", 178)],
)
def test_return_codes_are_told_as_people_know_them(code: int, text: str, shell: int) -> None:
    if code == -50:
        text = "was killed by signal 50"
    assert (describe(code), exit_code(code)) == (text, shell)


# Signals, with a launcher in a process of its own


def wait_until_gone(pid: int) -> None:
    """Return when the process has ended, reaped or not."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ended, _, _ = select.select([fd], [], [], PATIENCE_S)
        assert ended, f"process {pid} is still there"
    finally:
        os.close(fd)


class Launcher:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pids: dict[int, int] = {}

    def wait_for_pids(self, count: int) -> None:
        """Read `[rank] pid N` lines until that many workers have reported."""
        assert self.process.stdout is not None
        while len(self.pids) < count:
            line = self.process.stdout.readline()
            assert line, "the launcher ended before its workers had reported"
            rank, word, pid = line.split()
            assert word == "pid"
            self.pids[int(rank.strip("[]"))] = int(pid)

    def said(self, text: str) -> None:
        """Read what the launcher says until a line has `text`."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if text in line:
                return
        raise AssertionError(f"never said {text!r}")

    def end(self) -> int:
        code = self.process.wait(PATIENCE_S)
        for pid in self.pids.values():
            wait_until_gone(pid)
        return code


@contextmanager
def launcher(*codes: str, **request: object) -> Iterator[Launcher]:
    process = subprocess.Popen(
        [sys.executable, str(DRIVER), json.dumps({"workers": codes, **request})],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield Launcher(process)
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once_to_every_worker(number: signal.Signals) -> None:
    counts = (
        "import os, signal, sys\n"
        "def bye(number, frame): print('got', number); sys.exit(0)\n"
        f"signal.signal({int(number)}, bye)\n"
        "print('pid', os.getpid())\n"
        "signal.pause()"
    )
    with launcher(counts, counts) as job:
        job.wait_for_pids(2)
        os.killpg(job.process.pid, number)  # as a terminal does: to the whole foreground group
        assert job.process.stdout is not None
        lines = sorted(job.process.stdout.read().splitlines())
        assert lines == [f"[{rank}] got {int(number)}" for rank in (0, 1)]
        assert job.end() == 128 + number


def test_a_lost_terminal_ends_the_job() -> None:
    with launcher(WAIT) as job:
        job.wait_for_pids(1)
        job.process.send_signal(signal.SIGHUP)
        assert job.end() == 128 + signal.SIGHUP


def test_a_second_ctrl_c_kills_at_once() -> None:
    with launcher(STUBBORN, STUBBORN, grace_s=3600) as job:
        job.wait_for_pids(2)
        job.process.send_signal(signal.SIGINT)
        job.said("SIGINT: passed on")
        job.process.send_signal(signal.SIGINT)
        assert job.end() == 128 + signal.SIGINT


def test_workers_that_outlast_the_grace_period_are_killed() -> None:
    with launcher(STUBBORN, WAIT, grace_s=0.2) as job:
        job.wait_for_pids(2)
        job.process.send_signal(signal.SIGTERM)
        job.said("still running after 0.2 s: rank 0; killing")
        assert job.end() == 128 + signal.SIGTERM


def test_workers_die_with_a_launcher_that_was_killed() -> None:
    with launcher(WAIT, STUBBORN) as job:
        job.wait_for_pids(2)
        job.process.kill()
        assert job.end() == -signal.SIGKILL


def test_a_launcher_whose_reader_is_gone_keeps_the_job() -> None:
    chatter = (
        "import os, signal\n"
        "print('pid', os.getpid())\n"
        "signal.sigwait([signal.SIGUSR1])\n"
        "print('x\\n' * 500_000)\n"
        "raise SystemExit(5)"
    )
    block = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\n"
    with launcher(block + chatter) as job:
        job.wait_for_pids(1)
        assert job.process.stdout is not None
        job.process.stdout.close()
        os.kill(job.pids[0], signal.SIGUSR1)
        assert job.end() == 5
