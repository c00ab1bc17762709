"""Gradients on their way: copied and looked at, encoded and decoded."""

from __future__ import annotations

import math

import numpy as np

from zps import _core
from zps.native.checks import ITEMSIZE, address, check_dtype, check_pointer, place

#: The codecs' ids. `none` is the values as they are.
KIND = {
    name: i
    for i, name in enumerate(
        ("none", "fp16", "bf16", "fp8", "int8", "int4", "onebit", "ternary", "topk", "randk")
    )
}

#: Bits of a codec's flags: what is lost is fed back; rounding is stochastic; topk always finds all
#: of the k largest; topk's values are float16.
FEEDBACK, STOCHASTIC, EXACT, HALF_VALUES = 1, 2, 4, 8

#: A codec and its options. `kind` from KIND, `block` a power of two from 16 to 4096 where there are
#: scales, `ratio` in (0, 1] for topk and randk; what a codec does not use is not looked at.
CODEC = np.dtype(
    [
        ("kind", "<u4"),
        ("block", "<u4"),
        ("flags", "<u4"),
        ("reserved", "<u4"),
        ("ratio", "<f8"),
    ]
)


def encode(
    src_ptr: int, dst_ptr: int, n: int, dtype: int, isa: str | None = None
) -> tuple[float, bool]:
    """Copy n elements; in the same pass, their sum of squares and whether all are finite.

    The sum is a double, which holds the square of any float: it is finite exactly when all are.
    """
    check_pointer(dst_ptr, ITEMSIZE[dtype], "dst_ptr")
    check_pointer(src_ptr, ITEMSIZE[dtype], "src_ptr")
    sum_sq = _core.copy(src_ptr, dst_ptr, n, dtype, place(isa))
    return sum_sq, math.isfinite(sum_sq)


def inspect(src_ptr: int, n: int, dtype: int, isa: str | None = None) -> tuple[float, bool]:
    """What `encode` returns, without the copy: for gradients written in place."""
    check_pointer(src_ptr, ITEMSIZE[dtype], "src_ptr")
    sum_sq = _core.copy(src_ptr, 0, n, dtype, place(isa))
    return sum_sq, math.isfinite(sum_sq)


