"""8-bit integers with a scale for each block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zps.codec.base import Codec, block_option, choice, flag, scales


@dataclass(frozen=True)
class Int8(Codec):
    """-127..127 times a scale, which is a block's largest magnitude / 127.

    The one to compress with between nodes: nearly a quarter of the bytes, an error of a half step
    at most, and cheap. Stochastic rounding makes it unbiased without error feedback.

    Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2022), section 2.1;
    stochastic rounding as in Alistarh et al., QSGD (2017), section 3.1.
    """

    name: ClassVar[str] = "int8"
    kind: ClassVar[int] = 4

    block: int = block_option(256)
    ef: bool = flag(True)
    rounding: str = choice("nearest", "stochastic")

    def nbytes(self, n: int, itemsize: int) -> int:
        return scales(n, self.block) + n
