"""Watch the workers of one job from their start to the last one's end, and leave nothing behind.

One loop in the main thread, woken by signals: SIGCHLD when a child ends, SIGINT, SIGTERM and SIGHUP
to be passed on. Every worker leads a session of its own, so that a Ctrl-C reaches it once, and so
that what it started can be ended with it.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal, Protocol

from zps.launch import tether
from zps.launch.output import Pump, prefix

__all__ = ["Hub", "Job", "Spec", "Supervisor", "describe", "exit_code"]

OnDeath = Literal["shrink", "wait", "abort"]
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HUB_LOST = 1
_WATCH_S = 1.0  # the loop is woken by signals; this only bounds the harm of a lost one
_DRAIN_S = 2.0


class Hub(Protocol):
    """What the supervisor needs to know of a hub; it neither starts nor stops it."""

    @property
    def pid(self) -> int: ...
    def formed(self) -> bool:
        """Whether every worker has joined once; never blocks."""

    def poll(self) -> int | None:
        """Its return code as `subprocess` has it, or None while it lives."""


@dataclass(frozen=True, slots=True)
class Spec:
    """How to start one worker. `inherit`: it gets this process's own input and output."""

    rank: int
    command: Sequence[str]
    environ: Mapping[str, str]
    inherit: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """A job's rules. `hub` None: somebody else's hub, which decides about deaths by itself."""

    workers: Sequence[Spec]
    hub: Hub | None = None
    on_death: OnDeath = "shrink"
    grace_s: float = 10.0
    colour: bool = False


def exit_code(returncode: int) -> int:
    """A return code of `subprocess` as a shell reports it: 128 + signal for a killed process."""
    return 128 - returncode if returncode < 0 else returncode


def describe(returncode: int) -> str:
    """ "exited with code 3", "was killed by SIGKILL"."""
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"


