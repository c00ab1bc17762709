"""Minus, zero or plus, with a scale for each block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zps.codec.base import Codec, block_option, choice, flag, scales


@dataclass(frozen=True)
class Ternary(Codec):
    """-1, 0 or 1 times a scale; four elements in a byte.

    nearest     0 where |v| <= t, and the scale is the mean magnitude of the others;
                t = 0.7 times the block's mean magnitude makes the error small
    stochastic  the scale is the block's largest magnitude, and an element is 0 with probability
                1 - |v| / scale: unbiased, and noisy

    For slow links and gradients with many elements near zero, which onebit cannot express.

    Source: Li et al., Ternary Weight Networks (2016), section 2; stochastic: Wen et al., TernGrad
    (2017), section 3.
    """

    name: ClassVar[str] = "ternary"
    kind: ClassVar[int] = 7
    unfit_weights: ClassVar[str] = "three levels in a block are not enough for weights"

    block: int = block_option(256)
    ef: bool = flag(True)
    rounding: str = choice("nearest", "stochastic")

    def nbytes(self, n: int, itemsize: int) -> int:
        return scales(n, self.block) + -(-n // 4)
