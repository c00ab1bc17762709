"""Where every parameter lies: the ordered list of tensors, cut into buckets.

A layout has two coordinates. The *flat element offset* counts elements, whatever their dtype: fp32
master weights and optimizer state are indexed by it. The *byte offset* is the place in the weights
arena, where each parameter is published in its own dtype. Inside a bucket the two run together:

    byte - bucket.byte == itemsize * (begin - bucket.begin)

Rules, each with its reason:

* a parameter begins at a multiple of 32 elements and of 64 bytes: no two share a cache line;
* a parameter's pieces follow one another without a gap, in elements and in bytes: one tensor view
  covers it, however many buckets it spans;
* a bucket holds one dtype: one kernel applies it;
* a bucket begins at a multiple of 64 bytes and has 64 at least: none is empty;
* a bucket has at most `bucket_bytes`, unless `split` is off and one tensor alone has more.

Between two buckets, up to 64 bytes may belong to neither. Extras (a model's buffers) are published
after the parameters and belong to no bucket.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from zps.errors import DuplicateName, LayoutError, ProtocolError, TensorMismatch

__all__ = ["ALIGN_BYTES", "DTYPES", "ITEMSIZE", "Bucket", "Layout", "Param", "Piece", "round_up"]

DTYPES = ("float32", "bfloat16", "float16")
"""The dtypes that can be trained."""

ITEMSIZE = {
    name: size
    for size, names in (
        (16, "complex128"),
        (8, "float64 int64 uint64 complex64"),
        (4, "float32 int32 uint32 complex32"),
        (2, "float16 bfloat16 int16 uint16"),
        (1, "bool int8 uint8"),
        (1, "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"),
    )
    for name in names.split()
}
"""Bytes an element, for every dtype that an extra may have."""

ALIGN_BYTES = 64
ALIGN_ELEMENTS = 32

# What a peer's layout may ask for: a few bytes on the wire must not cost megabytes here.
MAX_BYTES = 2**48
MAX_BUCKETS = 2**16
MAX_TENSORS = 2**20
MAX_DIMENSIONS = 64
MAX_NAME = 1024


@dataclass(frozen=True, slots=True)
class Param:
    """One tensor as declared. `dtype` is torch's name for it, without "torch."."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Elements; 1 for a 0-dimensional tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of one parameter that lies in one bucket; count is 0 for an empty tensor."""

    param: int
    bucket: int
    begin: int
    """Flat element offset."""
    count: int
    """Elements."""
    param_begin: int
    """Elements of the parameter that lie before this piece."""
    byte: int
    """Byte offset in the weights arena."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A contiguous range of the layout: the unit of push, apply and version."""

    index: int
    dtype: str
    begin: int
    """Flat element offset."""
    count: int
    """Elements, padding included."""
    byte: int
    """Byte offset in the weights arena, a multiple of 64."""
    nbytes: int
    """Bytes, padding included: a multiple of 64."""
    pieces: range
    """Indices into `Layout.pieces`."""