class Supervisor:
    """Runs one job, once.

    say       gets each event as one line for a person
    out, err  descriptors that the workers' standard output and error go to, line by line
    """

    def __init__(
        self,
        job: Job,
        say: Callable[[str], None],
        out: int = 1,
        err: int = 2,
    ) -> None:
        self._job = job
        self._say = say
        self._sinks = (out, err)
        self._pump = Pump()
        self._live: dict[int, subprocess.Popen[bytes]] = {}
        self._first_failure: int | None = None
        self._interrupted: int | None = None
        self._hub_lost = False
        self._deadline: float | None = None  # set once everybody has been told to stop

    def run(self) -> int:
        """Start all workers, wait for the last, and return the job's exit code.

        128 + signal if this process was told to stop by one; else the code of the first worker that
        failed of itself; else 1 if the hub died; else 0. Call it in the main thread.
        """
        with _signals() as wakeups:
            try:
                for spec in self._job.workers:
                    self._start(spec)
                self._pump.start()
                while self._live:
                    self._on_signals(wakeups.wait(self._patience_s()))
                    self._watch_hub()
                    self._reap()
                    self._enforce_deadline()
            finally:
                self._kill_all()
                self._pump.drain(None, _DRAIN_S)
        if self._interrupted is not None:
            return 128 + self._interrupted
        if self._first_failure is not None:
            return exit_code(self._first_failure)
        return HUB_LOST if self._hub_lost else 0

    def _start(self, spec: Spec) -> None:
        pipe = None if spec.inherit else subprocess.PIPE
        process = subprocess.Popen(
            tether.command(list(spec.command)),
            env=dict(spec.environ),
            stdin=None if spec.rank == 0 else subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            start_new_session=True,
        )
        self._live[spec.rank] = process
        for source, sink in zip((process.stdout, process.stderr), self._sinks, strict=True):
            if source is not None:
                self._pump.add(spec.rank, source, sink, prefix(spec.rank, colour=self._job.colour))

    # What the loop sees

    def _on_signals(self, received: Sequence[int]) -> None:
        for number in received:
            if number not in FORWARDED:
                continue
            name = signal.Signals(number).name
            if self._interrupted is not None:
                self._say(f"{name} again: killing what is left")
                self._kill_all()
                return
            self._interrupted = number
            self._say(f"{name}: passed on to the workers; once more kills them")
            self._stop(signal.SIGTERM if number == signal.SIGHUP else number)

    def _watch_hub(self) -> None:
        hub = self._job.hub
        if hub is None or self._hub_lost or self._stopping:
            return
        code = hub.poll()
        if code:
            self._hub_lost = True
            self._say(f"the hub (pid {hub.pid}) {describe(code)}; the workers end when they notice")

    def _reap(self) -> None:
        for rank, process in list(self._live.items()):
            if not _ended(process.pid):
                continue
            _kill_group(process)  # before it is reaped, while its number cannot be reused
            del self._live[rank]
            code = process.wait()
            if code != 0 and not self._stopping:
                self._pump.drain(rank, _DRAIN_S)  # its last words first
                self._on_failure(rank, code)

    def _on_failure(self, rank: int, code: int) -> None:
        what = f"rank {rank} {describe(code)}"
        if self._first_failure is None:
            self._first_failure = code
        hub = self._job.hub
        if not self._live or self._hub_lost:
            self._say(what)
        elif self._job.on_death == "abort":
            self._say(f"{what}; stopping the others (on_death=abort)")
            self._stop(signal.SIGTERM)
        elif hub is not None and not hub.formed():
            self._say(f"{what} before all workers had joined; stopping the others")
            self._stop(signal.SIGTERM)
        else:
            self._say(f"{what}; the others go on (on_death={self._job.on_death})")

    # Ways to end

    @property
    def _stopping(self) -> bool:
        return self._deadline is not None

    def _patience_s(self) -> float:
        if self._deadline is None:
            return _WATCH_S
        return min(_WATCH_S, max(0.0, self._deadline - time.monotonic()))

    def _stop(self, number: int) -> None:
        """Ask every worker to end: the process itself, which knows best what it has started."""
        for process in self._live.values():
            os.kill(process.pid, number)  # Popen.send_signal would reap it, too early for _reap
        if self._deadline is None:
            self._deadline = time.monotonic() + self._job.grace_s

    def _enforce_deadline(self) -> None:
        if self._live and self._deadline is not None and time.monotonic() >= self._deadline:
            ranks = ", ".join(str(rank) for rank in self._live)
            self._say(f"still running after {self._job.grace_s:g} s: rank {ranks}; killing")
            self._kill_all()

    def _kill_all(self) -> None:
        for process in self._live.values():
            _kill_group(process)
        for process in self._live.values():
            process.wait()
        self._live.clear()


def _ended(pid: int) -> bool:
    """Whether the child has ended, leaving it to be reaped."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, pid, flags) is not None


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for a worker that is not reaped yet, and for what it started in its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class _Wakeups:
    """The signals that have come in, as numbers."""

    def __init__(self, receiver: socket.socket) -> None:
        self._receiver = receiver
        self._selector = selectors.DefaultSelector()
        self._selector.register(receiver, selectors.EVENT_READ)

    def wait(self, timeout_s: float) -> bytes:
        """Numbers of the signals received since the last call; empty after `timeout_s`."""
        return self._receiver.recv(4096) if self._selector.select(timeout_s) else b""

    def close(self) -> None:
        self._selector.close()


@contextmanager
def _signals() -> Iterator[_Wakeups]:
    """Turn SIGCHLD and the forwarded signals into bytes to wait for, until the block ends."""
    receiver, sender = socket.socketpair()
    with receiver, sender:
        receiver.setblocking(False)
        sender.setblocking(False)
        wakeups = _Wakeups(receiver)
        # A full buffer already wakes the loop, so that a lost byte costs at most a signal's number.
        before_fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        before = {
            number: signal.signal(number, lambda *_: None)
            for number in (signal.SIGCHLD, *FORWARDED)
            if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGCHLD  # nohup
        }
        try:
            yield wakeups
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before_fd)
            wakeups.close()
