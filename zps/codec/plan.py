"""Where every encoded piece lies: a layout and a compression, turned into offsets.

The unit of encoding is a piece: the part of one parameter that lies in one bucket. An encoded
bucket is its pieces in order, each beginning on a 64-byte boundary, and is a multiple of 64 bytes
itself; a bucket whose pieces are all as they are has the layout's own offsets and size. Sizes
depend on codec, count and dtype only, so that hub and worker make the same plan, each for itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from zps.codec.base import Codec
from zps.codec.none import Plain
from zps.codec.spec import Compression
from zps.core.layout import ALIGN_BYTES, ITEMSIZE, Bucket, Layout, round_up
from zps.core.shards import whole_of

__all__ = ["CODEC", "Plan", "aligned_zeros"]

#: float32 elements in ALIGN_BYTES: where the residual of a piece may begin.
_ALIGN_RESIDUAL = ALIGN_BYTES // 4

T = TypeVar("T", bound=np.generic)
_PLAIN = Plain()

#: What a kernel is told of one codec, as csrc/codec has it.
CODEC = np.dtype(
    [("kind", "<u4"), ("block", "<u4"), ("flags", "<u4"), ("reserved", "<u4"), ("ratio", "<f8")]
)


@dataclass(frozen=True, eq=False)
class Plan:
    """The codecs of a layout's pieces and the places of their bytes. Made by `build` only.

    Arrays are read-only; P pieces and B buckets, in the order of the layout.
    """

    layout: Layout
    codecs: tuple[Codec, ...]
    """The distinct codecs in use, in the order of first use."""
    table: NDArray[np.void]
    """(len(codecs),) of CODEC: the same for a kernel."""
    codec_index: NDArray[np.uint32]
    """(P,) index into `codecs` and `table`."""
    piece_offset: NDArray[np.int64]
    """(P,) bytes from the encoded bucket's beginning: a multiple of 64."""
    piece_nbytes: NDArray[np.int64]
    """(P,) encoded bytes, without the padding behind."""
    bucket_offset: NDArray[np.int64]
    """(B,) bytes from the slot's beginning: a multiple of 64."""
    bucket_nbytes: NDArray[np.int64]
    """(B,) encoded bytes, padding included: a multiple of 64, 64 at least."""
    residual_begin: NDArray[np.int64]
    """(P,) float32 elements from the residual's beginning, a multiple of 16; -1 for a piece whose
    codec has no error feedback."""
    residual_elements: int
    """Elements of the residual, padding included; 0 when nothing has error feedback."""
    total_bytes: int
    """Bytes of all encoded buckets: of a slot, and of a worker's push in a round."""
    identity: bool
    """Nothing is encoded: every offset and size is the layout's own."""

    @classmethod
    def build(cls, layout: Layout, compression: Compression, min_bytes: int = 0) -> Plan:
        """Give every piece its codec and its place.

        min_bytes  parameters of fewer bytes, in their own dtype, travel as they are; what counts of
                   a part is the whole, so that it is encoded alike on one hub and on several
        """
        index: dict[Codec, int] = {}
        of_param = [
            index.setdefault(codec, len(index))
            for codec in (
                _PLAIN if nbytes < min_bytes else compression.codec_of(name)
                for name, nbytes in map(whole_of, layout.params)
            )
        ]
        codecs = tuple(index)
        codec_index = np.array([of_param[piece.param] for piece in layout.pieces], np.uint32)
        packer = _Packer(layout, codecs, codec_index)
        for bucket in layout.buckets:
            packer.add(bucket)
        return cls(
            layout=layout,
            codecs=codecs,
            table=_frozen(np.array([codec.facts() for codec in codecs], CODEC)),
            codec_index=_frozen(codec_index),
            piece_offset=_frozen(np.array(packer.piece_offset, np.int64)),
            piece_nbytes=_frozen(np.array(packer.piece_nbytes, np.int64)),
            bucket_offset=_frozen(np.array(packer.bucket_offset, np.int64)),
            bucket_nbytes=_frozen(np.array(packer.bucket_nbytes, np.int64)),
            residual_begin=_frozen(np.array(packer.residual_begin, np.int64)),
            residual_elements=packer.residual_elements,
            total_bytes=packer.total_bytes,
            identity=all(codec == _PLAIN for codec in codecs),
        )

    @property
    def saved_bytes(self) -> int:
        """Bytes fewer in a worker's push of a round than without encoding; below 0 when more."""
        return self.layout.arena_bytes - self.total_bytes

    def codec_of_param(self, param: int) -> Codec:
        """The codec of all pieces of one parameter."""
        return self.codecs[int(self.codec_index[self.layout.pieces_of(param)[0]])]

    def param_nbytes(self, param: int) -> int:
        """Encoded bytes of all pieces of one parameter, without padding."""
        pieces = self.layout.pieces_of(param)
        return int(self.piece_nbytes[pieces.start : pieces.stop].sum())

    def residual_range(self, piece: int) -> slice | None:
        """Where a piece's residual lies, in float32 elements; None without error feedback."""
        begin = int(self.residual_begin[piece])
        return None if begin < 0 else slice(begin, begin + self.layout.pieces[piece].count)


