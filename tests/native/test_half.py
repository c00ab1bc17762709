"""bfloat16 and float16 in the tile loop: every half value in, every rounding out."""

from __future__ import annotations

import numpy as np
import pytest

from tests.native.oracle import ISAS, Block, Bucket, loaded, stored
from zps import native
from zps.optim.registry import rule

EVERY_HALF = np.arange(65536, dtype=np.uint16)


def same(got, want):
    """Equal bits, but any NaN equals any NaN."""
    width = np.uint32 if got.dtype.itemsize == 4 else np.uint16
    both_nan = np.isnan(got) & np.isnan(want)
    np.testing.assert_array_equal(got.view(width)[~both_nan], want.view(width)[~both_nan])
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_half_is_widened_exactly(dtype, isa):
    bucket = Bucket("mean", np.zeros(65536), [np.zeros(65536)], dtype)
    bucket.slot_blocks[0].values[:] = EVERY_HALF
    out = Block(np.zeros(65536, np.float32))
    native.reduce(native.Pool(1), [bucket.job], [out.address], isa)
    same(out.values, loaded(EVERY_HALF, dtype))


def hard_floats():
    """Every half, the ties between neighbours, their neighbours, the limits, and noise."""
    with np.errstate(invalid="ignore"):
        halves = np.concatenate([loaded(EVERY_HALF, d) for d in ("bfloat16", "float16")])
    bits = halves.view(np.uint32)
    near = np.concatenate(
        [
            bits + np.uint32(d % 2**32)
            for half in (0x1000, 0x8000)
            for d in (0, 1, -1, half, half + 1, half - 1)
        ]
    )
    noise = np.random.default_rng(3).integers(0, 2**32, 200_000, np.uint32)
    limits = np.float32([0, 65504, 65519.996, 65520, 1e38, 2**-24, 2**-25, 2**-25 * 1.0001])
    return np.concatenate([near, noise, limits.view(np.uint32)]).view(np.float32)


def published(values, dtype, isa=None):
    """What a rule that changes nothing publishes of these master weights."""
    bucket = Bucket("sgd", np.zeros(len(values)), [np.zeros(len(values))], dtype, [None])
    bucket.master.values[:] = values
    bucket.job.hypers = rule("sgd").pack([{"lr": 0.0}])
    native.apply(native.Pool(1), [bucket.job], isa)
    bucket.check_guards()
    return bucket.published.values


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_publishing_rounds_to_nearest_even_and_keeps_nan(dtype, isa):
    values = hard_floats()
    with np.errstate(over="ignore", invalid="ignore"):
        want = stored(values, dtype)
    got = published(values, dtype, isa)
    with np.errstate(invalid="ignore"):
        same(loaded(got, dtype), loaded(want, dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_target_publishes_the_same_bits_even_of_nan(dtype):
    values = hard_floats()
    base = published(values, dtype, "base")
    for isa in ISAS:
        np.testing.assert_array_equal(published(values, dtype, isa), base)
