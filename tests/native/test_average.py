"""The averaged gradient: reduce against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from tests.native.oracle import ISAS, SIZES, Block, Bucket, average, loaded
from zps import native


@pytest.fixture(scope="module")
def pool():
    pool = native.Pool(2)
    yield pool
    pool.close()


def draw(count, n, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(n).astype(np.float32) for _ in range(count)]


def reduced(pool, bucket, isa=None):
    out = Block(np.zeros(len(bucket.weights), np.float32))
    native.reduce(pool, [bucket.job], [out.address], isa)
    out.check_guards()
    bucket.check_guards()
    return out.values


def values(bucket):
    return [loaded(block.values, bucket.dtype) for block in bucket.slot_blocks]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", native.DTYPE)
def test_the_mean_of_three_contributions_equals_numpy(pool, n, isa, dtype):
    bucket = Bucket("mean", np.zeros(n), draw(3, n), dtype)
    bucket.job.divisor = 3
    np.testing.assert_array_equal(reduced(pool, bucket, isa), average(values(bucket), divisor=3))


@pytest.mark.parametrize("contributors", [1, 2, 3, 4, 5, 8, 9, 13])
@pytest.mark.parametrize(("scaled", "divisor"), [(False, 8.0), (True, 7.5)])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", native.DTYPE)
def test_contributions_are_added_in_list_order(pool, contributors, scaled, divisor, isa, dtype):
    n = native.TILE + 9
    bucket = Bucket("mean", np.zeros(n), draw(contributors, n), dtype)
    scales = [1.0 + 0.37 * i for i in range(contributors)] if scaled else []
    bucket.job.scales = scales
    bucket.job.divisor = divisor
    expected = average(values(bucket), scales, divisor=divisor)
    np.testing.assert_array_equal(reduced(pool, bucket, isa), expected)


@pytest.mark.parametrize(
    "divisor", [2.0, 4.0, 3.0, 2.0**-126, 2.0**126, 2.0**127, 2.0**-130, 1e-40]
)
@pytest.mark.parametrize("isa", ISAS)
def test_every_divisor_gives_the_bits_of_a_division(pool, divisor, isa):
    exponents = np.linspace(-149, 127, 5000)
    slots = [np.float32(2.0) ** exponents.astype(np.float32) * f for f in np.float32([1, 0.7])]
    bucket = Bucket("mean", np.zeros(5000), slots)
    bucket.job.divisor = divisor
    with np.errstate(over="ignore"):
        expected = average(slots, divisor=divisor)
    np.testing.assert_array_equal(reduced(pool, bucket, isa), expected)


def test_a_negative_zero_keeps_its_sign(pool):
    bucket = Bucket("mean", np.zeros(4), [np.full(4, -0.0, np.float32)])
    assert np.signbit(reduced(pool, bucket)).all()


@pytest.mark.parametrize("isa", ISAS)
def test_the_clipping_factor_multiplies_the_average(pool, isa):
    n = native.TILE + 5
    bucket = Bucket("sgd", np.zeros(n), draw(2, n), states=[None])
    bucket.job.hypers = np.zeros((1, 6))
    bucket.job.divisor = 2
    bucket.job.coef = 0.3
    expected = average(bucket.slots, divisor=2, coef=0.3)
    np.testing.assert_array_equal(reduced(pool, bucket, isa), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", native.DTYPE)
def test_delay_compensation_follows_the_published_weights(pool, isa, dtype):
    n = native.TILE + 5
    now, base, slot = draw(3, n, seed=4)
    bucket = Bucket("sgd", now, [slot], dtype, states=[None])
    base_bucket = Bucket("sgd", base, [slot], dtype)
    bucket.job.hypers = np.zeros((1, 6))
    bucket.job.dc_lambda = 0.04
    bucket.job.base_ptr = base_bucket.published.address
    dc = (0.04, loaded(bucket.published.values, dtype), loaded(base_bucket.published.values, dtype))
    expected = average(values(bucket), dc=dc)
    np.testing.assert_array_equal(reduced(pool, bucket, isa), expected)


def test_absent_parameters_and_padding_are_left_out(pool):
    slot = draw(1, 96)[0]
    segments = [(0, 30, 0, 0), (32, 20, 0, 1), (64, 32, 0, 2)]
    bucket = Bucket("mean", np.zeros(96), [slot], segments=segments)
    bucket.job.steps = np.array([1, 0, 5], np.int64)
    expected = slot.copy()
    expected[30:64] = 0
    np.testing.assert_array_equal(reduced(pool, bucket), expected)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", native.DTYPE)
def test_norm_sq_is_the_same_on_every_target_and_thread_count(n, dtype):
    buckets = [Bucket("mean", np.zeros(n), draw(2, n, seed), dtype) for seed in range(3)]
    for bucket in buckets:
        bucket.job.divisor = 2
    jobs = [bucket.job for bucket in buckets]
    sums = set()
    for threads in (1, 2, 3):
        with_threads = native.Pool(threads)
        sums |= {native.norm_sq(with_threads, jobs, isa) for isa in ISAS}
        with_threads.close()
    grads = [average(values(bucket), divisor=2).astype(np.float64) for bucket in buckets]
    assert len(sums) == 1
    assert sums.pop() == pytest.approx(sum(float(g @ g) for g in grads), rel=1e-12)


def test_norm_sq_of_one_contribution_is_what_encode_saw(pool):
    n = 5 * native.TILE + 3
    bucket = Bucket("mean", np.zeros(n), draw(1, n))
    seen, _ = native.inspect(bucket.slot_blocks[0].address, n, native.DTYPE["float32"])
    assert native.norm_sq(pool, [bucket.job]) == seen


def test_norm_sq_does_not_count_absent_parameters(pool):
    ones = np.ones(64, np.float32)
    bucket = Bucket("mean", ones, [ones], segments=[(0, 20, 0, 0), (32, 7, 0, 1)])
    bucket.job.steps = np.array([0, 3], np.int64)
    assert native.norm_sq(pool, [bucket.job]) == 7.0


@pytest.mark.parametrize("dtype", native.DTYPE)
def test_any_bytes_in_a_slot_are_safe(pool, dtype):
    rng = np.random.default_rng(9)
    n = 3 * native.TILE
    bucket = Bucket("mean", np.zeros(n), draw(2, n), dtype)
    for block in bucket.slot_blocks:
        block.values.view(np.uint8)[:] = rng.integers(0, 256, block.values.nbytes, np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = average(values(bucket), divisor=2)
    bucket.job.divisor = 2
    np.testing.assert_array_equal(reduced(pool, bucket), expected)
