from __future__ import annotations

import numpy as np
import pytest

from zps.codec.plan import Plan
from zps.codec.spec import Compression
from zps.core.layout import Layout, Param
from zps.errors import ProtocolError
from zps.memory.cast import from_float32, to_float32
from zps.memory.deltas import Deltas

PARAMS = {"a": 3000, "b": 7, "empty": 0, "c": 500}
TEXTS = ["int8", "fp16", "bf16", "fp8", "int4:block=32", "int8:rounding=stochastic; b=none"]


def made(text: str, dtype: str) -> tuple[Plan, Deltas, Deltas]:
    params = [Param(name, (size,), dtype) for name, size in PARAMS.items()]
    layout = Layout.build(params, bucket_bytes=4096)
    plan = Plan.build(layout, Compression.parse(text, weights=True))
    return plan, Deltas(plan), Deltas(plan)


def arena(plan: Plan, values: np.ndarray) -> np.ndarray:
    """An arena with these values in every bucket."""
    out = np.zeros(plan.layout.total_bytes, np.uint8)
    for bucket in plan.layout.buckets:
        part = np.resize(values, bucket.count).astype(np.float32)
        from_float32(part, bucket.dtype, out[bucket.byte : bucket.byte + bucket.nbytes])
    return out


def floats(plan: Plan, data: np.ndarray) -> np.ndarray:
    """The values of all pieces, one after another."""
    found = []
    size = data.nbytes // sum(bucket.count for bucket in plan.layout.buckets)
    for piece in plan.layout.pieces:
        raw = data[piece.byte : piece.byte + piece.count * size]
        out = np.empty(piece.count, np.float32)
        to_float32(raw, plan.layout.params[piece.param].dtype, out)
        found.append(out)
    return np.concatenate(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("text", TEXTS)
def test_both_ends_hold_the_same_and_come_as_near_as_one_likes(text, dtype):
    plan, sender, receiver = made(text, dtype)
    rng = np.random.default_rng(5)
    values = rng.standard_normal(2048).astype(np.float32)
    sent, held = arena(plan, 0 * values), arena(plan, 0 * values)
    errors = []
    for step in range(8):
        now = arena(plan, values * (1 + 0.1 * min(step, 3)))
        for bucket in range(len(plan.layout.buckets)):
            data = sender.encode(bucket, now, sent)
            assert len(data) == plan.bucket_nbytes[bucket]
            receiver.apply(bucket, data, held)
        assert np.array_equal(floats(plan, held), floats(plan, sent))
        errors.append(np.abs(floats(plan, held) - floats(plan, now)).max())
    resolution = {"float32": 1e-6, "bfloat16": 2e-2, "float16": 3e-3}[dtype]
    assert errors[-1] <= max(errors[0] / 20, resolution), errors


def test_a_parameter_without_a_codec_arrives_as_it_is():
    plan, sender, receiver = made("int4; c=none; b=none", "float32")
    values = np.random.default_rng(6).standard_normal(4096).astype(np.float32)
    now, sent, held = (arena(plan, values * f) for f in (1.0, 0.0, 0.0))
    for bucket in range(len(plan.layout.buckets)):
        receiver.apply(bucket, sender.encode(bucket, now, sent), held)
    for piece in plan.layout.pieces:
        place = slice(piece.byte, piece.byte + 4 * piece.count)
        exact = np.array_equal(held[place], now[place])
        assert exact == (plan.layout.params[piece.param].name != "a" or not piece.count)


def test_what_is_too_short_or_too_long_changes_nothing():
    plan, sender, receiver = made("int8", "float32")
    now = arena(plan, np.ones(64, np.float32))
    sent, held = np.zeros_like(now), np.zeros_like(now)
    data = sender.encode(0, now, sent)
    for wrong in (data[:-1], np.append(data, np.uint8(0))):
        with pytest.raises(ProtocolError, match="weights of bucket 0"):
            receiver.apply(0, wrong, held)
    assert not held.any()


def test_a_difference_that_is_not_finite_is_not_sent_and_forgotten_with_the_next():
    plan, sender, receiver = made("int8", "float32")
    good = arena(plan, np.ones(64, np.float32))
    bad = good.copy()
    bad[:4] = np.frombuffer(np.float32(np.nan).tobytes(), np.uint8)
    sent, held = good.copy(), good.copy()
    assert sender.encode(0, bad, sent) is None
    held[:] = sent  # the values go as they are
    assert sender.encode(0, good, sent) is None
    held[:] = sent
    now = arena(plan, np.full(64, 1.5, np.float32))
    data = sender.encode(0, now, sent)
    assert data is not None
    receiver.apply(0, data, held)
    assert np.allclose(floats(plan, held)[:1024], 1.5, atol=0.01)