@dataclass(frozen=True)
class Layout:
    """The ordered parameters and buffers of one model, and where each lies.

    Made by `build` or `from_wire` only. Two layouts are equal when their hashes are.
    """

    params: tuple[Param, ...]
    extras: tuple[Param, ...]
    bucket_bytes: int
    split: bool
    fuse: bool
    pieces: tuple[Piece, ...] = field(compare=False, repr=False)
    buckets: tuple[Bucket, ...] = field(compare=False, repr=False)
    index: dict[str, int] = field(compare=False, repr=False)
    """Parameter name -> index into `params`."""
    extra_index: dict[str, int] = field(compare=False, repr=False)
    """Extra's name -> index into `extras`."""
    extra_bytes: tuple[int, ...] = field(compare=False, repr=False)
    """Byte offset of each extra in the weights arena, a multiple of 64."""
    flat_elements: int = field(compare=False)
    """End of the last bucket in elements, a multiple of 32."""
    arena_bytes: int = field(compare=False)
    """Bytes of all buckets: the trainable region of the weights arena."""
    total_bytes: int = field(compare=False)
    """Bytes of the weights arena: `arena_bytes`, then the extras; a multiple of 64."""
    hash: str = field(compare=False)
    """SHA-256 in hex over params, extras, bucket_bytes, split and fuse."""
    _first_piece: tuple[int, ...] = field(compare=False, repr=False)

    @classmethod
    def build(
        cls,
        params: Sequence[Param],
        extras: Sequence[Param] = (),
        *,
        bucket_bytes: int,
        split: bool = True,
        fuse: bool = True,
    ) -> Layout:
        """Lay `params` out in the order given, in buckets of at most `bucket_bytes`.

        bucket_bytes  a positive multiple of 64
        split         cut a tensor that is larger than a bucket; otherwise it has a bucket of its
                      own, as large as it needs
        fuse          put small tensors together; otherwise each has its own buckets, and can be
                      pushed alone
        Raises DuplicateName, TensorMismatch (a dtype that cannot be trained), LayoutError.
        """
        if bucket_bytes <= 0 or bucket_bytes % ALIGN_BYTES or bucket_bytes >= MAX_BYTES:
            raise LayoutError(f"bucket_bytes is {bucket_bytes}, not a positive multiple of 64")
        params = tuple(_checked(p, DTYPES) for p in params)
        extras = tuple(_checked(p, ITEMSIZE) for p in extras)
        index, extra_index = _indices(params, extras)
        _check_totals(params, extras, bucket_bytes)

        cutter = _Cutter(bucket_bytes, split, fuse)
        for param in params:
            cutter.add(param)
        cutter.close()
        arena_bytes = byte = cutter.byte
        extra_bytes = []
        for extra in extras:
            extra_bytes.append(byte)
            byte += round_up(extra.nbytes, ALIGN_BYTES)
        return cls(
            params=params,
            extras=extras,
            bucket_bytes=bucket_bytes,
            split=split,
            fuse=fuse,
            pieces=tuple(cutter.pieces),
            buckets=tuple(cutter.buckets),
            index=index,
            extra_index=extra_index,
            extra_bytes=tuple(extra_bytes),
            flat_elements=round_up(cutter.begin, ALIGN_ELEMENTS),
            arena_bytes=arena_bytes,
            total_bytes=byte,
            hash=_digest(_wire(params, extras, bucket_bytes, split, fuse)),
            _first_piece=(*cutter.first_piece, len(cutter.pieces)),
        )

    def pieces_of(self, param: int) -> range:
        """Indices into `pieces` of one parameter: one at least, in the order of its elements."""
        return range(self._first_piece[param], self._first_piece[param + 1])

    def param_byte(self, param: int) -> int:
        """Byte offset in the weights arena; the whole parameter follows there without a gap."""
        return self.pieces[self._first_piece[param]].byte

    def param_begin(self, param: int) -> int:
        """Flat element offset; the whole parameter follows there without a gap."""
        return self.pieces[self._first_piece[param]].begin

    def to_wire(self) -> list[Any]:
        """Plain lists for MessagePack: [bucket_bytes, split, fuse, params, extras]."""
        return _wire(self.params, self.extras, self.bucket_bytes, self.split, self.fuse)

    @classmethod
    def from_wire(cls, wire: object) -> Layout:
        """The layout that a peer's `to_wire` describes, rebuilt here and equal to the peer's.

        Costs memory in proportion to the message, plus MAX_BUCKETS buckets at most.
        Raises ProtocolError for anything that `to_wire` cannot have made.
        """
        bucket_bytes, split, fuse, params, extras = _sequence(wire, "a layout", 5, 5)
        if type(bucket_bytes) is not int or not 0 < bucket_bytes < MAX_BYTES:
            raise ProtocolError("a layout's bucket_bytes is not a positive integer below 2**48")
        if type(split) is not bool or type(fuse) is not bool:
            raise ProtocolError("a layout's split and fuse are not booleans")
        tensors = [
            [_param(p) for p in _sequence(group, "a layout's list of tensors", 0, MAX_TENSORS)]
            for group in (params, extras)
        ]
        try:
            return cls.build(*tensors, bucket_bytes=bucket_bytes, split=split, fuse=fuse)
        except LayoutError as error:
            raise ProtocolError(f"a peer's layout is not valid: {error}") from error

    def explain_mismatch(self, other: Layout, mine_who: str, other_who: str) -> str:
        """One or two sentences that name the first difference; "" if there is none.

        mine_who, other_who  whose layouts these are: "rank 1", "rank 0"
        """
        for kind, mine, theirs in (
            ("parameter", self.params, other.params),
            ("buffer", self.extras, other.extras),
        ):
            found = _first_difference(kind, mine, theirs, mine_who, other_who)
            if found:
                return f"{found}. Every worker must build the same model."
        for setting in ("bucket_bytes", "split", "fuse"):
            a, b = getattr(self, setting), getattr(other, setting)
            if a != b:
                return (
                    f"{setting} is {a} on {mine_who} but {b} on {other_who}. "
                    "Every worker must have the same settings."
                )
        return ""


