"""The rooflines: kernels that only move memory, for benchmarks to measure others against."""

from __future__ import annotations

from collections.abc import Sequence

from zps import _core
from zps.native.checks import check_pointer, place
from zps.native.jobs import Pool


def stream(
    pool: Pool,
    read_ptrs: Sequence[int],
    write_ptrs: Sequence[int],
    n: int,
    block: int,
    isa: str | None = None,
) -> None:
    """The roofline of `apply`: add the sum of the read streams to each write stream.

    1, 2 or 4 float32 streams are read, 2 or 3 are read and written, `block` (16, 32, 64 or 128)
    elements at a time; n is a multiple of 128.
    """
    for pointer in (*read_ptrs, *write_ptrs):
        check_pointer(pointer, 4, "stream")
    if n % 128:
        raise ValueError(f"n must be a multiple of 128, not {n}")
    _core.stream(pool._open(), read_ptrs, write_ptrs, n, block, place(isa))


def move(
    pool: Pool,
    reads: Sequence[tuple[int, int]],
    writes: Sequence[tuple[int, int]],
    units: int,
    isa: str | None = None,
) -> None:
    """The roofline of codecs: read and write whole streams, each (address, bytes a unit).

    Bytes a unit are multiples of 64; at most 8 streams are read and 8 written. What is written is
    the exclusive or of the cache lines that were read.
    """
    for pointer, unit in (*reads, *writes):
        check_pointer(pointer, 1, "stream")
        if unit < 0 or unit % 64:
            raise ValueError(f"bytes a unit are a multiple of 64, not {unit}")
    _core.move(pool._open(), reads, writes, units, place(isa))
