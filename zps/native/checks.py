"""What every door checks, and what all of them know: instruction sets, dtypes, addresses."""

from __future__ import annotations

from typing import Any

import numpy as np

from zps import _core

#: Dtypes of gradients and published weights; bfloat16 and float16 are 2 bytes wide.
DTYPE = {"float32": 0, "bfloat16": 1, "float16": 2}
ITEMSIZE = (4, 2, 2)
FLOAT64, INT64 = np.dtype(np.float64), np.dtype(np.int64)
UINT32, UINT64 = np.dtype(np.uint32), np.dtype(np.uint64)

address = _core.address
"""Where a C-contiguous array lies."""

_ISAS = _core.isas()


def isas() -> list[str]:
    """The instruction sets this CPU can run, best first; the last is "base"."""
    return list(_ISAS)


def isa() -> str:
    """The instruction set that runs when none is named."""
    return _ISAS[0]


def place(isa: str | None) -> int:
    """Where the core lists this instruction set; None is the best."""
    if isa is not None and isa not in _ISAS:
        raise ValueError(f"this CPU cannot run the instruction set {isa!r}, only {_ISAS}")
    return 0 if isa is None else _ISAS.index(isa)


def check_dtype(dtype: int) -> None:
    if dtype not in DTYPE.values():
        raise ValueError(f"dtype {dtype} is none of {DTYPE}")


def check_pointer(address: int, alignment: int, what: str) -> None:
    if address <= 0 or address % alignment:
        raise ValueError(f"{what} {address:#x} is null or not aligned to {alignment} bytes")


def _fits(want: int | None, have: int) -> bool:
    return want is None or want == have


def check_array(
    array: object, dtype: np.dtype[Any], shape: tuple[int | None, ...], what: str
) -> None:
    """Raise ValueError unless this is a C-contiguous array of the dtype and shape (None: any)."""
    if isinstance(array, np.ndarray) and array.dtype == dtype and array.flags.c_contiguous:
        have = array.shape
        if have == shape or (len(have) == len(shape) and all(map(_fits, shape, have))):
            return
    given = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else repr(array)
    raise ValueError(f"{what} must be a C-contiguous array of {dtype} {shape}, not {given}")
