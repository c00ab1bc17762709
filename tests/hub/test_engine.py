"""The engine in one process: which pushes become which updates, and who is told."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest

from tests.hub.bench import SIZES, Bench
from zps.errors import OutOfMemory, ProtocolError
from zps.hub.store import Update
from zps.memory.control import Outcome

APPLIED, STALE, SKIPPED = Outcome.APPLIED, Outcome.STALE, Outcome.SKIPPED


def same(value: float) -> dict[str, float]:
    return dict.fromkeys(SIZES, value)


# --- rounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "expected"), [("sum", 7.0), ("mean", 7 / 3), ("assign", 1.0), ("add", 107.0)]
)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_bucket_is_applied_when_all_have_pushed_it(rule, expected, order):
    bench = Bench(rule)
    for name in SIZES:
        bench.fill(bench.store.weights.bytes, name, 100.0)
    for rank in order[:2]:
        bench.push(rank, float(1 << rank))
        assert bench.values() == same(100.0)
    bench.push(order[2], float(1 << order[2]))
    assert bench.values() == pytest.approx(same(expected))
    assert bench.versions() == [1] * 4


def test_buckets_close_one_by_one():
    bench = Bench("add")
    bench.push(0)
    bench.push(1)
    third = bench.push(2, buckets=[0, 3])
    assert bench.versions() == [1, 0, 0, 1]
    assert bench.outcomes(third) == [APPLIED, None, None, APPLIED]
    assert bench.engine.waiting_for() == (2,)


def test_every_contributor_is_told_and_all_are_woken_once():
    bench = Bench()
    before = bench.signal()
    pushes = [bench.push(rank, flush=False) for rank in range(3)]
    assert bench.signal() == before
    assert [bench.outcomes(push) for push in pushes] == [[None] * 4] * 3
    bench.engine.flush()
    assert [bench.outcomes(push) for push in pushes] == [[APPLIED] * 4] * 3
    assert bench.signal() == before + 1
    bench.engine.flush()
    assert bench.signal() == before + 1  # nothing happened


def test_updates_of_one_bucket_that_arrive_together_follow_one_another():
    bench = Bench("sgd", [{"lr": 1.0, "momentum": 0.5}], mode="async")
    for round_ in range(4):
        for rank in range(3):
            bench.push(rank, 1.0, round=round_, flush=False)
    bench.engine.flush()
    weight = momentum = 0.0
    for _ in range(12):
        momentum = 0.5 * momentum + 1
        weight -= momentum
    assert bench.values() == pytest.approx(same(weight))
    assert bench.versions() == [12] * 4


def test_a_push_that_comes_again_counts_once():
    bench = Bench("add")
    bench.push(0)
    again = bench.push(0, 50.0, seq=1)  # what lies in the slot is of no interest
    assert bench.outcomes(again) == [Outcome.DUPLICATE] * 4
    assert bench.engine.counters["dropped_duplicate"] == 4


def test_a_slot_is_busy_until_its_push_is_consumed():
    bench = Bench("add")
    bench.push(0)
    assert all(bench.engine.slot_busy(1, bucket) for bucket in bench.buckets)
    assert not bench.engine.slot_busy(2, 0)
    bench.push(1)
    bench.push(2, buckets=[1])
    assert [bench.engine.slot_busy(1, bucket) for bucket in bench.buckets] == [True, False] + [
        True
    ] * 2


def test_a_push_that_runs_away_leaves_nothing():
    bench = Bench("add")
    with pytest.raises(ProtocolError):
        bench.push(0, round=1000)
    with pytest.raises(ProtocolError):
        bench.push(0, base=1)
    assert not bench.engine.slot_busy(1, 0)
    for rank in range(3):
        bench.push(rank)
    assert bench.values() == same(3.0)


def test_updates_that_are_handed_over_end_when_they_are_finished():
    handed: list[Update] = []
    bench = Bench("add", hand_over=handed.extend, max_grad_norm=1.0)
    pushes = [bench.push(rank, hold=True) for rank in range(3)]
    handed.sort(key=lambda update: update.bucket)
    assert [update.bucket for update in handed] == [0, 1, 2, 3]  # judged by whoever got them
    assert [len(update.contributions) for update in handed] == [3] * 4
    assert bench.values() == same(0.0)
    bench.engine.flush()
    assert [bench.outcomes(push) for push in pushes] == [[None] * 4] * 3
    assert bench.engine.slot_busy(1, 2)
    bench.engine.finish([handed[2]], SKIPPED)
    bench.engine.flush()
    assert [bench.outcomes(push) for push in pushes] == [[None, None, SKIPPED, None]] * 3
    assert not bench.engine.slot_busy(1, 2)
    assert bench.control.closed.tolist() == [0, 0, 1, 0]


# --- leaving ------------------------------------------------------------------------------------


def test_what_a_leaver_pushed_counts_and_the_divisor_follows():
    bench = Bench("mean")
    bench.push(2, 7.0, buckets=[0])
    bench.push(0)
    bench.push(1)
    bench.engine.leave(2)
    bench.engine.flush()
    assert bench.values() == {"a": 3.0, "b": 1.0, "c": 1.0}
    assert bench.versions() == [1] * 4


def test_the_memory_of_a_leaver_is_read_after_it_is_gone():
    bench = Bench("add", members=(0, 1))
    bench.push(1, 5.0, buckets=[0])
    bench.slots[1] = np.zeros(1, np.uint8)  # nobody else holds it now
    bench.engine.leave(1)
    bench.push(0)
    assert bench.values() == {"a": 6.0, "b": 1.0, "c": 1.0}


def test_a_round_held_back_is_judged_by_what_is_left_when_its_last_member_leaves():
    bench = Bench("add", members=(0,))
    half = bench.push(0, buckets=[0, 1], hold=True)
    assert bench.versions() == [0] * 4
    bench.engine.leave(0)
    bench.engine.flush()
    assert bench.outcomes(half)[:2] == [APPLIED] * 2
    assert bench.values() == {"a": 1.0, "b": 1.0, "c": 0.0}
    assert bench.versions() == bench.engine.rounds.versions == [1, 1, 0, 0]
    bench.engine.join(0)
    bench.push(0, round=1)
    assert bench.values() == {"a": 2.0, "b": 2.0, "c": 1.0}


@pytest.mark.parametrize("mode", ["ssp", "async"])
def test_out_of_step_what_a_leaver_held_back_is_dropped(mode):
    bench = Bench("add", mode=mode)
    bench.push(0, buckets=[0, 1], hold=True)
    bench.engine.leave(0)
    bench.push(1)
    assert bench.values() == same(1.0)
    assert bench.versions() == bench.engine.rounds.versions == [2, 2, 1, 1]


# --- verdicts on whole rounds -------------------------------------------------------------------


def test_a_round_on_hold_waits_for_its_last_bucket():
    bench = Bench("add")
    for rank in range(2):
        bench.push(rank, hold=True)
    bench.push(2, buckets=[0, 1, 2], hold=True)
    assert bench.values() == same(0.0)
    assert bench.versions() == [0] * 4
    bench.push(2, buckets=[3], hold=True)
    assert bench.values() == same(3.0)
    assert bench.versions() == [1] * 4


@pytest.mark.parametrize("first", [[0], [1, 2, 3]], ids=["held first", "held last"])
def test_who_asked_for_a_round_to_be_held_need_not_be_in_all_of_it(first):
    """quorum: another two of three may close each bucket."""
    bench = Bench("add", quorum=0.5)
    rest = [bucket for bucket in bench.buckets if bucket not in first]
    holds = 0 in first
    pushes = [bench.push(rank, buckets=first, hold=holds) for rank in (0, 1)]
    pushes += [bench.push(rank, buckets=rest, hold=not holds) for rank in (1, 2)]
    for pushed, buckets in zip(pushes, (first, first, rest, rest), strict=True):
        assert [bench.outcomes(pushed)[bucket] for bucket in buckets] == [APPLIED] * len(buckets)
    assert bench.values() == same(2.0)


def test_a_round_on_hold_ends_though_who_asked_for_it_died_on_the_way():
    bench = Bench("add")
    bench.push(0, buckets=[0, 1], hold=True)
    bench.engine.leave(0)
    bench.push(1)
    bench.push(2, buckets=[2, 3])  # before any bucket of the dead one's is complete
    bench.push(2, buckets=[0, 1])
    assert bench.values() == {"a": 3.0, "b": 3.0, "c": 2.0}
    assert bench.versions() == [1] * 4


def test_one_infinite_gradient_skips_the_round_for_everyone():
    bench = Bench("adam", [{"lr": 0.1}])
    pushes = [bench.push(rank, 1.0, hold=True, finite=rank != 1) for rank in range(3)]
    assert [bench.outcomes(push) for push in pushes] == [[SKIPPED] * 4] * 3
    assert bench.values() == same(0.0)
    assert bench.steps() == dict.fromkeys(SIZES, 0)
    assert bench.versions() == [1] * 4
    assert bench.engine.counters["rounds_skipped"] == 1
    pushes = [bench.push(rank, 1.0, round=1, hold=True) for rank in range(3)]
    assert [bench.outcomes(push) for push in pushes] == [[APPLIED] * 4] * 3
    assert bench.values() == pytest.approx(same(-0.1))
    assert bench.steps() == dict.fromkeys(SIZES, 1)


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_the_averaged_gradient_is_clipped_by_its_global_norm(limit):
    bench = Bench("sgd", [{"lr": 1.0}], max_grad_norm=limit)
    random = np.random.default_rng(1)
    gradients = [
        {name: random.normal(size=size).astype(np.float32) for name, size in SIZES.items()}
        for _ in range(3)
    ]
    for rank, gradient in enumerate(gradients):
        bench.push(rank, gradient)
    mean = {name: np.mean([g[name] for g in gradients], axis=0) for name in SIZES}
    norm = np.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in mean.values()))
    coef = min(1.0, limit / (norm + 1e-6))
    assert (coef == 1.0) == (limit == 1e6)
    for name in SIZES:
        np.testing.assert_allclose(bench.weights(name), -coef * mean[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_of_remote_gradients_on_hold_the_average_is_kept_and_not_they(dtype):
    groups = [{"lr": 0.25, "momentum": 0.5}]
    options: dict[str, Any] = {"dtype": dtype, "max_grad_norm": 3.0}
    remote, local = (Bench("sgd", groups, **options) for _ in range(2))
    random = np.random.default_rng(2)
    for round_ in range(3):
        gradients = [
            {name: random.normal(size=size) for name, size in SIZES.items()} for _ in range(3)
        ]
        for bucket in remote.buckets:
            for rank, gradient in enumerate(gradients):
                remote.slots[rank] = remote.slots[rank].copy()
                came = weakref.ref(remote.slots[rank])
                push: dict[str, Any] = {"round": round_, "buckets": [bucket], "samples": rank + 1.0}
                remote.push(rank, gradient, remote=True, **push)
                local.push(rank, gradient, **push)
                remote.slots[rank] = np.empty_like(remote.slots[rank])
            if bucket != remote.buckets[-1]:
                gone = {(pushed.rank, held) for pushed, held in remote.engine.released}
                assert gone >= {(rank, bucket) for rank in range(3)}
                remote.engine.released.clear()
                assert came() is None
        for name in SIZES:
            np.testing.assert_array_equal(remote.weights(name), local.weights(name))
    assert remote.versions() == local.versions() == [3] * len(remote.buckets)


def test_a_remote_worker_is_refused_where_there_is_no_memory_for_the_average(monkeypatch):
    def nothing(*_: object) -> None:
        raise OutOfMemory("full")

    clipped, plain = Bench("sgd", [{"lr": 1.0}], max_grad_norm=1.0), Bench()
    monkeypatch.setattr("zps.hub.store.private_floats", nothing)
    for bench, hold in ((clipped, False), (plain, True)):
        with pytest.raises(OutOfMemory):
            bench.engine.expect_remote(bench.hypers, hold=hold)
    plain.engine.expect_remote(plain.hypers)  # nothing of it will be on hold


def test_a_norm_that_is_infinite_skips_the_round():
    bench = Bench("sgd", [{"lr": 1.0}], max_grad_norm=1.0)
    pushes = [bench.push(rank, float("inf")) for rank in range(3)]
    assert [bench.outcomes(push) for push in pushes] == [[SKIPPED] * 4] * 3
    assert bench.values() == same(0.0)


def test_out_of_step_each_workers_round_has_a_verdict_of_its_own():
    bench = Bench("add", mode="async")
    bad = bench.push(0, hold=True, finite=False)
    good = bench.push(1, hold=True)
    assert bench.outcomes(bad) == [SKIPPED] * 4
    assert bench.outcomes(good) == [APPLIED] * 4
    assert bench.values() == same(1.0)
    assert bench.versions() == [2] * 4


# --- weights of contributions -------------------------------------------------------------------


def test_a_mean_is_weighted_by_samples():
    bench = Bench("mean")
    for rank, samples in enumerate([1.0, 2.0, 5.0]):
        bench.push(rank, float(rank), samples=samples)
    assert bench.values() == pytest.approx(same((0 * 1 + 1 * 2 + 2 * 5) / 8))


def test_who_has_no_samples_is_not_read():
    bench = Bench("mean")
    bench.push(0, float("nan"), samples=0.0)
    bench.push(1, 3.0)
    bench.push(2, 5.0)
    assert bench.values() == same(4.0)


def test_a_round_without_samples_changes_nothing_but_its_version():
    bench = Bench("sgd", [{"lr": 1.0, "weight_decay": 0.5}])
    bench.fill(bench.store.weights.bytes, "a", 4.0)
    pushes = [bench.push(rank, samples=0.0) for rank in range(3)]
    assert bench.values() == {"a": 4.0, "b": 0.0, "c": 0.0}
    assert bench.versions() == [1] * 4
    assert bench.steps() == dict.fromkeys(SIZES, 0)
    assert bench.outcomes(pushes[0]) == [APPLIED] * 4


def test_what_the_loss_was_multiplied_by_is_divided_out():
    bench = Bench("mean")
    for rank, scale in enumerate([1.0, 1024.0, 65536.0]):
        bench.push(rank, 3.0 * scale, grad_scale=scale)
    assert bench.values() == same(3.0)


def test_a_parameter_that_is_absent_everywhere_is_left_alone():
    options = {"lr": 1.0, "weight_decay": 0.5, "momentum": 0.9}
    bench = Bench("sgd", [options])
    for name in SIZES:
        bench.fill(bench.store.weights.bytes, name, 4.0)
    for rank in range(3):
        bench.push(rank, 0.0, absent=frozenset({bench.layout.index["b"]}))
    assert bench.values() == {"a": 2.0, "b": 4.0, "c": 2.0}  # no decay
    assert bench.steps() == {"a": 1, "b": 0, "c": 1}
    assert bench.versions() == [1] * 4
    for rank in range(3):
        bench.push(rank, 1.0, round=1)
    # The first gradient of `b` is the whole momentum, as it would be for a new parameter.
    assert bench.weights("b")[0] == 4.0 - (0.5 * 4.0 + 1.0)
    assert bench.steps() == {"a": 2, "b": 1, "c": 2}


def test_a_parameter_that_one_worker_has_is_updated():
    bench = Bench("mean")
    everywhere = frozenset(range(len(SIZES)))
    bench.push(0, 0.0, absent=everywhere)
    bench.push(1, 6.0)
    bench.push(2, 0.0, absent=everywhere)
    assert bench.values() == same(2.0)


# --- hyperparameters ----------------------------------------------------------------------------


def test_a_round_uses_the_hyperparameters_of_its_lowest_rank():
    bench = Bench("sgd", [{"lr": 1.0}])
    for rank in (2, 1, 0):
        bench.push(rank, 1.0, hypers=bench.hypers_of({"lr": 10.0 ** -(rank + 1)}))
    assert bench.values() == pytest.approx(same(-0.1))


def test_groups_have_hyperparameters_of_their_own():
    bench = Bench("sgd", [{"lr": 1.0}, {"lr": 0.5}])  # a and c; b
    for rank in range(3):
        bench.push(rank)
    assert bench.values() == {"a": -1.0, "b": -0.5, "c": -1.0}


# --- staleness ----------------------------------------------------------------------------------


def test_a_stale_gradient_has_a_smaller_rate_under_inverse():
    bench = Bench("sgd", [{"lr": 1.0}], mode="async", staleness_policy="inverse", alpha=0.5)
    for rank in range(3):
        bench.push(rank, base=0)
    expected = -sum(1 / (1 + 0.5 * staleness) for staleness in range(3))
    assert bench.values() == pytest.approx(same(expected))
    assert bench.engine.counters["staleness_max"] == 2


def test_a_stale_gradient_over_the_limit_is_dropped():
    bench = Bench("add", mode="async", staleness_policy="drop", staleness=1)
    pushes = [bench.push(rank, base=0) for rank in range(3)]
    assert [bench.outcomes(push) for push in pushes] == [[APPLIED] * 4] * 2 + [[STALE] * 4]
    assert bench.values() == same(2.0)
    assert bench.versions() == [2] * 4
    assert bench.engine.counters["dropped_stale"] == 4
    bench.push(2, round=1)
    assert bench.values() == same(3.0)


def test_a_stale_gradient_is_compensated_under_dc():
    bench = Bench(
        "sgd",
        [{"lr": 0.5}],
        mode="async",
        staleness_policy="dc",
        dc_lambda=0.25,
        keeps_base=True,
    )
    for slots in bench.slots:  # what the gradient was computed on: zeros, version 0
        slots[bench.layout.arena_bytes :] = 0
    bench.push(0, 4.0, base=0)
    assert bench.values() == same(-2.0)
    bench.push(1, 3.0, base=0)
    compensated = 3.0 + 0.25 * 3.0 * 3.0 * (-2.0 - 0.0)
    assert bench.values() == same(-2.0 - 0.5 * compensated)
    assert bench.versions() == [2] * 4


def test_in_step_nothing_is_stale():
    bench = Bench("sgd", [{"lr": 1.0}], staleness_policy="inverse", alpha=1.0)
    for round_ in range(3):
        for rank in range(3):
            bench.push(rank, round=round_, base=0)
    assert bench.values() == same(-3.0)


# --- random -------------------------------------------------------------------------------------


def test_a_long_run_leaves_no_state_behind():
    """What is kept for open rounds goes with them."""
    bench = Bench("add")
    for round_ in range(50):
        for rank in range(3):
            bench.push(rank, round=round_, hold=round_ % 3 == 0)
    assert bench.values() == same(150.0)
    assert not bench.engine._waiting
    assert not bench.engine._busy
    assert not bench.engine._held
