"""Which announced gradients a hub asks for, so that what it holds stays within a budget.

A worker that shares no memory with its hub announces a push, and sends a bucket's bytes when the
hub asks. `Intake` is told what was announced, what arrived and what has been consumed, and answers
what to ask for next:

    intake.announce(rank=1, round=7, bucket=0, nbytes=4 << 20)
    for ask in intake.next(rounds.would_close, rounds.would_keep):
        ...                                     # send a FETCH for ask.rank, ask.round, ask.bucket

Asking is in the order of rounds and buckets, within the budget. A bucket that enough ranks have
announced can be applied as soon as its bytes are here: one such bucket is asked for even over the
budget, so that no order of announcements can bring the job to a halt. What is held is therefore at
most the budget and one bucket of each rank; where the gradients of a rank lie here until all of its
round have come, the budget and one round of one rank. What would only be kept is not asked for yet:
it would take the room of those it waits for.

This is the rendezvous of message passing, with the receiver in charge of its memory.
Source: Gropp and Lusk, A High-Performance MPI Implementation on a Shared-Memory Vector
Supercomputer, section 3 (eager and rendezvous protocols).
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Collection
from typing import NamedTuple

__all__ = ["Ask", "Intake"]

Key = tuple[int, int]  # (round, bucket)
WouldClose = Callable[[int, int, Collection[int]], bool]
"""(round, bucket, ranks) -> whether the gradients of these ranks would complete the bucket."""


WouldKeep = Callable[[int, int], bool]
"""(rank, round) -> whether a gradient would not be used before others have come on."""


class Ask(NamedTuple):
    """Ask `rank` for its gradient of `bucket` in `round`."""

    rank: int
    round: int
    bucket: int


class _Unit(NamedTuple):
    """What may be asked for over the budget: a bucket of all ranks, or all buckets of one rank."""

    round: int
    bucket: int | None
    rank: int | None

    def has(self, rank: int, key: Key) -> bool:
        return self.round == key[0] and self.bucket in (None, key[1]) and self.rank in (None, rank)


class Intake:
    """The announced gradients of one hub that have not been consumed.

    budget  bytes that may be asked for or held at a time, beyond which only what completes one
            bucket is asked for, or one rank's round
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.held_bytes = 0
        """Bytes asked for and not yet consumed."""
        self._order: list[Key] = []  # the keys of _waiting, ascending
        self._waiting: dict[Key, dict[int, int]] = {}  # rank -> bytes: announced
        self._asked: dict[Key, dict[int, int]] = {}  # asked for, and still on their way
        self._here: dict[Key, dict[int, int]] = {}  # arrived, and not consumed
        self._over: _Unit | None = None  # what was asked for over the budget
        self._whole: Counter[tuple[int, int]] = Counter()  # (rank, round) -> what is not consumed

    def announce(
        self, rank: int, round: int, bucket: int, nbytes: int, *, whole: bool = False
    ) -> None:
        """`rank` has a gradient of `nbytes` bytes ready.

        whole  nothing of this rank's round is consumed before all of it is here
        """
        key = (round, bucket)
        if whole:
            self._whole[rank, round] += 1
        if key not in self._waiting:
            self._waiting[key] = {}
            bisect.insort(self._order, key)
        self._waiting[key][rank] = nbytes

    def next(
        self, would_close: WouldClose, would_keep: WouldKeep = lambda rank, round: False
    ) -> list[Ask]:
        """What to ask for now; it counts as held from here on."""
        asks: list[Ask] = []
        if self._over is not None and not self._lasts(self._over):
            self._over = None
        for key in list(self._order):
            wanted = [rank for rank in sorted(self._waiting[key]) if not would_keep(rank, key[0])]
            if wanted and self._over is None and would_close(*key, self._ranks(key)):
                self._over = self._unit(wanted[0], key)
            full = not self._ask_for(key, wanted, asks)
            if full and self._over is not None and self._over.bucket is not None:
                break  # the budget is used up, and its one exception too
        return asks

    def arrived(self, rank: int, round: int, bucket: int) -> bool:
        """What was asked for has come; False if it was not asked for."""
        nbytes = _take(self._asked, (round, bucket), rank)
        if nbytes is None:
            return False
        self._here.setdefault((round, bucket), {})[rank] = nbytes
        return True

    def consumed(self, rank: int, round: int, bucket: int) -> None:
        """Its bytes are not held any more. Nothing happens for what has not arrived."""
        nbytes = _take(self._here, (round, bucket), rank)
        if nbytes is None:
            return
        self.held_bytes -= nbytes
        if (rank, round) in self._whole:
            self._whole[rank, round] -= 1
            if not self._whole[rank, round]:
                del self._whole[rank, round]

    def knows(self, rank: int, round: int, bucket: int) -> bool:
        """Whether this gradient was announced, and has not been consumed."""
        key = (round, bucket)
        return any(rank in stage.get(key, ()) for stage in self._stages)

    def forget(self, rank: int) -> None:
        """`rank` has gone: nothing more comes from it, and what has come is not counted any more.

        Whoever takes its place begins with nothing.
        """
        for key in [key for key, ranks in self._waiting.items() if rank in ranks]:
            self._unwait(key, rank)
        for stage in (self._asked, self._here):
            for key in [key for key, ranks in stage.items() if rank in ranks]:
                self.held_bytes -= _take(stage, key, rank) or 0
        for unit in [unit for unit in self._whole if unit[0] == rank]:
            del self._whole[unit]

    @property
    def _stages(self) -> tuple[dict[Key, dict[int, int]], ...]:
        return self._waiting, self._asked, self._here

    def _ask_for(self, key: Key, ranks: list[int], asks: list[Ask]) -> bool:
        """Ask `ranks` for what there is room for; whether that was all of it."""
        all_asked = True
        for rank in ranks:
            nbytes = self._waiting[key][rank]
            free = self._over is not None and self._over.has(rank, key)
            if not free and self.held_bytes + nbytes > self.budget:
                all_asked = False
                continue
            self._unwait(key, rank)
            self._asked.setdefault(key, {})[rank] = nbytes
            self.held_bytes += nbytes
            asks.append(Ask(rank, *key))
        return all_asked

    def _unit(self, rank: int, key: Key) -> _Unit:
        """What is to be completed when this is: it begins with what `rank` has announced."""
        round, bucket = key
        whole = (rank, round) in self._whole
        return _Unit(round, None, rank) if whole else _Unit(round, bucket, None)

    def _lasts(self, unit: _Unit) -> bool:
        """Whether something of it is asked for or here."""
        if unit.bucket is None:
            return (unit.rank, unit.round) in self._whole
        key = (unit.round, unit.bucket)
        return key in self._asked or key in self._here

    def _ranks(self, key: Key) -> set[int]:
        return {rank for stage in self._stages for rank in stage.get(key, ())}

    def _unwait(self, key: Key, rank: int) -> None:
        _take(self._waiting, key, rank)
        if key not in self._waiting:
            del self._order[bisect.bisect_left(self._order, key)]


def _take(stage: dict[Key, dict[int, int]], key: Key, rank: int) -> int | None:
    """Remove and return an entry; None if there is none."""
    ranks = stage.get(key)
    if ranks is None or rank not in ranks:
        return None
    nbytes = ranks.pop(rank)
    if not ranks:
        del stage[key]
    return nbytes
