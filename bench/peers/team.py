"""The processes of one participant, driven through pipes."""

from __future__ import annotations

import gc
import hashlib
import os
import signal
import struct
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import processes
from .base import BenchError, Peer, Seat, Server, cores
from .problem import Array

Samples = npt.NDArray[np.float64]  # microseconds

REPLY_S = 300.0
_EXIT_S = 5.0
_LEAD_NS = 400_000
_LATE_NS = 50_000


class StartLine:
    """Lets all workers of a team begin a round at one instant of CLOCK_MONOTONIC.

    Every worker reports to rank 0, which names an instant a little ahead. All spin until it, so
    that neither the pipes nor a wake-up is part of what is timed. Each meets the others on a core
    of its own, as if it came from computing: a pipe's reader is woken on the writer's core, where
    it would wait behind the spinning writer. From the start on they run where the scheduler likes.
    With more workers than cores spinning would hold up those still on their way: then they sleep.
    """

    def __init__(self, others: Sequence[Connection], rank: int, world: int) -> None:
        self._others = others
        self._leads = rank == 0
        self._spin = world <= cores()
        self._everywhere = os.sched_getaffinity(0)
        self._own = {sorted(self._everywhere)[rank % cores()]}

    def wait(self) -> tuple[int, int]:
        """Returns the common start, and when this worker really began, in nanoseconds."""
        os.sched_setaffinity(0, self._own)
        start = self._agree()
        os.sched_setaffinity(0, self._everywhere)
        if not self._spin:
            time.sleep(max(0, start - time.perf_counter_ns()) * 1e-9)
        while (now := time.perf_counter_ns()) < start:
            pass
        return start, now

    def _agree(self) -> int:
        if self._leads:
            for other in self._others:
                other.recv_bytes()
            start = time.perf_counter_ns() + _LEAD_NS
            for other in self._others:
                other.send_bytes(struct.pack("q", start))
        else:
            self._others[0].send_bytes(b"ready")
            (start,) = struct.unpack("q", self._others[0].recv_bytes())
        return int(start)


class _Member:
    """What one worker process does: the commands of its team, one at a time."""

    def __init__(self, peer: Peer, line: StartLine) -> None:
        self._peer = peer
        self._line = line
        self._rounds = 0

    def run(self, rounds: int) -> npt.NDArray[np.int64]:
        """(rounds, 4) int64: common start, own start, end, processor time meanwhile."""
        stamps = np.empty((rounds, 4), np.int64)
        for row in stamps:
            self._peer.prepare(self._rounds)
            row[:2] = self._line.wait()
            used = time.process_time_ns()
            self._peer.round()
            row[2] = time.perf_counter_ns()
            row[3] = time.process_time_ns() - used
            self._rounds += 1
        return stamps

    def run_empty(self, rounds: int) -> npt.NDArray[np.int64]:
        """As `run`, with nothing between start and end: what the measuring itself costs."""
        stamps = np.zeros((rounds, 4), np.int64)
        for row in stamps:
            row[:2] = self._line.wait()
            time.process_time_ns()
            row[2] = time.perf_counter_ns()
        return stamps

    def weights(self) -> Array:
        return self._peer.weights()

    def digest(self) -> str:
        return hashlib.blake2b(self._peer.weights().data).hexdigest()


