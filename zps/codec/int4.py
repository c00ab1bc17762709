"""4-bit integers with a scale for each block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zps.codec.base import Codec, block_option, choice, flag, scales


@dataclass(frozen=True)
class Int4(Codec):
    """-7..7 times a scale, which is a block's largest magnitude / 7; two elements in a byte.

    For slow links, with error feedback: 15 levels are coarse, hence the smaller blocks.

    Source: Alistarh et al., QSGD (2017), section 3.1, with deterministic rounding by default and
    the largest magnitude of a block in place of a norm.
    """

    name: ClassVar[str] = "int4"
    kind: ClassVar[int] = 5

    block: int = block_option(64)
    ef: bool = flag(True)
    rounding: str = choice("nearest", "stochastic")

    def nbytes(self, n: int, itemsize: int) -> int:
        return scales(n, self.block) + -(-n // 2)