class _Packer:
    """Lays encoded pieces one behind the other, bucket by bucket."""

    def __init__(
        self, layout: Layout, codecs: tuple[Codec, ...], codec_index: NDArray[np.uint32]
    ) -> None:
        self.layout = layout
        self.codecs = codecs
        self.codec_index = codec_index.tolist()
        self.plain = [codec == _PLAIN for codec in codecs]
        self.piece_offset: list[int] = []
        self.piece_nbytes: list[int] = []
        self.bucket_offset: list[int] = []
        self.bucket_nbytes: list[int] = []
        self.residual_begin: list[int] = []
        self.residual_elements = 0
        self.total_bytes = 0
        # Layouts repeat themselves: a large tensor is cut into hundreds of pieces of one size.
        self.nbytes = lru_cache(maxsize=None)(self._nbytes)

    def add(self, bucket: Bucket) -> None:
        """The next bucket, behind all that were added before."""
        as_is = all(self.plain[self.codec_index[piece]] for piece in bucket.pieces)
        end = 0
        for index in bucket.pieces:
            piece = self.layout.pieces[index]
            offset = piece.byte - bucket.byte if as_is else round_up(end, ALIGN_BYTES)
            nbytes = self.nbytes(self.codec_index[index], piece.count, ITEMSIZE[bucket.dtype])
            self.piece_offset.append(offset)
            self.piece_nbytes.append(nbytes)
            self._add_residual(index, piece.count)
            end = offset + nbytes
        size = bucket.nbytes if as_is else max(round_up(end, ALIGN_BYTES), ALIGN_BYTES)
        self.bucket_offset.append(self.total_bytes)
        self.bucket_nbytes.append(size)
        self.total_bytes += size

    def _add_residual(self, piece: int, count: int) -> None:
        if not self.codecs[self.codec_index[piece]].feedback:
            self.residual_begin.append(-1)
            return
        self.residual_begin.append(self.residual_elements)
        self.residual_elements += round_up(count, _ALIGN_RESIDUAL)

    def _nbytes(self, codec: int, count: int, itemsize: int) -> int:
        return self.codecs[codec].nbytes(count, itemsize)


def aligned_zeros(nbytes: int) -> NDArray[np.uint8]:
    """(nbytes,) zeros that begin on a cache line, which numpy does not promise."""
    raw = np.zeros(nbytes + ALIGN_BYTES, np.uint8)
    skip = -raw.ctypes.data % ALIGN_BYTES
    return raw[skip : skip + nbytes]


def _frozen(array: NDArray[T]) -> NDArray[T]:
    array.flags.writeable = False
    return array
