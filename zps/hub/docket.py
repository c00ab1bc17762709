"""Rounds on hold at one of several hubs: each hub measures its part, and all decide alike.

A hub sees a part of the gradient. Whether the whole is finite, and how long it is, only the workers
can add up: they are asked, the first verdict counts, and every hub gets the same one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from zps.hub.store import Update

Key = tuple[int, ...]
"""(round,) in bsp; (round, rank) otherwise, where every worker's round is its own."""


class Findings(NamedTuple):
    """A gradient's sum of squares, and whether it is finite: one hub's part of it, or all of it.

    The sum is 0 where no norm was asked for, or where the gradient is not finite.
    """

    norm_sq: float
    finite: bool


SKIP = Findings(0.0, finite=False)


class Question(NamedTuple):
    """What a hub asks the workers: to decide about `key`, of which it knows this."""

    key: Key
    measured: Findings

    def concerns(self, rank: int) -> bool:
        """Whether this worker is to be asked. In bsp all are: any of them may be the last one."""
        return self.key[1:] in ((), (rank,))


@dataclass(slots=True)
class _Case:
    updates: list[Update]
    asked: set[int] | None = None  # who can still answer; None: nobody has been asked yet
    verdict: Findings | None = None  # of all hubs


Due = list[tuple[list[Update], Findings]]
"""Updates to be carried out, each round with its verdict, in this order."""


class Docket:
    """The rounds that wait for a verdict.

    They are carried out in the order in which they came, whatever order their verdicts come in;
    out of step, each worker's by itself.
    """

    def __init__(self) -> None:
        self._cases: dict[Key, _Case] = {}
        self._questions: list[Question] = []

    def add(self, key: Key, updates: list[Update], measured: Findings) -> None:
        """A round is complete here; `questions` has what is to be asked."""
        self._cases[key] = _Case(updates)
        self._questions.append(Question(key, measured))

    def questions(self) -> list[Question]:
        """The questions that have come up since the last call; `asked` says who has got each."""
        questions, self._questions = self._questions, []
        return questions

    def asked(self, key: Key, ranks: Iterable[int]) -> Due:
        """These workers have been asked. A round that nobody can decide about is skipped."""
        self._cases[key].asked = set(ranks)
        return self._due()

    def decide(self, key: Key, verdict: Findings) -> Due:
        """A worker has decided. Only the first verdict on a round counts."""
        case = self._cases.get(key)
        if case is not None and case.verdict is None:
            case.verdict = verdict
        return self._due()

    def leave(self, rank: int) -> Due:
        """A worker has left, and answers nothing any more."""
        for case in self._cases.values():
            if case.asked is not None:
                case.asked.discard(rank)
        return self._due()

    def waiting_for(self) -> set[int]:
        """The workers of whom one has to decide, for messages."""
        open_cases = (case for case in self._cases.values() if case.verdict is None)
        return set().union(*(case.asked or () for case in open_cases))

    @property
    def is_empty(self) -> bool:
        return not self._cases

    def holds_before(self, round_: int) -> bool:
        """Whether a round below this one waits."""
        return any(key[0] < round_ for key in self._cases)

    def _due(self) -> Due:
        due: Due = []
        blocked: set[Key] = set()
        for key, case in list(self._cases.items()):
            lane = key[1:]
            verdict = case.verdict
            if verdict is None and case.asked is not None and not case.asked:
                verdict = SKIP
            if verdict is None or lane in blocked:
                blocked.add(lane)
                continue
            del self._cases[key]
            due.append((case.updates, verdict))
        return due
