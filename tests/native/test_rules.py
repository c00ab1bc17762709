"""Every rule's kernel against NumPy, bit for bit, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest

from tests.native.oracle import ISAS, ORACLES, SIZES, Bucket, average, loaded, stored
from zps import native
from zps.optim.registry import rule

# Each option switched on alone or with what it needs; test_torch_parity covers the whole grid.
CASES = [
    ("sgd", {"lr": 0.1}),
    ("sgd", {"lr": 0.1, "weight_decay": 0.01, "maximize": True}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("adam", {"lr": 0.01}),
    ("adam", {"lr": 0.01, "betas": (0.3, 0.9), "weight_decay": 0.1, "maximize": True}),
    ("adam", {"lr": 0.01, "amsgrad": True, "eps": 1e-3}),
    ("adamw", {"lr": 0.01, "weight_decay": 0.1}),
    ("adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    ("adagrad", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    ("rmsprop", {"lr": 0.01}),
    ("rmsprop", {"lr": 0.01, "centered": True, "weight_decay": 0.1}),
    ("rmsprop", {"lr": 0.01, "centered": True, "momentum": 0.9, "maximize": True}),
    ("lion", {"lr": 0.01, "weight_decay": 0.1}),
]
IDS = [f"{name}-{'-'.join(options)}" for name, options in CASES]
STEPS = 3


def kernel_name(name):
    return "adam" if name == "adamw" else name


def make_bucket(name, options, n, dtype="float32", seed=0, **more):
    rng = np.random.default_rng(seed)
    chosen = rule(name)
    used, initial = chosen.state_used(options), chosen.initial(options)
    states = [np.full(n, initial[s], np.float32) if s in used else None for s in chosen.states]
    slots = [rng.standard_normal(n).astype(np.float32) for _ in range(2)]
    weights = rng.standard_normal(n).astype(np.float32)
    bucket = Bucket(kernel_name(name), weights, slots, dtype, states, **more)
    bucket.job.hypers = chosen.pack([options])
    bucket.job.divisor = 2
    return bucket


def run(name, options, n, isa=None, threads=2, dtype="float32"):
    bucket = make_bucket(name, options, n, dtype)
    pool = native.Pool(threads)
    for step in range(1, STEPS + 1):
        bucket.job.steps = np.array([step], np.int64)
        native.apply(pool, [bucket.job], isa)
    pool.close()
    bucket.check_guards()
    return bucket


def expect(name, options, n, dtype="float32"):
    """The oracle's weights and states after the same steps."""
    bucket = make_bucket(name, options, n, dtype)
    chosen = rule(name)
    slots = [loaded(block.values, dtype) for block in bucket.slot_blocks]
    full = chosen.group.model_validate(options).model_dump()
    weights = bucket.weights.copy()
    states = {s: b.values for s, b in zip(chosen.states, bucket.state_blocks, strict=True) if b}
    grad = average(slots, divisor=2)
    for step in range(1, STEPS + 1):
        ORACLES[kernel_name(name)](weights, grad, states, step, **full)
    return weights, states


def check(bucket, expected, states):
    np.testing.assert_array_equal(bucket.master.values, expected)
    names = native.RULES[bucket.kernel].states
    for state, block in zip(names, bucket.state_blocks, strict=True):
        if block is not None:
            np.testing.assert_array_equal(block.values, states[state], err_msg=state)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_three_steps_equal_numpy_bit_for_bit(name, options, isa, n):
    check(run(name, options, n, isa), *expect(name, options, n))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_narrow_weights_follow_their_float32_master(name, options, dtype, isa):
    n = native.TILE + 33
    bucket = run(name, options, n, isa, dtype=dtype)
    check(bucket, *expect(name, options, n, dtype))
    np.testing.assert_array_equal(bucket.published.values, stored(bucket.master.values, dtype))


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_the_number_of_threads_does_not_change_a_bit(name, options):
    n = 20 * native.TILE + 7
    one, two, three = (run(name, options, n, threads=threads) for threads in (1, 2, 3))
    for other in (two, three):
        np.testing.assert_array_equal(one.master.values, other.master.values)
        for mine, theirs in zip(one.state_blocks, other.state_blocks, strict=True):
            if mine is not None:
                np.testing.assert_array_equal(mine.values, theirs.values)


