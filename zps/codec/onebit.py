"""Signs with a scale for each block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zps.codec.base import Codec, block_option, flag, scales


@dataclass(frozen=True)
class OneBit(Codec):
    """The sign of each element, times the block's mean magnitude.

    For very slow links, and only with error feedback: without it, the small elements of a block
    are all as large as the rest, and SGD need not converge.

    Source: Karimireddy et al., Error Feedback Fixes SignSGD and other Gradient Compression Schemes
    (2019), algorithm 1, by block; first in Seide et al., 1-Bit Stochastic Gradient Descent (2014).
    """

    name: ClassVar[str] = "onebit"
    kind: ClassVar[int] = 6
    unfit_weights: ClassVar[str] = "a sign and the scale of its block are not enough for a weight"

    block: int = block_option(256)
    ef: bool = flag(True)

    def nbytes(self, n: int, itemsize: int) -> int:
        return scales(n, self.block) + -(-n // 8)
