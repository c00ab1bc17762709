"""Elements chosen by chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zps.codec.base import Codec, flag, ratio_option
from zps.codec.topk import kept


@dataclass(frozen=True)
class RandK(Codec):
    """One element of each of k equal strata, chosen by a seed that travels in place of indices.

    Without error feedback each is multiplied by the length of its stratum, so that the expected
    value is the gradient; with it, it is not.

    For comparisons, and for very slow links when an unbiased estimate is wanted: it costs next to
    nothing to encode, and loses far more than topk at the same size.

    Source: Stich et al., Sparsified SGD with Memory (2018), section 2; the unbiased form as in
    Wangni et al., Gradient Sparsification for Communication-Efficient Distributed Optimization
    (2018).
    """

    name: ClassVar[str] = "randk"
    kind: ClassVar[int] = 9
    unfit_weights: ClassVar[str] = "it would leave most weights out"

    ratio: float = ratio_option(0.01)
    ef: bool = flag(False)

    def nbytes(self, n: int, itemsize: int) -> int:
        return 8 + 4 * kept(n, self.ratio)
