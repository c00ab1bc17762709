"""What figures mean: ratios of medians, and how far they can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .peers.team import Samples

Indices = npt.NDArray[np.intp]

PERCENTILES = (1, 2, 5, *range(10, 91, 5), 95, 98, 99)
_AT_A_TIME = 1 << 18  # elements


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio and its 95 % interval."""

    value: float
    low: float
    high: float

    def record(self) -> dict[str, Any]:
        """As every JSON line has it."""
        return {
            "ratio": round(self.value, 3),
            "ratio_ci95": [round(self.low, 3), round(self.high, 3)],
        }


def ratio_of_medians(
    above: Sequence[Samples],
    below: Sequence[Samples],
    *,
    restarts: Sequence[int] = (),
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Ratio:
    """median(above) / median(below) with its percentile-bootstrap interval.

    above, below  the samples of each cycle; cycle i of both was measured together, and the
                  bootstrap draws whole cycles so that pairs stay pairs
    restarts      how many of the cycles, in order, each start of the processes has; with two or
                  more the bootstrap draws starts first, and cycles within them: what a start
                  decides for good, cycles of that start cannot tell
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, sections 8.2 and 13.3.
    """
    picks = _picks(_groups(len(above), restarts), draws, np.random.default_rng(seed))
    ratios = _medians(above, picks) / _medians(below, picks)
    tail = 50 * (1 - level)
    low, high = np.percentile(ratios, [tail, 100 - tail])
    value = np.median(np.concatenate(above)) / np.median(np.concatenate(below))
    return Ratio(float(value), float(low), float(high))


def _groups(cycles: int, restarts: Sequence[int]) -> list[Indices]:
    lengths = [length for length in restarts if length]
    if sum(lengths) != cycles:
        lengths = [cycles]
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def _picks(
    groups: Sequence[Indices], draws: int, generator: np.random.Generator
) -> Sequence[Indices]:
    """The cycles of each draw."""
    if len(groups) == 1:
        return list(generator.integers(len(groups[0]), size=(draws, len(groups[0]))))
    return [
        np.concatenate([generator.choice(groups[g], size=len(groups[g])) for g in drawn])
        for drawn in generator.integers(len(groups), size=(draws, len(groups)))
    ]


def _medians(cycles: Sequence[Samples], picks: Sequence[Indices]) -> Samples:
    """(draws,): the median of what each draw has picked."""
    if len({len(cycle) for cycle in cycles}) == len({len(pick) for pick in picks}) == 1:
        table = np.stack(cycles)
        # As many draws at a time as fit into cache: a table of all of them may be a gigabyte.
        step = max(1, _AT_A_TIME // table.size)
        parts = [np.stack(picks[at : at + step]) for at in range(0, len(picks), step)]
        return np.concatenate(
            [np.median(table[part].reshape(len(part), -1), axis=1) for part in parts]
        )
    return np.array([np.median(np.concatenate([cycles[i] for i in pick])) for pick in picks])