class _Cutter:
    """Lays parameters into buckets, one after another.

    `begin` and `byte` are where the open bucket begins, or the next one when none is open; `end` is
    the flat offset behind its last element.
    """

    def __init__(self, bucket_bytes: int, split: bool, fuse: bool) -> None:
        self.bucket_bytes = bucket_bytes
        self.split = split
        self.fuse = fuse
        self.pieces: list[Piece] = []
        self.buckets: list[Bucket] = []
        self.first_piece: list[int] = []
        self.dtype = ""
        self.begin = self.end = self.byte = 0
        self.opened_at = 0  # index of the open bucket's first piece

    def add(self, param: Param) -> None:
        size = ITEMSIZE[param.dtype]
        left = param.numel
        if param.dtype != self.dtype or self._is_full(left, size):
            self.close()
            self.begin = self.end = round_up(self.begin, ALIGN_ELEMENTS)
            self.dtype = param.dtype
        start = round_up(self.end, ALIGN_ELEMENTS)
        whole = self.bucket_bytes // size
        index = len(self.first_piece)
        self.first_piece.append(len(self.pieces))
        done = 0
        while self.split and left > whole:
            self._piece(index, start, whole, done)
            start, done, left = start + whole, done + whole, left - whole
            self.close()
        self._piece(index, start, left, done)

    def close(self) -> None:
        """End the open bucket, if there is one, and move to the 64-byte boundary behind it."""
        if len(self.pieces) == self.opened_at:
            return
        size = ITEMSIZE[self.dtype]
        nbytes = max(round_up((self.end - self.begin) * size, ALIGN_BYTES), ALIGN_BYTES)
        pieces = range(self.opened_at, len(self.pieces))
        count = nbytes // size
        self.buckets.append(
            Bucket(len(self.buckets), self.dtype, self.begin, count, self.byte, nbytes, pieces)
        )
        self.begin = self.end = self.begin + count
        self.byte += nbytes
        self.opened_at = len(self.pieces)

    def _is_full(self, count: int, size: int) -> bool:
        """The next parameter, of the open bucket's dtype, must begin another."""
        if not self.fuse:
            return len(self.pieces) > self.opened_at
        end = round_up(self.end, ALIGN_ELEMENTS) + count
        return self.end > self.begin and (end - self.begin) * size > self.bucket_bytes

    def _piece(self, param: int, start: int, count: int, done: int) -> None:
        byte = self.byte + (start - self.begin) * ITEMSIZE[self.dtype]
        self.pieces.append(Piece(param, len(self.buckets), start, count, done, byte))
        self.end = start + count


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def _wire(
    params: Sequence[Param], extras: Sequence[Param], bucket_bytes: int, split: bool, fuse: bool
) -> list[Any]:
    groups = ([[p.name, list(p.shape), p.dtype] for p in group] for group in (params, extras))
    return [bucket_bytes, split, fuse, *groups]


def _digest(wire: list[Any]) -> str:
    return hashlib.sha256(json.dumps(wire, separators=(",", ":")).encode()).hexdigest()


