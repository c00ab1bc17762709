"""What a measurement needs of a codec's kernel: one piece in, one piece out."""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from zps import native
from zps.codec.base import Codec
from zps.codec.plan import CODEC

__all__ = ["CodecRunner", "NativeRunner"]

Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class CodecRunner(Protocol):
    """Encodes and decodes one piece. Arrays are one-dimensional and contiguous."""

    def encode(
        self,
        codec: Codec,
        values: Float32,
        encoded: Bytes,
        residual: tuple[Float32, Float32] | None,
        seed: int,
    ) -> None:
        """Encode `values`, plus the first residual, and put what was lost into the second.

        encoded   codec.nbytes(n, 4) bytes, beginning on a 64-byte boundary
        residual  two arrays of n elements that do not overlap; None: nothing is fed back
        seed      of stochastic rounding and of randk's choice
        """

    def decode(self, codec: Codec, encoded: Bytes, out: Float32) -> None:
        """Write the n elements that `encoded` holds."""


class NativeRunner:
    """The kernels that workers and hub use, on one thread."""

    def __init__(self) -> None:
        self._encoding = lru_cache(maxsize=None)(_encoding)

    def encode(
        self,
        codec: Codec,
        values: Float32,
        encoded: Bytes,
        residual: tuple[Float32, Float32] | None,
        seed: int,
    ) -> None:
        before, after = residual if residual is not None else (None, None)
        self._encoding(codec, values.size).encode(
            values.ctypes.data,
            encoded.ctypes.data,
            residual_in_ptr=0 if before is None else before.ctypes.data,
            residual_out_ptr=0 if after is None else after.ctypes.data,
            seed=seed,
        )

    def decode(self, codec: Codec, encoded: Bytes, out: Float32) -> None:
        self._encoding(codec, out.size).decode(encoded.ctypes.data, out.ctypes.data)


def _encoding(codec: Codec, n: int) -> native.Encoding:
    record = np.array([codec.facts()], CODEC)[0]
    return native.Encoding(record, n, native.DTYPE["float32"])
