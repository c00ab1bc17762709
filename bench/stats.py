"""What figures mean: ratios of medians, and how far they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .peers.team import Samples

Indices = npt.NDArray[np.intp]

PERCENTILES = (1, 2, 5, *range(10, 91, 5), 95, 98, 99)
_AT_A_TIME = 1 << 18  # elements
_NORMAL = 1.959964  # the normal distribution's 97.5 %
_STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


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
    draws: int = 1000,
    seed: int = 0,
) -> Ratio:
    """median(above) / median(below), and its 95 % interval.

    above, below  the samples of each cycle; cycle i of both was measured together
    restarts      how many of the cycles, in order, each start of the processes has

    What a start decides for good, its own cycles cannot tell. So with two starts or more each gives
    one ratio, and the result is their geometric mean with Student's interval. With one start it is
    that start's ratio; the interval is a bootstrap over its cycles, whole ones so that pairs stay
    pairs, and says nothing of other starts.
    Sources: Kalibera and Jones, Rigorous Benchmarking in Reasonable Time, section 9; Efron and
    Tibshirani, An Introduction to the Bootstrap, section 13.3.
    """
    groups = _groups(len(above), restarts)
    if len(groups) == 1:
        picks = np.random.default_rng(seed).integers(len(above), size=(draws, len(above)))
        ratios = _medians(above, picks) / _medians(below, picks)
        low, high = np.percentile(ratios, [2.5, 97.5])
        value = np.median(np.concatenate(above)) / np.median(np.concatenate(below))
        return Ratio(float(value), float(low), float(high))
    logs = np.log([_median(above, group) / _median(below, group) for group in groups])
    middle = float(logs.mean())
    margin = _student(len(logs) - 1) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    return Ratio(math.exp(middle), math.exp(middle - margin), math.exp(middle + margin))


def _student(freedom: int) -> float:
    """Student's t at 97.5 %, for so many degrees of freedom."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = _NORMAL  # Abramowitz and Stegun, 26.7.5
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _median(cycles: Sequence[Samples], group: Indices) -> float:
    return float(np.median(np.concatenate([cycles[index] for index in group])))


def _groups(cycles: int, restarts: Sequence[int]) -> list[Indices]:
    lengths = [length for length in restarts if length]
    if sum(lengths) != cycles:
        lengths = [cycles]
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def _medians(cycles: Sequence[Samples], picks: Indices) -> Samples:
    """(draws,): the median of the cycles that each row of picks, (draws, k), names."""
    if len({len(cycle) for cycle in cycles}) == 1:
        table = np.stack(cycles)
        # As many draws at a time as fit into cache: a table of all of them may be a gigabyte.
        step = max(1, _AT_A_TIME // table.size)
        parts = [picks[at : at + step] for at in range(0, len(picks), step)]
        return np.concatenate(
            [np.median(table[part].reshape(len(part), -1), axis=1) for part in parts]
        )
    return np.array([_median(cycles, pick) for pick in picks])
