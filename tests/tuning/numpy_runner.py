"""Four codecs in NumPy, as docs/compression.md describes them, for tests of what is built on them.

The oracle of the kernels is another one, in tests/native.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from zps.codec.base import Codec

Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class NumpyRunner:
    """none, fp16, int8 and onebit. `seeds` are those it was given, in order."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def encode(
        self,
        codec: Codec,
        values: Float32,
        encoded: Bytes,
        residual: tuple[Float32, Float32] | None,
        seed: int,
    ) -> None:
        self.seeds.append(seed)
        assert encoded.size == codec.nbytes(values.size, 4)
        assert encoded.ctypes.data % 64 == 0
        assert (residual is not None) <= codec.feedback
        v = values if residual is None else values + residual[0]
        encoded[:] = np.concatenate([part.view(np.uint8) for part in _encode(codec, v)])
        if residual is not None:
            decoded = np.empty_like(values)
            self.decode(codec, encoded, decoded)
            residual[1][:] = v - decoded

    def decode(self, codec: Codec, encoded: Bytes, out: Float32) -> None:
        n = out.size
        if codec.name == "none":
            out[:] = encoded.view(np.float32)
        elif codec.name == "fp16":
            out[:] = encoded.view(np.float16)
        else:
            block: int = codec.block  # type: ignore[attr-defined]
            blocks = -(-n // block)
            scales = np.repeat(encoded[: 4 * blocks].view(np.float32), block)[:n]
            codes = encoded[4 * blocks :]
            if codec.name == "int8":
                out[:] = codes.view(np.int8) * scales
            else:
                negative = np.unpackbits(codes, bitorder="little")[:n]
                out[:] = np.where(negative, -scales, scales)


def _encode(codec: Codec, v: Float32) -> list[NDArray[np.generic]]:
    if codec.name == "none":
        return [v]
    if codec.name == "fp16":
        return [v.astype(np.float16)]
    block: int = codec.block  # type: ignore[attr-defined]
    starts = range(0, v.size, block)
    blocks = [np.abs(v[start : start + block]) for start in starts]
    if codec.name == "int8":
        scales = np.array([b.max() / 127 for b in blocks], np.float32)
        divisor = np.repeat(np.where(scales == 0, 1, scales), block)[: v.size]
        return [scales, np.rint(v / divisor).clip(-127, 127).astype(np.int8)]
    assert codec.name == "onebit"
    scales = np.array([b.mean() for b in blocks], np.float32)
    return [scales, np.packbits(v < 0, bitorder="little")]
