"""What figures mean: ratios of medians, and how far they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .peers.team import Samples

PERCENTILES = (1, 2, 5, *range(10, 91, 5), 95, 98, 99)
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
    above: Sequence[Samples], below: Sequence[Samples], *, restarts: Sequence[int] = ()
) -> Ratio:
    """median(above) / median(below), and its 95 % interval.

    above, below  the samples of each cycle; cycle i of both was measured together
    restarts      how many of the cycles, in order, each start of the processes has

    Every cycle gives a ratio of medians, so that a machine that is slow for a while slows both of
    its parts, and the result of a start is the median of its cycles. What a start decides for good
    its own cycles cannot tell: with two starts or more the result is their geometric mean with
    Student's interval. With one it is that start's; its interval lies between two of the cycles, as
    far apart as 95 % asks for (the outermost are 75 % of three, 94 % of five), and says nothing of
    other starts.
    Sources: Kalibera and Jones, Rigorous Benchmarking in Reasonable Time, section 9; Conover,
    Practical Nonparametric Statistics, section 3.2 (order statistics).
    """
    cycles = np.array([np.median(a) / np.median(b) for a, b in zip(above, below, strict=True)])
    starts = _starts(cycles, restarts)
    if len(starts) == 1:
        outer = _outer(len(cycles))
        low, high = np.sort(cycles)[[outer, len(cycles) - 1 - outer]]
        return Ratio(float(np.median(cycles)), float(low), float(high))
    logs = np.log([np.median(start) for start in starts])
    middle = float(logs.mean())
    margin = _student(len(logs) - 1) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    return Ratio(math.exp(middle), math.exp(middle - margin), math.exp(middle + margin))


def _outer(count: int) -> int:
    """How many of `count` samples may lie outside on either side of an interval of their median."""
    outer, share = 0, 2 * 0.5**count
    while share + 2 * math.comb(count, outer + 1) * 0.5**count <= 0.05:
        outer += 1
        share += 2 * math.comb(count, outer) * 0.5**count
    return outer


def _starts(cycles: Samples, restarts: Sequence[int]) -> list[Samples]:
    """The cycles of each start."""
    lengths = [length for length in restarts if length]
    if sum(lengths) != len(cycles):
        return [cycles]
    return np.split(cycles, np.cumsum(lengths)[:-1])


def _student(freedom: int) -> float:
    """Student's t at 97.5 %, for so many degrees of freedom."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = _NORMAL  # Abramowitz and Stegun, 26.7.5
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
