"""What codecs lost, kept until the next gradient.

Error feedback encodes v = gradient + factor * residual and keeps what the encoding lost of v. The
new residual is written to other memory than the old one is read from, so that a push that never
leaves (a gradient with NaN, a second backward pass) leaves the old one as it was; `commit` says
that it has left.

Source: Seide et al., 1-Bit Stochastic Gradient Descent (2014); Karimireddy et al., Error Feedback
Fixes SignSGD and other Gradient Compression Schemes (2019).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from zps.codec.plan import Plan, aligned_zeros
from zps.errors import LayoutError

__all__ = ["Residual"]

Float32 = NDArray[np.float32]


class Residual:
    """The residuals of one worker: two float32 buffers, zero at first.

    A residual is kept in the unit of the gradient it came from, which a GradScaler has multiplied
    by its scale of that round; `factor` turns it into the unit of the next one. Not for several
    threads at once.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._buffers = tuple(
            aligned_zeros(4 * plan.residual_elements).view(np.float32) for _ in range(2)
        )
        pieces = len(plan.layout.pieces)
        self._which = np.zeros(pieces, np.uint8)  # the buffer that holds each piece's residual
        self._scale = np.ones(pieces, np.float64)  # the scale it was made under
        self._left = np.zeros(pieces, np.bool_)  # what may be taken back
        self._scale_before = np.ones(pieces, np.float64)

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def of(self, piece: int) -> tuple[Float32, Float32] | None:
        """(what to add, where to put what is lost now): views of a piece's (count,) elements.

        The first is not to be written. None for a piece without error feedback.
        """
        where = self._plan.residual_range(piece)
        if where is None:
            return None
        which = self._which[piece]
        return self._buffers[which][where], self._buffers[1 - which][where]

    def factor(self, piece: int, scale: float = 1.0) -> float:
        """What a piece's residual is to be multiplied by, before it is added to a gradient.

        scale  what the loss of that gradient was multiplied by; finite, not 0
        """
        return float(scale / self._scale[piece])

    def commit(
        self, buckets: Iterable[int], scale: float = 1.0, *, absent: Iterable[int] = ()
    ) -> None:
        """These buckets have left: what was written is from now on what is added.

        scale   what the loss of the gradients that left was multiplied by
        absent  indices of parameters that had no gradient: nothing of them was encoded, so that
                their residuals stay
        Buckets whose gradients are not finite must not be committed: their residual is not either.
        """
        touched = self._pieces(buckets)
        left = touched.copy()
        for param in absent:
            pieces = self._plan.layout.pieces_of(param)
            left[pieces.start : pieces.stop] = False
        self._left[touched] = left[touched]
        self._which ^= left
        self._scale_before[left] = self._scale[left]
        self._scale[left] = scale

    def revert(self, buckets: Iterable[int]) -> None:
        """The last push of these buckets was not applied: they go on with what they had before it.

        To be called before they are encoded again; twice is once.
        """
        back = self._pieces(buckets) & self._left
        self._left[back] = False
        self._which ^= back
        self._scale[back] = self._scale_before[back]

    def state(self) -> Float32:
        """A copy of all residuals, in the unit of unscaled gradients, for a checkpoint.

        The elements of parameters with error feedback in the layout's order, without padding: the
        same for any size of buckets.
        """
        parts = [
            self._buffers[self._which[piece]][where] / np.float32(self._scale[piece])
            for piece, where in self._ranges()
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def load_state(self, state: Float32) -> None:
        """Take over what `state` returned, for the same parameters and codecs.

        Raises LayoutError, and changes nothing, unless it has the right number of elements.
        """
        ranges = self._ranges()
        expected = sum(where.stop - where.start for _, where in ranges)
        if state.shape != (expected,):
            raise LayoutError(
                f"residuals of shape {state.shape} do not fit {expected} elements with error "
                "feedback: model or compression were others when they were saved"
            )
        self._which[:] = 0
        self._scale[:] = 1.0
        self._left[:] = False
        begin = 0
        for _, where in ranges:
            count = where.stop - where.start
            self._buffers[0][where] = state[begin : begin + count]
            begin += count

    def _pieces(self, buckets: Iterable[int]) -> NDArray[np.bool_]:
        layout = self._plan.layout
        chosen = np.zeros(len(layout.pieces), np.bool_)
        for bucket in buckets:
            pieces = layout.buckets[bucket].pieces
            chosen[pieces.start : pieces.stop] = True
        return chosen

    def _ranges(self) -> list[tuple[int, slice]]:
        """(piece, its elements) of every piece with error feedback, in the layout's order."""
        pieces = range(len(self._plan.layout.pieces))
        found = ((piece, self._plan.residual_range(piece)) for piece in pieces)
        return [(piece, where) for piece, where in found if where is not None]
