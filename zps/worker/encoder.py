"""Gradients on their way into the slots of one hub: as they are, or encoded by their codec.

The plan says where every piece of a parameter lies and how it is encoded. What a codec loses is
kept and added to the next gradient of the piece, once the push has left; a push that was not
applied takes back what it had been given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zps import native
from zps.codec.plan import Plan
from zps.codec.residual import Residual

if TYPE_CHECKING:
    import torch  # a node hub encodes too, and has none

_SEED_BITS = 64


class _Piece(NamedTuple):
    """Where one piece comes from and goes to."""

    number: int
    """Index into the layout's pieces."""
    encoding: native.Encoding
    source: int
    """Bytes from the parameter's first element."""
    slot: int
    """Bytes from the slots' first."""
    place: tuple[int, int]
    """The parameter in the whole model, and the piece's first element there."""


class Encoder:
    """The way into `slots` for the parameters of one layout, by their index.

    slots   (plan.total_bytes,) bytes; the caller keeps them
    stream  tells the random choices of this worker from those of others: its rank
    places  for each parameter, which one of the whole model it lies in, and from which element on;
            None: the layout is the whole model's
    """

    def __init__(
        self,
        plan: Plan,
        slots: NDArray[np.uint8],
        *,
        stream: int,
        places: Sequence[tuple[int, int]] | None = None,
    ):
        self._plan = plan
        self._slots = slots
        self._address = int(slots.ctypes.data)
        self._stream = stream
        own = [(index, 0) for index in range(len(plan.layout.params))]
        self._places = own if places is None else places
        self._pushes = 0
        self._spoilt: set[int] = set()  # parameters whose gradient was not finite
        self._residual = Residual(plan) if plan.residual_elements else None
        self._coded = [plan.codec_of_param(i).kind != 0 for i in range(len(plan.layout.params))]
        self._pieces = [self._pieces_of(i) if coded else [] for i, coded in enumerate(self._coded)]
        self._by_number = {piece.number: piece for pieces in self._pieces for piece in pieces}

    def is_coded(self, param: int) -> bool:
        """Whether a parameter's gradient is encoded; otherwise it lies in its slot as it is."""
        return self._coded[param]

    def place(self, param: int) -> NDArray[np.uint8]:
        """The bytes of a parameter that is not coded: one run, as its pieces follow one another."""
        plan = self._plan
        first = plan.layout.pieces_of(param)[0]
        begin = int(plan.bucket_offset[plan.layout.pieces[first].bucket] + plan.piece_offset[first])
        return self._slots[begin : begin + plan.layout.params[param].nbytes]

    def encode(self, param: int, gradient: torch.Tensor, scale: float) -> bool:
        """Encode a coded parameter's gradient into its slot, with what was lost before.

        gradient  contiguous, of the parameter's dtype, all of its elements
        scale     what the loss of the gradient was multiplied by
        Returns whether all of it is finite. Until `commit` it may be encoded again.
        """
        finite = True
        address = gradient.data_ptr()
        for piece in self._pieces[param]:
            finite = self._encode_piece(piece, address + piece.source, scale) and finite
        (self._spoilt.discard if finite else self._spoilt.add)(param)
        return finite

    def encode_bucket(self, bucket: int, gradients: NDArray[np.uint8]) -> None:
        """Lay a whole bucket: what is not coded as it is, the rest as `encode` does.

        gradients  finite, as the layout's buckets lie
        """
        plan, layout = self._plan, self._plan.layout
        address = int(gradients.ctypes.data)
        for number in layout.buckets[bucket].pieces:
            piece = layout.pieces[number]
            coded = self._by_number.get(number)
            if coded is not None:
                self._encode_piece(coded, address + piece.byte, 1.0)
            elif not self._coded[piece.param]:
                begin = int(plan.bucket_offset[bucket] + plan.piece_offset[number])
                size = int(plan.piece_nbytes[number])
                self._slots[begin : begin + size] = gradients[piece.byte : piece.byte + size]

    def clear(self, param: int) -> None:
        """Lay a gradient of zeros; what was lost before stays where it is."""
        if not self._coded[param]:
            self.place(param)[:] = 0
        for piece in self._pieces[param]:
            # In every codec, bytes of zero are numbers of zero.
            self._slots[piece.slot : piece.slot + piece.encoding.nbytes] = 0

    def commit(self, buckets: Iterable[int], scale: float, *, absent: Iterable[int] = ()) -> None:
        """These buckets have left: see `Residual.commit`.

        A gradient that was not finite, and left all the same, leaves what was lost before.
        """
        self._pushes += 1
        if self._residual is not None:
            self._residual.commit(buckets, scale, absent={*absent, *self._spoilt})

    def withhold(self, buckets: Iterable[int]) -> None:
        """These buckets have left and count nothing: what was lost before stays where it is."""
        self._pushes += 1
        if self._residual is not None:
            self._residual.commit(buckets, absent=range(len(self._coded)))

    def revert(self, buckets: Iterable[int]) -> None:
        """These buckets, of the last push that named them, have not been applied."""
        if self._residual is not None:
            self._residual.revert(buckets)

    # --- parts --------------------------------------------------------------------------------

    def _pieces_of(self, param: int) -> list[_Piece]:
        plan, layout = self._plan, self._plan.layout
        dtype = native.DTYPE[layout.params[param].dtype]
        itemsize = layout.params[param].nbytes // max(1, layout.params[param].numel)
        found = []
        for index in layout.pieces_of(param):
            piece = layout.pieces[index]
            if not piece.count:
                continue  # a tensor without elements has no address, and nothing to say
            encoding = native.Encoding(plan.table[plan.codec_index[index]], piece.count, dtype)
            assert encoding.nbytes == plan.piece_nbytes[index], "plan and kernel disagree"
            slot = int(plan.bucket_offset[piece.bucket] + plan.piece_offset[index])
            whole, begin = self._places[param]
            place = (whole, begin + piece.param_begin)
            found.append(_Piece(index, encoding, piece.param_begin * itemsize, slot, place))
        return found

    def _encode_piece(self, piece: _Piece, source: int, scale: float) -> bool:
        before, after, factor = self._feedback(piece.number, scale)
        _, finite = piece.encoding.encode(
            source,
            self._address + piece.slot,
            residual_in_ptr=before,
            residual_out_ptr=after,
            residual_factor=factor,
            seed=self._seed(*piece.place),
        )
        return finite

    def _feedback(self, piece: int, scale: float) -> tuple[int, int, float]:
        """(address of what was lost, address for what is lost now, factor); 0 for none."""
        residual = self._residual
        views = residual.of(piece) if residual is not None else None
        if views is None or residual is None:
            return 0, 0, 1.0
        before, after = views
        return int(before.ctypes.data), int(after.ctypes.data), residual.factor(piece, scale)

    def _seed(self, param: int, begin: int) -> int:
        """Another one for every worker, push and piece; the same in a run with the same pushes.

        However many hubs there are: a piece is known by its place in the whole model.
        """
        mixed = (self._stream + 1) * 0x9E3779B97F4A7C15 ^ self._pushes * 0xC2B2AE3D27D4EB4F
        place = (param + 1) * 0x165667B19E3779F9 ^ begin * 0xD6E8FEB86659FD93
        return (mixed ^ place) % (1 << _SEED_BITS)
