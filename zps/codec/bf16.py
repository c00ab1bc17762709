"""bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zps.codec.base import Codec, flag


@dataclass(frozen=True)
class Bf16(Codec):
    """Each element rounded to the upper half of a float32: its range, and 8 bits of precision.

    The one to begin with: half the bytes, no scale that could be wrong, no option to choose.

    Source: Kalamkar et al., A Study of BFLOAT16 for Deep Learning Training (2019).
    """

    name: ClassVar[str] = "bf16"
    kind: ClassVar[int] = 2

    ef: bool = flag(False)

    def nbytes(self, n: int, itemsize: int) -> int:
        return 2 * n
