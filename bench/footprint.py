"""How much memory a hub takes when many workers push and one is late.

The others' gradients cannot be applied before the last has come. A hub that took all of them would
hold the model once for each worker; one that asks for no more than it has room for holds its
weights, its state, and the credit of ZPS_HUB_BUFFER_BYTES.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .peers.base import BenchError
from .peers.zps_round import free_port, start_hub

if TYPE_CHECKING:
    import zps

ALLOWED = 1.3
_SAMPLE_S = 0.02
_LR, _MOMENTUM, _START = 0.5, 0.9, 1.0


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a hub's process took beyond what it took before it had a model; all in bytes.

    held    with every worker's push announced but the last one's
    peak    the most that was seen, from the declaration to the end of the last round
    needed  weights, SGD's momentum, one accumulator of the model's size, and the credit
    """

    held: int
    peak: int
    needed: int

    @property
    def limit(self) -> int:
        return int(ALLOWED * self.needed)

    @property
    def bounded(self) -> bool:
        return self.peak <= self.limit


def measure(
    workers: int, nbytes: int, *, buffer_bytes: int, bucket_bytes: int, rounds: int = 2
) -> Footprint:
    """Rounds of so many workers, each with a gradient of `nbytes` bytes, the last of them late.

    Raises BenchError when a worker ends up with other weights than SGD's.
    """
    settings = {"hub_buffer_bytes": buffer_bytes, "bucket_bytes": bucket_bytes}
    with ExitStack() as stack:
        bind = f"tcp://127.0.0.1:{free_port()}"
        server = stack.enter_context(start_hub(workers, bind, **settings))
        (pid,) = server.pids
        empty = resident_bytes(pid)
        watch = stack.enter_context(_watched(pid))
        team = stack.enter_context(_declared(server.address, workers, nbytes))
        held = 0
        for number in range(rounds):
            held = max(held, _late_round(team, pid, nbytes // bucket_bytes))
            _check(team, number + 1)
        watch.look()
        needed = 3 * nbytes + buffer_bytes
        return Footprint(held - empty, watch.peak - empty, needed)


def resident_bytes(pid: int) -> int:
    """Private and shared memory that a process has in RAM."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kinds = re.findall(r"^(?:Private|Shared)_(?:Clean|Dirty|Hugetlb): +(\d+) kB", rollup, re.M)
    return sum(int(kib) for kib in kinds) << 10


# --- parts ---------------------------------------------------------------------------------------


class _Watch:
    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._pid = pid

    def look(self) -> None:
        self.peak = max(self.peak, resident_bytes(self._pid))


@contextmanager
def _watched(pid: int) -> Iterator[_Watch]:
    """Looks at a process's memory again and again while the `with` block runs."""
    watch, over = _Watch(pid), threading.Event()

    def look() -> None:
        with suppress(ProcessLookupError, FileNotFoundError):  # it ends when its workers fail
            while not over.wait(_SAMPLE_S):
                watch.look()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


@contextmanager
def _declared(address: str, count: int, nbytes: int) -> Iterator[list[zps.Worker]]:
    """Workers of this process that use messages, with one tensor and a gradient of ones each."""
    import torch

    import zps

    with ExitStack() as stack:
        team = [
            stack.enter_context(zps.Worker(address, rank=rank, world_size=count, link="message"))
            for rank in range(count)
        ]
        start = torch.full((nbytes // 4,), _START)

        def declare(worker: zps.Worker) -> None:
            worker.declare({"w": start}, rule="sgd", lr=_LR, momentum=_MOMENTUM)
            worker.slot("w").fill_(1.0)

        with ThreadPoolExecutor(count) as threads:
            list(threads.map(declare, team))
        yield team


def _late_round(team: Sequence[zps.Worker], pid: int, buckets: int) -> int:
    """One round; returns the hub's memory when it has all it asks for without the last worker."""
    early, last = team[:-1], team[-1]
    works = [worker.push("w") for worker in early]
    # What the hub has asked for leaves before the next request, and comes before its answer: after
    # two a hub that asks for everything has everything; one more for each bucket it asks for later.
    for _ in range(2 + buckets):
        for worker in early:
            worker.stats()
    held = resident_bytes(pid)
    if any(work.done() for work in works):
        raise BenchError("a round has ended without its last worker")
    works.append(last.push("w"))
    with ThreadPoolExecutor(len(works)) as threads:
        list(threads.map(lambda work: work.wait(), works))
    return held


def _check(team: Sequence[zps.Worker], rounds: int) -> None:
    value = _expected(rounds)
    for worker in team:
        weights = worker.weights("w")
        if not bool(((weights - value).abs() <= 1e-5 * abs(value)).all()):
            raise BenchError(
                f"worker {worker.rank} has wrong weights after {rounds} rounds: {weights[0]} "
                f"at the beginning, where all have to be {value}"
            )


def _expected(rounds: int) -> float:
    """Every weight after so many rounds in which every gradient was 1."""
    value, momentum = _START, 0.0
    for _ in range(rounds):
        momentum = _MOMENTUM * momentum + 1.0
        value -= _LR * momentum
    return value
