"""8-bit floats with a scale for each block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zps.codec.base import Codec, block_option, choice, flag, scales


@dataclass(frozen=True)
class Fp8(Codec):
    """E4M3: 4 exponent and 3 fraction bits, scaled so that a block's largest element is 448.

    For blocks whose elements differ by orders of magnitude: the small ones keep their 4 bits of
    precision, where int8 would round them to 0. int8 is the better one where they are alike.

    Source: Micikevicius et al., FP8 Formats for Deep Learning (2022), section 3; scales for blocks
    as in Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2022), section 2.1.
    """

    name: ClassVar[str] = "fp8"
    kind: ClassVar[int] = 3

    block: int = block_option(256)
    ef: bool = flag(True)
    rounding: str = choice("nearest", "stochastic")

    def nbytes(self, n: int, itemsize: int) -> int:
        return scales(n, self.block) + n
