"""encode and inspect: the copy, the sum of squares, and whether all is finite."""

from __future__ import annotations

import numpy as np
import pytest

from tests.native.oracle import ISAS, SIZES, Block, loaded, stored
from zps import native


def draw(n, dtype, seed=0):
    return stored(np.random.default_rng(seed).standard_normal(n), dtype)


def encode(source, dtype, isa=None):
    slot = Block(np.zeros_like(source))
    result = native.encode(source.ctypes.data, slot.address, len(source), native.DTYPE[dtype], isa)
    slot.check_guards()
    return slot.values, *result


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", native.DTYPE)
def test_encode_copies_and_sums_in_one_pass(n, isa, dtype):
    source = draw(n, dtype)
    copy, sum_sq, finite = encode(source, dtype, isa)
    exact = loaded(source, dtype).astype(np.float64)
    np.testing.assert_array_equal(copy, source)
    assert sum_sq == pytest.approx(float(exact @ exact), rel=1e-12)
    assert finite
    assert native.inspect(source.ctypes.data, n, native.DTYPE[dtype], isa) == (sum_sq, True)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", native.DTYPE)
def test_the_sum_is_the_same_on_every_target(n, dtype):
    source = draw(n, dtype)
    assert len({encode(source, dtype, isa)[1] for isa in ISAS}) == 1


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", native.DTYPE)
def test_one_element_that_is_not_finite_is_found_wherever_it_is(value, isa, dtype):
    n = native.TILE + 21
    bad = stored(np.full(1, value), dtype)[0]
    for place in (0, 15, 16, native.TILE - 1, native.TILE, n - 6, n - 1):
        source = draw(n, dtype)
        source[place] = bad
        copy, _, finite = encode(source, dtype, isa)
        assert not finite
        assert copy.tobytes() == source.tobytes()
        assert native.inspect(source.ctypes.data, n, native.DTYPE[dtype], isa)[1] is False


@pytest.mark.parametrize("isa", ISAS)
def test_the_largest_floats_are_finite_and_so_is_their_sum(isa):
    source = np.full(1000, np.finfo(np.float32).max)
    _, sum_sq, finite = encode(source, "float32", isa)
    assert finite
    assert sum_sq == pytest.approx(1000 * float(np.finfo(np.float32).max) ** 2)
