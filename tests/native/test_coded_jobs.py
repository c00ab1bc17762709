"""Jobs whose slots are coded: the average, and the rule after it, for any mix of codecs."""

from __future__ import annotations

import numpy as np
import pytest

from tests.native import codecs
from tests.native.codecs import EF, EVERY, STOCHASTIC, Case
from tests.native.oracle import ISAS, Block, average, f32, loaded, stored
from zps import native

MIX = [
    (Case("int8"), 5000),
    (Case("none", flags=0), 300),
    (Case("topk", ratio=0.05), 9000),
    (Case("int4", 64, flags=EF | STOCHASTIC), 4097),
    (Case("onebit"), 1),
    (Case("fp8", 16), 1000),
    (Case("fp16"), 129),
    (Case("bf16"), 127),
    (Case("ternary", 32), 4096),
    (Case("randk", ratio=0.1, flags=0), 6000),
    (Case("int8", 4096), 0),
]


class Coded:
    """A bucket of pieces, each with its codec, that some workers have encoded."""

    def __init__(self, mix, contributors, dtype="float32", rule="mean"):
        self.dtype = dtype
        itemsize = 4 if dtype == "float32" else 2
        encodings = [native.Encoding(c.record, n, native.DTYPE[dtype]) for c, n in mix]
        begins, encoded, begin, byte = [], [], 0, 0
        for encoding, (_, n) in zip(encodings, mix, strict=True):
            begins.append(begin)
            encoded.append(byte)
            begin += -(-n // 32) * 32
            byte += -(-encoding.nbytes // 64) * 64
        self.pieces = [slice(b, b + n) for b, (_, n) in zip(begins, mix, strict=True)]
        self.count = begin
        self.weights = np.random.default_rng(9).standard_normal(begin).astype(f32)
        self.published = Block(stored(self.weights, dtype))
        self.master = self.published if itemsize == 4 else Block(self.weights)
        self.slots, self.values = [], []
        for rank in range(contributors):
            slot, values = Block(np.zeros(byte + 64, np.uint8)), np.zeros(begin, f32)
            rng = np.random.default_rng(rank)
            base = slot.address + -slot.address % 64
            for encoding, at, place in zip(encodings, encoded, self.pieces, strict=True):
                gradient = stored(rng.standard_normal(encoding.n).astype(f32), dtype)
                encoding.encode(gradient.ctypes.data or 64, base + at, seed=rank)
                decoded = np.zeros(encoding.n, gradient.dtype)
                if encoding.n:
                    encoding.decode(base + at, decoded.ctypes.data)
                values[place] = loaded(decoded, dtype)
                if itemsize == 2 and encoding.n and encoding is not encodings[1]:
                    wide = np.zeros(encoding.n, f32)
                    encoding.decode(base + at, wide.ctypes.data, dtype=0)
                    values[place] = wide
            self.slots.append((slot, base))
            self.values.append(values)
        self.job = native.Job(
            rule=native.RULES[rule].kernel,
            segments=np.array(
                [(b, n, 0, i) for i, (b, (_, n)) in enumerate(zip(begins, mix, strict=True))],
                native.SEGMENT,
            ),
            grad_dtype=native.DTYPE[dtype],
            weights_ptr=self.published.address,
            master_ptr=self.master.address,
            codecs=np.array([c.record for c, _ in mix]),
            encoded=np.array(encoded, np.uint64),
        )
        self.job.slots = [base for _, base in self.slots]
        self.job.steps = np.ones(len(mix), np.int64)

    def reduced(self, isa=None, threads=2):
        out = Block(np.zeros(self.count, f32))
        pool = native.Pool(threads)
        native.reduce(pool, [self.job], [out.address], isa)
        pool.close()
        out.check_guards()
        for slot, _ in self.slots:
            slot.check_guards()
        return out.values


@pytest.mark.parametrize("contributors", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("scaled", "divisor", "coef"), [(False, 1, 1), (False, 4, 0.3), (True, 3, 1)]
)
@pytest.mark.parametrize("dtype", native.DTYPE)
def test_contributions_of_any_codec_are_averaged_in_order(
    contributors, scaled, divisor, coef, dtype
):
    bucket = Coded(MIX, contributors, dtype)
    scales = [1.0 + 0.37 * i for i in range(contributors)] if scaled else []
    bucket.job.scales, bucket.job.divisor, bucket.job.coef = scales, divisor, coef
    expected = average(bucket.values, scales, divisor=divisor, coef=coef)
    results = [bucket.reduced(isa, threads) for isa in ISAS for threads in (1, 2)]
    np.testing.assert_array_equal(results[0], expected)
    assert len({result.tobytes() for result in results}) == 1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_every_codec_is_averaged_at_every_size(case, isa):
    for n in (1, 15, 127, 128, 129, 4095, 4097):
        bucket = Coded([(case, n), (case, 40)], 3)
        bucket.job.divisor = 3
        np.testing.assert_array_equal(
            bucket.reduced(isa), average(bucket.values, divisor=3), err_msg=str(n)
        )


@pytest.mark.parametrize("dtype", native.DTYPE)
@pytest.mark.parametrize("isa", ISAS)
def test_the_rule_sees_what_reduce_shows(isa, dtype):
    bucket = Coded(MIX, 3, dtype, rule="sgd")
    job = bucket.job
    job.hypers = np.array([[0.1, 0, 0, 0, 0, 0]])
    job.state_ptrs = [0]
    job.divisor, job.coef, job.scales = 3, 0.5, [1.0, 0.5, 2.0]
    gradient = bucket.reduced(isa)
    before = bucket.master.values.copy()
    pool = native.Pool(2)
    native.apply(pool, [job], isa)
    expected = before.copy()
    for place in bucket.pieces:
        expected[place] -= f32(0.1) * gradient[place]
    np.testing.assert_array_equal(bucket.master.values, expected)
    sums = {native.norm_sq(pool, [job], i) for i in ISAS}
    assert len(sums) == 1
    inside = np.concatenate([gradient[place] for place in bucket.pieces]).astype(np.float64)
    assert sums.pop() == pytest.approx(float(inside @ inside), rel=1e-12)


def test_a_parameter_that_takes_no_part_is_left_out():
    bucket = Coded(MIX, 2)
    bucket.job.steps[2] = 0
    out = bucket.reduced()
    assert not out[bucket.pieces[2]].any()
    assert out[bucket.pieces[3]].any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_any_bytes_in_a_slot_are_safe(case, isa):
    rng = np.random.default_rng(1)
    for n in (1, 130, 9000):
        bucket = Coded([(case, n)], 2)
        for slot, _ in bucket.slots:
            slot.values[:] = rng.integers(0, 256, len(slot.values))
        bucket.reduced(isa)


def test_delay_compensation_reads_weights_not_codes():
    bucket = Coded([(Case("int8"), 5000)], 1, rule="sgd")
    base = Block(np.random.default_rng(2).standard_normal(bucket.count).astype(f32))
    bucket.job.hypers, bucket.job.state_ptrs = np.array([[0.1, 0, 0, 0, 0, 0]]), [0]
    bucket.job.dc_lambda, bucket.job.base_ptr = 0.04, base.address
    dc = (0.04, bucket.published.values, base.values)
    expected = average(bucket.values, dc=dc)[:5000]
    np.testing.assert_array_equal(bucket.reduced()[:5000], expected)


def test_codecs_is_the_table_of_the_format():
    assert list(native.KIND.items()) == [
        *zip(("none", "fp16", "bf16", "fp8", "int8"), range(5), strict=True),
        *zip(("int4", "onebit", "ternary", "topk", "randk"), range(5, 10), strict=True),
    ]
    assert native.CODEC.itemsize == 24
    assert codecs.codec("int8")["kind"] == 4
