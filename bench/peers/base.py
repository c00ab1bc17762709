"""A participant of a benchmark: one class, half of it read by the parent, half run by workers."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from .problem import Array


class BenchError(Exception):
    """A benchmark that cannot start, or whose participants are wrong. The text says what to do."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Where one worker sits.

    size     elements of the flat parameter (bench.step) or width of the hidden layers (bench.train)
    address  where the workers meet: a hub's address, or a `file://` rendezvous
    """

    rank: int
    world: int
    size: int
    seed: int
    address: str


@dataclass(frozen=True, slots=True)
class Server:
    """What runs beside a participant's workers: where they meet, its processes, its threads."""

    address: str
    pids: tuple[int, ...] = ()
    threads: int = 0


class Peer(ABC):
    """One participant. The parent asks the class; each worker process makes one instance.

    In a worker: `setup` once, then `prepare(k)` (untimed: writes round k's gradient) and `round()`
    (timed: returns when this worker may read the new weights) in turn, and `close` at the end.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    # Processes that burn a core while they wait are stopped by signal while others are timed.
    spins_when_idle: ClassVar[bool] = False
    # Whether all workers hold the same weights to the last bit.
    same_bits: ClassVar[bool] = True

    @classmethod
    def available(cls) -> str | None:
        """None, or why this participant cannot run here."""
        return None if find_spec("torch") else "torch is not installed"

    @classmethod
    @abstractmethod
    def memory_bytes(cls, size: int, world: int) -> int:
        """Peak memory of all its processes, apart from the interpreters."""

    @classmethod
    @contextmanager
    def serve(cls, world: int, size: int, seed: int, folder: Path) -> Iterator[Server]:
        """Run what the workers need beside themselves; by default only a place to meet."""
        yield Server(f"file://{folder / cls.name}.rendezvous")

    @abstractmethod
    def setup(self, seat: Seat) -> None: ...

    def pids(self) -> list[int]:
        """The processes that `setup` has started beside this one; `close` ends them."""
        return []

    @abstractmethod
    def prepare(self, round_number: int) -> None: ...

    @abstractmethod
    def round(self) -> None: ...

    @abstractmethod
    def weights(self) -> Array:
        """All weights this worker sees, flat, in the model's order."""

    @abstractmethod
    def close(self) -> None: ...


def cores() -> int:
    """The cores this process may run on."""
    return len(os.sched_getaffinity(0))
