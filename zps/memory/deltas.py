"""Weights on their way back, as differences from what their receiver holds.

The sender keeps a copy of the receiver's weights, and encodes what the new ones differ from it by.
It adds to its copy what the receiver will decode, so both go on from the same, bit for bit, and
what a codec loses is still in the next difference: nothing is ever lost for good. A parameter
without a codec travels as it is.

Source: Tang et al., DoubleSqueeze: Parallel Stochastic Gradient Descent with Double-pass
Error-compensated Compression (2019), section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zps import native
from zps.codec.plan import Plan
from zps.errors import ProtocolError

Bytes = NDArray[np.uint8]


class _Piece(NamedTuple):
    encoding: native.Encoding
    is_coded: bool
    byte: int
    """Bytes from the arena's first."""
    offset: int
    """Bytes from the encoded bucket's first."""


class Deltas:
    """Both ends of the way, for the buckets of one layout."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._encoded = 0
        self._buckets = [
            [self._piece(index) for index in bucket.pieces if plan.layout.pieces[index].count]
            for bucket in plan.layout.buckets
        ]

    def encode(self, bucket: int, now: Bytes, sent: Bytes) -> Bytes | None:
        """What brings a receiver from `sent` to `now`; `sent` is then what it will hold.

        now, sent  weights arenas, of which one bucket is looked at
        Returns plan.bucket_nbytes[bucket] bytes; None where a difference is not finite: `sent` is
        then the values themselves, which have to be sent as they are.
        """
        self._encoded += 1
        out = np.zeros(int(self._plan.bucket_nbytes[bucket]), np.uint8)
        address, here, there = (int(a.ctypes.data) for a in (out, now, sent))
        for number, piece in enumerate(self._buckets[bucket]):
            if piece.is_coded:
                _, finite = piece.encoding.encode_delta(
                    here + piece.byte,
                    there + piece.byte,
                    address + piece.offset,
                    seed=self._encoded << 16 | number & 0xFFFF,
                )
                if not finite:
                    spec = self._plan.layout.buckets[bucket]
                    place = slice(spec.byte, spec.byte + spec.nbytes)
                    sent[place] = now[place]
                    return None
            else:
                size = piece.encoding.nbytes
                value = now[piece.byte : piece.byte + size]
                out[piece.offset : piece.offset + size] = value
                sent[piece.byte : piece.byte + size] = value
        return out

    def apply(self, bucket: int, data: Bytes, weights: Bytes) -> None:
        """Bring the bucket of the arena `weights` to where `encode` brought its `sent`.

        Raises ProtocolError, and changes nothing, when `data` is not as long as it must be.
        """
        expected = int(self._plan.bucket_nbytes[bucket])
        if len(data) != expected:
            raise ProtocolError(
                f"{len(data)} bytes came for the weights of bucket {bucket}; {expected} expected"
            )
        source, target = int(data.ctypes.data), int(weights.ctypes.data)
        for piece in self._buckets[bucket]:
            piece.encoding.decode(source + piece.offset, target + piece.byte, add=piece.is_coded)

    def _piece(self, index: int) -> _Piece:
        plan, layout = self._plan, self._plan.layout
        piece, codec = layout.pieces[index], plan.table[plan.codec_index[index]]
        dtype = native.DTYPE[layout.params[piece.param].dtype]
        return _Piece(
            encoding=native.Encoding(codec, piece.count, dtype),
            is_coded=bool(codec["kind"]),
            byte=piece.byte,
            offset=int(plan.piece_offset[index]),
        )
