"""The largest elements only."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

from zps.codec.base import Codec, choice, flag, ratio_option

#: Elements that share a list of 16-bit indices; csrc/codec has the same.
TILE = 4096


def kept(n: int, ratio: float) -> int:
    """How many of `n` elements a sparse codec keeps: one at least, if there is one."""
    return min(n, max(1, ceil(ratio * n)))


@dataclass(frozen=True)
class TopK(Codec):
    """The `ratio` of the elements that are largest in magnitude, with their places.

    exact  select exactly the k largest; false: those above a threshold taken from a sample, at
           most k, which is one pass over memory
    value  how the elements that are kept travel

    For gradients that are nearly sparse, such as those of embeddings and large dense layers, on
    slow links. Only with error feedback: what is not sent must not be forgotten.

    Source: Aji and Heafield, Sparse Communication for Distributed Gradient Descent (2017); Lin et
    al., Deep Gradient Compression (2018).
    """

    name: ClassVar[str] = "topk"
    kind: ClassVar[int] = 8
    unfit_weights: ClassVar[str] = "it would leave most weights out"

    ratio: float = ratio_option(0.01)
    exact: bool = flag(False)
    value: str = choice("fp32", "fp16")
    ef: bool = flag(True)

    def nbytes(self, n: int, itemsize: int) -> int:
        k = kept(n, self.ratio)
        offsets = 4 * (-(-n // TILE) + 1)
        indices = -(-2 * k // 4) * 4
        return offsets + indices + k * (2 if self.value == "fp16" else 4)
