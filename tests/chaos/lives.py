"""Worker processes that a test drives step by step, and ends whenever it likes.

    with lives(hub.address, world=2) as (first, second):
        second.ask("push", ["x"])
        first.begin("wait")                 # does not return yet
        second.kill()
        first.answer()

Each is forked from a server that has imported torch, so one costs milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from zps.worker.work import Work
from zps.worker.worker import Worker

PATIENCE_S = 30.0
SHAPES = {"a": (4,), "b": (2000,)}  # one bucket of 4096 bytes, and two


class Life:
    """What runs in the process: a worker, and what it can be told to do."""

    def __init__(self, address: str, rank: int, world: int, settings: dict[str, Any]):
        self.worker = Worker(address, rank=rank, world_size=world, **settings)
        self._works: list[Work] = []
        self._seen: dict[str, torch.Tensor] = {}

    def declare(self, rule: str = "add", **options: Any) -> int:
        """Declare zeros; returns the first round."""
        tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        self.worker.declare(tensors, rule, **options)
        return self.worker.channels[0].link.first_round

    def first_rounds(self) -> list[int]:
        """The first round at each hub."""
        return [channel.link.first_round for channel in self.worker.channels]

    def push(self, names: Sequence[str] = tuple(SHAPES), value: float = 1.0) -> None:
        self._works.append(
            self.worker.push({name: torch.full(SHAPES[name], value) for name in names})
        )

    def wait(self, timeout_s: float | None = None) -> dict[str, float]:
        """Wait for all that was pushed; returns the weights."""
        for work in self._works:
            work.wait(timeout_s)
        self._works.clear()
        return self.weights()

    def train(self, rounds: int, value: float = 1.0) -> None:
        for _ in range(rounds):
            self.push(value=value)
            for work in self._works:
                work.wait()
            self._works.clear()

    def train_up_to(self, limit: float) -> None:
        """Train until a weight has reached the limit; in step all see it after the same round."""
        while self.weights()["a"] < limit:
            self.train(1)

    def done(self) -> bool:
        return all(work.done() for work in self._works)

    def weights(self) -> dict[str, float]:
        """The value of each tensor, all of whose elements are equal."""
        self.worker.pull()
        self._seen = {name: self.worker.weights(name) for name in SHAPES}
        return self.last_weights()

    def last_weights(self) -> dict[str, float]:
        """The same tensors once more, without asking anybody."""
        values = self._seen
        assert all((value == value[0]).all() for value in values.values()), values
        return {name: value[0].item() for name, value in values.items()}

    def stats(self) -> dict[str, Any]:
        return self.worker.stats()

    def barrier(self) -> None:
        self.worker.barrier()

    def close(self, goodbye: bool = True) -> None:
        self.worker.close(goodbye=goodbye)


@dataclass(frozen=True)
class Failure:
    """An exception in a process, and when it was raised, in seconds of the monotonic clock."""

    kind: str
    text: str
    at_s: float


class Driver:
    """The test's end of a process."""

    def __init__(self, address: str, rank: int, world: int, **settings: Any):
        start = multiprocessing.get_context("forkserver")
        start.set_forkserver_preload(["torch", "pytest", "tests.workers"])
        self._mine, theirs = start.Pipe()
        settings = {"timeout_s": PATIENCE_S, **settings}
        self.process = start.Process(
            target=_live, args=(theirs, address, rank, world, settings), daemon=True
        )
        self.process.start()
        theirs.close()
        self.rank = rank
        self.pid = self.process.pid or 0
        assert self.answer() is None

    def begin(self, what: str, *args: Any, **options: Any) -> None:
        """Tell it what to do; `answer` brings what came of it."""
        self._mine.send((what, args, options))

    def answer(self) -> Any:
        result = self.outcome()
        assert not isinstance(result, Failure), result
        return result

    def outcome(self) -> Any:
        """The result, or the Failure."""
        assert self._mine.poll(PATIENCE_S), f"rank {self.rank} does not answer"
        return self._mine.recv()

    def failure(self) -> Failure:
        result = self.outcome()
        assert isinstance(result, Failure), result
        return result

    def ask(self, what: str, *args: Any, **options: Any) -> Any:
        self.begin(what, *args, **options)
        return self.answer()

    @property
    def answered(self) -> bool:
        return self._mine.poll(0)

    def kill(self) -> float:
        """SIGKILL; returns the time of it once the process has ended."""
        at_s = time.monotonic()
        os.kill(self.pid, signal.SIGKILL)
        self.process.join(PATIENCE_S)
        assert self.process.exitcode is not None
        return at_s

    def interrupt(self) -> None:
        os.kill(self.pid, signal.SIGINT)

    def end(self) -> None:
        self._mine.close()
        self.process.join(PATIENCE_S)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()


@contextmanager
def lives(address: str, world: int, rule: str = "add", **settings: Any) -> Iterator[list[Driver]]:
    """Processes of all ranks, which have declared their tensors."""
    drivers: list[Driver] = []
    try:
        drivers.extend(Driver(address, rank, world, **settings) for rank in range(world))
        for driver in drivers:
            driver.begin("declare", rule)
        for driver in drivers:
            driver.answer()
        yield drivers
    finally:
        for driver in drivers:
            driver.end()


def until(condition: Any, what: str) -> Any:
    """Poll until `condition()` is true; returns what it was."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain until {what}"
    return found


def _live(orders: Connection, address: str, rank: int, world: int, settings: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a forkserver ignores it
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    for name in [name for name in os.environ if name.startswith("ZPS_")]:
        del os.environ[name]
    torch.set_num_threads(1)
    life: Any = None

    def begin() -> None:
        nonlocal life
        life = Life(address, rank, world, settings)

    _answer(orders, begin)
    while True:
        try:
            what, args, options = orders.recv()
        except (EOFError, OSError):
            break  # the test has ended
        _answer(orders, lambda what=what, a=args, o=options: getattr(life, what)(*a, **o))
    if life is not None:
        life.close()


def _answer(orders: Connection, call: Any) -> None:
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # in a call, and nowhere else
        result = call()
    except (Exception, KeyboardInterrupt) as error:
        result = Failure(type(error).__name__, str(error), time.monotonic())
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    orders.send(result)