class Encoding:
    """How one piece is encoded, all of which follows from its codec and its length.

    codec    a record of CODEC
    n        elements; fewer than 2**32 for topk and randk
    dtype    of the piece's parameter, from DTYPE
    Holds `nbytes`, the bytes of the encoded piece, and `k`, the entries that topk and randk have
    room for. Raises ValueError for options out of their range.
    """

    __slots__ = ("_dtype", "_encoding", "_feedback", "_itemsize", "_kind", "k", "n", "nbytes")

    def __init__(self, codec: np.void, n: int, dtype: int):
        record = np.array(codec, CODEC)
        if not 0 <= n < 2**48:
            raise ValueError(f"a piece has 0 to 2**48 elements, not {n}")
        check_dtype(dtype)
        self.n = n
        self._dtype = dtype
        self._itemsize = ITEMSIZE[dtype]
        self._kind = int(record["kind"])
        self._feedback = bool(record["flags"] & FEEDBACK)
        self._encoding = _core.Encoding(address(record), n, self._itemsize)
        self.nbytes = self._encoding.nbytes
        self.k = self._encoding.k

    def encode(
        self,
        grad_ptr: int,
        out_ptr: int,
        *,
        residual_in_ptr: int = 0,
        residual_out_ptr: int = 0,
        residual_factor: float = 1.0,
        seed: int = 0,
        isa: str | None = None,
    ) -> tuple[float, bool]:
        """Encode v = gradient + residual_factor * residual_in in one pass; keep what is lost.

        grad_ptr          n elements of the piece's dtype
        out_ptr           `nbytes` bytes, aligned to 8
        residual_in_ptr   n float32, unchanged; 0: nothing was lost before
        residual_out_ptr  n float32 that do not overlap residual_in: v - decoded; 0: not kept
        seed              of stochastic rounding and of randk's choice, below 2**64
        Returns what `inspect` returns for the gradient, bit for bit. With a gradient that is not
        finite, output and residual_out hold nothing of use, but are safe to decode.
        Residuals are refused for a codec without FEEDBACK. The result does not depend on the
        instruction set.
        """
        self._check_residuals(residual_in_ptr, residual_out_ptr)
        check_pointer(grad_ptr, self._itemsize, "grad_ptr")
        if self._kind == KIND["none"]:
            return encode(grad_ptr, out_ptr, self.n, self._dtype, isa)
        return self._run(
            grad_ptr, 0, residual_in_ptr, residual_out_ptr, residual_factor, seed, out_ptr, isa
        )

    def encode_delta(
        self, now_ptr: int, sent_ptr: int, out_ptr: int, *, seed: int = 0, isa: str | None = None
    ) -> tuple[float, bool]:
        """Encode now - sent, and add what was encoded to sent: the other side's values.

        now_ptr, sent_ptr   n elements of the piece's dtype
        out_ptr             `nbytes` bytes, aligned to 8
        What is lost stays in the difference, so no residual is needed. Whoever adds the decoded
        piece to a copy of the old `sent` (`decode(..., add=True)`, same dtype) holds the new one,
        bit for bit. Returns the sum of squares of the difference, and whether it is finite.
        Not for `none`: send the values. randk wants FEEDBACK, or it oversteps.
        """
        if self._kind == KIND["none"]:
            raise ValueError("codec none has no delta; send the values themselves")
        check_pointer(now_ptr, self._itemsize, "now_ptr")
        check_pointer(sent_ptr, self._itemsize, "sent_ptr")
        return self._run(now_ptr, sent_ptr, 0, 0, 1.0, seed, out_ptr, isa)

    def decode(
        self,
        src_ptr: int,
        out_ptr: int,
        *,
        dtype: int | None = None,
        add: bool = False,
        isa: str | None = None,
    ) -> None:
        """Decode `nbytes` bytes into n elements of `dtype` (None: the piece's), or add to them.

        Any bytes are safe. src_ptr may have any alignment. The sum is rounded once, from float32.
        """
        dtype = self._dtype if dtype is None else dtype
        check_dtype(dtype)
        if self._kind == KIND["none"] and dtype != self._dtype:
            raise ValueError("what is not coded is decoded in its own dtype only")
        check_pointer(src_ptr, 1, "src_ptr")
        check_pointer(out_ptr, ITEMSIZE[dtype], "out_ptr")
        _core.decode(self._encoding, src_ptr, out_ptr, dtype, add, place(isa))

    def check(self, src_ptr: int) -> str:
        """What is wrong with `nbytes` bytes that nobody writes to any more; empty: nothing.

        A piece without a fault names no element twice, and none outside of the piece.
        """
        check_pointer(src_ptr, 1, "src_ptr")
        return _core.check(self._encoding, src_ptr) or ""

    def _check_residuals(self, residual_in_ptr: int, residual_out_ptr: int) -> None:
        if not residual_in_ptr and not residual_out_ptr:
            return
        if not self._feedback:
            raise ValueError("this codec was made without FEEDBACK, but a residual was given")
        check_pointer(residual_out_ptr, 4, "residual_out_ptr")
        if residual_in_ptr:
            check_pointer(residual_in_ptr, 4, "residual_in_ptr")
            if abs(residual_in_ptr - residual_out_ptr) < 4 * self.n:
                raise ValueError("residual_in and residual_out overlap")

    def _run(
        self,
        source_ptr: int,
        sent_ptr: int,
        residual_in_ptr: int,
        residual_out_ptr: int,
        residual_factor: float,
        seed: int,
        out_ptr: int,
        isa: str | None,
    ) -> tuple[float, bool]:
        check_pointer(out_ptr, 8, "out_ptr")
        if not 0 <= seed < 2**64:
            raise ValueError(f"a seed is from 0 to 2**64 - 1, not {seed}")
        sum_sq = _core.encode(
            self._encoding,
            self._dtype,
            source_ptr,
            sent_ptr,
            residual_in_ptr,
            residual_out_ptr,
            residual_factor,
            seed,
            out_ptr,
            place(isa),
        )
        return sum_sq, math.isfinite(sum_sq)
