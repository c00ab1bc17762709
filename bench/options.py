"""What a suite is asked to do, read and checked once, before anything starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from . import harness
from .harness import Level, Plan
from .peers.base import BenchError

T = TypeVar("T")


class NothingToDo(BenchError):
    """What was asked for leaves nothing for a suite; others may well do it."""


@dataclass(frozen=True, slots=True)
class Options:
    """What all suites have in common; None leaves a choice to the suite.

    sizes     fp32 parameters, ascending as given
    workers   workers per participant
    peers     comma-separated names
    restarts  how often every process is started anew: a layout of memory, or a placement on the
              cores, that is lucky for somebody lasts as long as the process does
    minutes   of the soak
    given     what was chosen by whoever asks, by the names of `read`: "sizes", "cycles", ...
    """

    level: Level
    plan: Plan
    restarts: int
    seed: int = 0
    sizes: tuple[int, ...] | None = None
    workers: tuple[int, ...] | None = None
    peers: str | None = None
    minutes: float | None = None
    given: frozenset[str] = frozenset()

    def by_level(self, quick: T, normal: T, full: T) -> T:
        """The one of the three that this run's level asks for."""
        return {Level.QUICK: quick, Level.NORMAL: normal, Level.FULL: full}[self.level]


def read(
    *,
    quick: bool = False,
    full: bool = False,
    cycles: int | None = None,
    calm: float | None = None,
    restarts: int | None = None,
    seed: int = 0,
    sizes: str | None = None,
    workers: str | None = None,
    peers: str | None = None,
    minutes: float | None = None,
) -> Options:
    """The command line's words as options. Raises BenchError naming what cannot be read."""
    if quick and full:
        raise BenchError("--quick and --full exclude each other")
    chosen: dict[str, object] = {
        "sizes": sizes,
        "workers": workers,
        "peers": peers,
        "minutes": minutes,
        "restarts": restarts,
        "cycles": cycles,
        "calm": calm,
        "seed": seed or None,
    }
    level = Level.QUICK if quick else Level.FULL if full else Level.NORMAL
    starts = {Level.QUICK: 1, Level.NORMAL: 3, Level.FULL: 5}[level]
    return Options(
        level=level,
        plan=harness.plan(level, cycles, calm),
        restarts=starts if restarts is None else restarts,
        seed=seed,
        sizes=None if sizes is None else tuple(harness.parse_sizes(sizes)),
        workers=None if workers is None else parse_workers(workers),
        peers=peers,
        minutes=minutes,
        given=frozenset(name for name, value in chosen.items() if value is not None),
    )


def parse_workers(text: str) -> tuple[int, ...]:
    """`2,4` → (2, 4). Raises BenchError naming the part that is no number of workers."""
    found = []
    for part in text.split(","):
        if not part.strip().isdecimal() or not 1 <= int(part) <= 64:
            raise BenchError(f"{part!r} is not a number of workers: give 1 to 64, as 2 or 2,4")
        found.append(int(part))
    return tuple(found)


def require_writable(files: Sequence[Path | None], folder: Path | None) -> None:
    """Raises BenchError unless these files can be written and this folder be filled.

    A run of half an hour must not end by finding that nobody may write its result.
    """
    for file in files:
        if file is not None:
            place = file if file.exists() else file.absolute().parent
            if file.is_dir() or not place.exists() or not os.access(place, os.W_OK):
                raise BenchError(f"{file} cannot be written: choose a file in a folder of yours")
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BenchError(f"{folder} cannot be made: {error.strerror}") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise BenchError(f"{folder} cannot be written: choose a folder of yours")
