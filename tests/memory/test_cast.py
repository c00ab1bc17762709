"""Casts between float32 and the published dtypes, beside torch's, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zps.memory.cast import from_float32, to_float32

DTYPES = ["bfloat16", "float16", "float32"]
SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, 65504.0, 65520.0, 1e-8, 1e-40, 3.4e38, 1 / 3]


def raw_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint8).numpy()


def floats() -> np.ndarray:
    """Random bit patterns, with all exponents, and halfway cases of both roundings."""
    random = np.random.default_rng(0).integers(0, 1 << 32, 100_000, np.uint32)
    halfway = np.concatenate(
        [np.arange(1 << 12, dtype=np.uint32) * 0x8000, np.arange(1 << 12, dtype=np.uint32) * 0x1000]
    ) + np.uint32(0x3F80_0000)
    values = np.concatenate([random, halfway]).view(np.float32)
    return np.concatenate([values[~np.isnan(values)], np.array(SPECIAL, np.float32)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_torchs(dtype):
    values = floats()
    itemsize = getattr(torch, dtype).itemsize
    raw = np.empty(itemsize * len(values), np.uint8)
    with np.errstate(over="ignore"):
        from_float32(values, dtype, raw)
    expected = torch.from_numpy(values).to(getattr(torch, dtype))
    assert (raw == raw_of(expected)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_widening_is_exact_for_every_value_there_is(dtype):
    raw = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    out = np.empty(1 << 16, np.float32)
    to_float32(raw, dtype, out)
    expected = torch.from_numpy(raw.copy()).view(getattr(torch, dtype)).float().numpy()
    same = out.view(np.uint32) == expected.view(np.uint32)
    assert (same | (np.isnan(out) & np.isnan(expected))).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_nan(dtype):
    # The low bits alone make this one a NaN, and rounding must not lose them.
    bits = np.array([0x7F80_0001, 0xFF80_0001, 0x7FC0_0000, 0x7FFF_FFFF], np.uint32)
    raw = np.empty(getattr(torch, dtype).itemsize * 4, np.uint8)
    from_float32(bits.view(np.float32), dtype, raw)
    back = np.empty(4, np.float32)
    to_float32(raw, dtype, back)
    assert np.isnan(back).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_cast_from_nothing(dtype):
    empty = np.empty(0, np.float32)
    from_float32(empty, dtype, np.empty(0, np.uint8))
    to_float32(np.empty(0, np.uint8), dtype, empty)
