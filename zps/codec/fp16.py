"""IEEE half precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zps.codec.base import Codec, flag


@dataclass(frozen=True)
class Fp16(Codec):
    """Each element rounded to a 16-bit float of 5 exponent and 10 fraction bits.

    For gradients of ordinary size, where 11 bits of precision are more than enough. Below 6e-8 an
    element becomes 0; above 65504 it becomes infinite: prefer bf16 with a large loss scale.

    Source: Micikevicius et al., Mixed Precision Training (2018), section 3.
    """

    name: ClassVar[str] = "fp16"
    kind: ClassVar[int] = 1

    ef: bool = flag(False)

    def nbytes(self, n: int, itemsize: int) -> int:
        return 2 * n