def _checked(param: Param, dtypes: Sequence[str] | dict[str, int]) -> Param:
    """`param` with a plain tuple for its shape, if everything about it is valid."""
    name, shape, dtype = param.name, tuple(param.shape), param.dtype
    if not 0 < len(name) <= MAX_NAME:
        raise LayoutError(f"a name has {len(name)} characters, not 1 to {MAX_NAME}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise LayoutError(f"{_short(name)} is not valid Unicode") from None
    if dtype not in dtypes:
        raise TensorMismatch(
            f"{_short(name)} has dtype {_short(dtype)}, not one of {', '.join(dtypes)}; "
            "cast to float32"
        )
    if len(shape) > MAX_DIMENSIONS or not all(0 <= n < MAX_BYTES for n in shape):
        raise LayoutError(f"{_short(name)} has a shape that no tensor has")
    return param if type(param.shape) is tuple else Param(name, shape, dtype)


def _indices(
    params: Sequence[Param], extras: Sequence[Param]
) -> tuple[dict[str, int], dict[str, int]]:
    index = {param.name: i for i, param in enumerate(params)}
    extra_index = {param.name: i for i, param in enumerate(extras)}
    if len(index.keys() | extra_index.keys()) < len(params) + len(extras):
        seen: set[str] = set()
        for param in (*params, *extras):
            if param.name in seen:
                raise DuplicateName(
                    f"{_short(param.name)} is declared twice; declare a tied weight once"
                )
            seen.add(param.name)
    return index, extra_index


def _check_totals(params: Sequence[Param], extras: Sequence[Param], bucket_bytes: int) -> None:
    if len(params) > MAX_TENSORS or len(extras) > MAX_TENSORS:
        raise LayoutError(f"more than {MAX_TENSORS} tensors")
    # Nothing has been laid out yet: a peer that asks for too much is stopped before it costs.
    sizes = [param.nbytes for param in params]
    if sum(sizes) + sum(extra.nbytes for extra in extras) >= MAX_BYTES:
        raise LayoutError("the tensors have 2**48 bytes or more in all")
    if sum(size // bucket_bytes for size in sizes) > MAX_BUCKETS:
        raise LayoutError(
            f"{sum(sizes)} bytes make more than {MAX_BUCKETS} buckets of {bucket_bytes} bytes; "
            "raise ZPS_BUCKET_BYTES"
        )


def _first_difference(
    kind: str, mine: Sequence[Param], theirs: Sequence[Param], mine_who: str, other_who: str
) -> str:
    for i, (a, b) in enumerate(zip_longest(mine, theirs)):
        if a == b:
            continue
        if a is not None and b is not None and a.name == b.name:
            return _how_they_differ(kind, a, b, mine_who, other_who)
        if a is not None and all(a.name != p.name for p in theirs):
            return f"{kind} '{a.name}' of {mine_who} is missing on {other_who}"
        if b is not None and all(b.name != p.name for p in mine):
            return f"{kind} '{b.name}' of {other_who} is missing on {mine_who}"
        # The same names in another order, which one of another dtype alone may have caused.
        named = {p.name: p for p in theirs}
        for p in mine:
            if p != named.get(p.name, p):
                return _how_they_differ(kind, p, named[p.name], mine_who, other_who)
        names = (mine[i].name, theirs[i].name)
        return f"{kind} number {i} is '{names[0]}' on {mine_who} but '{names[1]}' on {other_who}"
    return ""


def _how_they_differ(kind: str, a: Param, b: Param, mine_who: str, other_who: str) -> str:
    what, other = (a.shape, b.shape) if a.shape != b.shape else (a.dtype, b.dtype)
    return f"{kind} '{a.name}' is {what} on {mine_who} but {other} on {other_who}"


def _sequence(value: object, what: str, least: int, most: int) -> Sequence[Any]:
    if not isinstance(value, list | tuple) or not least <= len(value) <= most:
        raise ProtocolError(f"{what} is not a list of {least} to {most} entries")
    return value


def _param(wire: object) -> Param:
    name, shape, dtype = _sequence(wire, "a tensor in a layout", 3, 3)
    if type(name) is not str or type(dtype) is not str:
        raise ProtocolError("a tensor in a layout has a name and a dtype that are not strings")
    dims = _sequence(shape, f"the shape of {_short(name)}", 0, MAX_DIMENSIONS)
    if not all(type(n) is int for n in dims):
        raise ProtocolError(f"the shape of {_short(name)} is not a list of integers")
    return Param(name, tuple(dims), dtype)


def _short(text: str, limit: int = 80) -> str:
    """`text` quoted, and cut before a peer's message fills ours."""
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}..."