def _member_main(
    peer_type: type[Peer], seat: Seat, control: Connection, others: list[Connection]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to end
    try:
        import torch

        torch.set_num_threads(max(1, cores() // seat.world))  # as much as the hub takes
        peer = peer_type()
        peer.setup(seat)
        member = _Member(peer, StartLine(others, seat.rank, seat.world))
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection within a round would be measured with it
        control.send(("ok", (peer.pids(), torch.get_num_threads())))
        while (order := control.recv()) is not None:
            command, arguments = order
            control.send(("ok", getattr(member, command)(*arguments)))
            gc.collect()
        peer.close()
        control.send(("ok", None))
    except BaseException:  # whatever it is, the parent must hear of it, if there still is one
        with suppress(BrokenPipeError):
            control.send(("failed", traceback.format_exc()))


@dataclass(frozen=True, slots=True)
class Cpu:
    """Processor time a round, user and system: of workers during it, of all else throughout."""

    workers_us: float = 0.0
    server_us: float = 0.0


@dataclass(frozen=True, slots=True)
class Block:
    """Rounds timed one after another: microseconds each, and how many of them began late."""

    samples: Samples
    late: int
    cpu: Cpu = Cpu()


class Team:
    """One participant at one size: its server and its workers, all alive until `close`."""

    def __init__(
        self, peer: type[Peer], seats: list[Seat], server: Server, *, fresh: bool = False
    ) -> None:
        """
        fresh  every worker begins with a new interpreter: see `processes.start`
        """
        self.peer = peer
        self.server = server
        self._controls: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._beside: list[int] = []  # what the workers themselves have started
        self._worker_threads = 0
        self._start(seats, fresh)

    def _start(self, seats: list[Seat], fresh: bool) -> None:
        lines = [processes.pipe() for _ in seats[1:]]
        for seat in seats:
            others = [a for a, _ in lines] if seat.rank == 0 else [lines[seat.rank - 1][1]]
            here, there = processes.pipe()
            process = processes.start(_member_main, self.peer, seat, there, others, fresh=fresh)
            there.close()
            self._controls.append(here)
            self._processes.append(process)
        for pair in lines:
            for end in pair:
                end.close()

    def ready(self) -> None:
        """Waits until every worker is set up."""
        told = self._replies()
        self._beside = [pid for pids, _ in told for pid in pids]
        self._worker_threads = max(threads for _, threads in told)
        self._signal(signal.SIGSTOP)

    def run(self, rounds: int) -> Block:
        """Times rounds: from the last worker's start to the last worker's end."""
        before = self._server_cpu_s()
        stamps = self._ask("run", rounds)
        server = (self._server_cpu_s() - before) * 1e6 / rounds
        workers = float(np.stack(stamps)[:, :, 3].sum(axis=0).mean()) / 1e3
        block = merge(stamps, self._keeps_late)
        return replace(block, cpu=Cpu(workers, server))

    def run_empty(self, rounds: int) -> Block:
        """Times nothing at all: what the measuring itself costs."""
        return merge(self._ask("run_empty", rounds), self._keeps_late)

    @property
    def _keeps_late(self) -> bool:
        return self.peer.spins_when_idle or len(self._controls) > cores()

    def digests(self) -> list[str]:
        """A digest of each worker's weights."""
        return [str(digest) for digest in self._ask("digest")]

    def weights(self) -> Iterator[tuple[int, Array]]:
        """Each rank with its weights, one worker at a time to spare memory."""
        for rank in range(len(self._controls)):
            self._controls[rank].send(("weights", ()))
            yield rank, self._replies(rank)[0]

    def pids(self) -> list[int]:
        own = [process.pid for process in self._processes if process.pid is not None]
        return [*own, *self._beside, *self.server.pids]

    def cpu_s(self) -> float:
        """CPU seconds that all its processes have used so far."""
        return self._sum_cpu_s(self.pids())

    def threads(self) -> dict[str, int]:
        """ "worker", "server": those that compute in each; "total": all of all its processes."""
        total = sum(len(os.listdir(f"/proc/{pid}/task")) for pid in self.pids())
        return {"worker": self._worker_threads, "server": self.server.threads, "total": total}

    def _server_cpu_s(self) -> float:
        return self._sum_cpu_s([*self._beside, *self.server.pids])

    def _sum_cpu_s(self, pids: list[int]) -> float:
        try:
            return sum(_cpu_s(pid) for pid in pids)
        except OSError:
            raise BenchError(f"{self.peer.name}: one of its processes has ended") from None

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Its processes may run. Outside of this, those that would spin while idle are stopped."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """Ends the workers in order; those that do not end are killed."""
        self._signal(signal.SIGCONT)
        self._send(None)
        self._replies()
        self._beside.clear()
        for process in self._processes:
            process.join(_EXIT_S)

    def kill(self) -> None:
        """Ends the workers, and what they have started, at once; nothing is left to close then."""
        own = [process.pid for process in self._processes if process.pid is not None]
        begotten = [pid for worker in own for pid in processes.descendants(worker)]
        for process in self._processes:
            process.kill()
            process.join()
        processes.send([*begotten, *self._beside], signal.SIGKILL)
        for control in self._controls:
            control.close()
        self._processes.clear()
        self._controls.clear()

    def _signal(self, number: signal.Signals) -> None:
        if self.peer.spins_when_idle:
            processes.send(self.pids(), number)

    def _ask(self, command: str, *arguments: object) -> list[Any]:
        self._send((command, arguments))
        return self._replies()

    def _send(self, order: tuple[str, tuple[object, ...]] | None) -> None:
        for control in self._controls:
            with suppress(BrokenPipeError):  # its last word says why
                control.send(order)

    def _replies(self, *ranks: int) -> list[Any]:
        """One answer from each rank (all of them by default); the first failure ends the wait."""
        replies: dict[int, Any] = {}
        waiting = {self._controls[r]: r for r in ranks or range(len(self._controls))}
        deadline = time.monotonic() + REPLY_S
        while waiting:
            heard = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not heard:
                silent = sorted(waiting.values())
                raise BenchError(
                    f"{self.peer.name}: no answer from worker {silent} in {REPLY_S:.0f} s"
                )
            for control in heard:
                assert isinstance(control, Connection)
                rank = waiting.pop(control)
                replies[rank] = self._answer(control, rank)
        return [replies[rank] for rank in sorted(replies)]

    def _answer(self, control: Connection, rank: int) -> Any:
        try:
            status, value = control.recv()
        except EOFError:
            raise BenchError(f"{self.peer.name}: worker {rank} ended without a word") from None
        if status != "ok":
            raise BenchError(f"{self.peer.name}: worker {rank} failed:\n{value}")
        return value


@contextmanager
def team(
    peer: type[Peer], world: int, size: int, seed: int, folder: Path, *, fresh: bool = False
) -> Iterator[Team]:
    """A team set up for its first round; its processes end with the `with` block."""
    with ExitStack() as stack:
        server = stack.enter_context(peer.serve(world, size, seed, folder))
        seats = [Seat(rank, world, size, seed, server.address) for rank in range(world)]
        made = Team(peer, seats, server, fresh=fresh)
        stack.callback(made.kill)
        made.ready()
        yield made
        made.close()


def merge(stamps: list[npt.NDArray[np.int64]], keep_late: bool) -> Block:
    """Merges the workers' stamps into one time a round, from the last worker's start.

    A round that some worker began late, by more than a hundredth of it, measured the machine: it is
    left out. Peers whose own threads spin delay their own starts, and with more workers than cores
    nobody can begin at once: theirs are kept, and counting from the last start is in their favour.
    """
    merged = np.stack(stamps)
    starts = merged[:, :, 1].max(axis=0)
    lasted = merged[:, :, 2].max(axis=0) - starts
    late = starts - merged[0, :, 0] > np.maximum(_LATE_NS, lasted // 100)
    kept = lasted if keep_late else lasted[~late]
    return Block(kept / 1e3, int(late.sum()))


def _cpu_s(pid: int) -> float:
    """Processor time of a process with all its threads, to the nanosecond: clock_getcpuclockid."""
    return time.clock_gettime(~pid << 3 | 2)