@pytest.mark.parametrize("isa", ISAS)
def test_builtin_rules(isa):
    a, b = np.float32([1, 2, 3]), np.float32([10, 20, 30])
    results = {}
    for name in ("sum", "mean", "assign", "add"):
        bucket = Bucket(name, np.float32([100, 100, 100]), [a, b])
        bucket.job.scales = [0.5, 2.0]
        bucket.job.divisor = 2.5
        native.apply(native.Pool(1), [bucket.job], isa)
        results[name] = bucket.master.values
    total = np.float32(0.5) * a + np.float32(2) * b
    np.testing.assert_array_equal(results["sum"], total)
    np.testing.assert_array_equal(results["mean"], total / np.float32(2.5))
    np.testing.assert_array_equal(results["assign"], a)
    np.testing.assert_array_equal(results["add"], total + np.float32(100))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scales": [0.3]},
        {"divisor": 3.0},
        {"divisor": 4.0},
        {"coef": 0.7},
        {"dc_lambda": 0.1},
    ],
)
def test_a_lone_contribution_is_scaled_divided_clipped_and_compensated_too(changes, isa):
    n = native.TILE + 5
    weights, slot, base = np.random.default_rng(5).standard_normal((3, n)).astype(np.float32)
    bucket = Bucket("sgd", weights, [slot], states=[None])
    bucket.job.hypers = rule("sgd").pack([{"lr": 1.0}])
    for name, value in changes.items():
        setattr(bucket.job, name, value)
    dc = None
    if "dc_lambda" in changes:
        bucket.job.base_ptr = base.ctypes.data
        dc = (changes["dc_lambda"], weights, base)
    options = {name: value for name, value in changes.items() if name != "dc_lambda"}
    expected = weights - average([slot], **options, dc=dc)
    native.apply(native.Pool(1), [bucket.job], isa)
    np.testing.assert_array_equal(bucket.master.values, expected)


def test_each_segment_has_its_own_group_and_step():
    n, options = 96, [{"lr": 0.1, "momentum": 0.9}, {"lr": 0.5, "weight_decay": 0.1}]
    segments = [(0, 30, 1, 0), (32, 20, 0, 1), (64, 32, 0, 2)]
    bucket = make_bucket("sgd", options[0], n, segments=segments)
    before, momentum = bucket.weights.copy(), np.full(n, 0.25, np.float32)
    bucket.state_blocks[0].values[:] = momentum
    bucket.job.hypers = rule("sgd").pack(options)
    bucket.job.steps = np.array([1, 1, 8], np.int64)
    native.apply(native.Pool(1), [bucket.job])

    grad = average(bucket.slots, divisor=2)
    expected = before.copy()
    for (begin, count, group, _), step in zip(segments, (1, 1, 8), strict=True):
        part = slice(begin, begin + count)
        full = rule("sgd").group.model_validate(options[group]).model_dump()
        state = {"momentum_buffer": momentum[part]}
        ORACLES["sgd"](expected[part], grad[part], state, step, **full)
    np.testing.assert_array_equal(bucket.master.values, expected)
    np.testing.assert_array_equal(bucket.state_blocks[0].values, momentum)


def test_a_parameter_at_step_0_keeps_weights_and_state():
    bucket = make_bucket("adam", {}, 64, segments=[(0, 32, 0, 0), (32, 32, 0, 1)])
    before = bucket.weights.copy()
    bucket.job.steps = np.array([0, 1], np.int64)
    native.apply(native.Pool(1), [bucket.job])
    np.testing.assert_array_equal(bucket.master.values[:32], before[:32])
    assert (bucket.master.values[32:] != before[32:]).all()
    assert not bucket.state_blocks[0].values[:32].any()
    assert bucket.state_blocks[0].values[32:].all()


@pytest.mark.parametrize("name", ["sgd", "adam", "adagrad", "rmsprop", "lion"])
def test_the_learning_rate_factor_scales_lr(name):
    scaled, plain = (make_bucket(name, {"lr": lr}, 100) for lr in (0.4, 0.1))
    scaled.job.lr_factor = 0.25
    pool = native.Pool(1)
    native.apply(pool, [scaled.job, plain.job])
    np.testing.assert_array_equal(scaled.master.values, plain.master.values)


def test_amsgrad_keeps_a_nan():
    bucket = make_bucket("adam", {"amsgrad": True}, 16)
    bucket.state_blocks[2].values[3] = np.nan
    bucket.slot_blocks[0].values[5] = np.nan
    native.apply(native.Pool(1), [bucket.job])
    assert np.isnan(bucket.state_blocks[2].values[[3, 5]]).all()


def test_many_jobs_of_many_sizes_in_one_call():
    options = {"lr": 0.1, "momentum": 0.9}
    buckets = [make_bucket("sgd", options, n, seed=n) for n in (*SIZES, *range(300, 340))]
    native.apply(native.Pool(3), [bucket.job for bucket in buckets])
    for bucket in buckets:
        expected, state = bucket.weights.copy(), {"momentum_buffer": np.zeros_like(bucket.weights)}
        full = rule("sgd").group.model_validate(options).model_dump()
        ORACLES["sgd"](expected, average(bucket.slots, divisor=2), state, 1, **full)
        np.testing.assert_array_equal(bucket.master.values, expected)
        bucket.check_guards()
