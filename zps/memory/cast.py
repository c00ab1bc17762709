"""Between float32 and the dtypes that parameters are published in, where it is not hot."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def to_float32(raw: NDArray[np.uint8], dtype: str, out: NDArray[np.float32]) -> None:
    """Widen the bytes of a published tensor; exact."""
    if dtype == "bfloat16":
        np.left_shift(raw.view(np.uint16).astype(np.uint32), 16, out=out.view(np.uint32))
    else:
        out[:] = raw.view(dtype)


def from_float32(values: NDArray[np.float32], dtype: str, raw: NDArray[np.uint8]) -> None:
    """Round to nearest even into the bytes of a published tensor; NaN stays NaN."""
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
        quiet = (bits >> 16) | np.uint32(0x40)
        raw.view(np.uint16)[:] = np.where(np.isnan(values), quiet, rounded)
    else:
        raw.view(dtype)[:] = values
