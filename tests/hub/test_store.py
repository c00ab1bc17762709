"""The store: what a hub owns of a model, as bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from tests.hub.bench import SIZES, WORLD, Bench
from zps.errors import OutOfMemory, ProtocolError
from zps.hub.store import Update
from zps.memory import segment

DTYPES = ["float32", "bfloat16", "float16"]


def as_floats(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.float32)


# --- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_published_is_adopted_by_the_masters(dtype):
    bench = Bench("add", dtype=dtype)
    for name in SIZES:
        bench.fill(bench.store.weights.bytes, name, 256.0)
    bench.store.adopt_published()
    assert (as_floats(bench.store.read_master(0))[: SIZES["a"]] == 256).all()
    for round_ in range(3):
        for rank in range(3):
            bench.push(rank, round=round_)
    # In bfloat16 256 + 1 is 256; the masters have counted on.
    assert bench.values() == dict.fromkeys(SIZES, 265.0 if dtype != "bfloat16" else 264.0)
    assert (as_floats(bench.store.read_master(0))[: SIZES["a"]] == 265).all()


def test_the_versions_of_readers_rise_with_every_application():
    bench = Bench()
    for round_ in range(3):
        for rank in range(3):
            bench.push(rank, round=round_)
        assert bench.versions() == [round_ + 1] * 4
    bench.store.touch(1)
    assert bench.versions() == [3, 4, 3, 3]


def test_a_bucket_that_is_not_there_cannot_be_read():
    with pytest.raises(ProtocolError, match="no bucket 4; there are 4"):
        Bench().store.read_master(4)


# --- optimizer state ----------------------------------------------------------------------------


def test_state_is_read_and_written_bucket_by_bucket():
    bench = Bench("sgd", [{"lr": 1.0, "momentum": 0.5}])
    for rank in range(3):
        bench.push(rank, 2.0)
    buffers = [as_floats(bench.store.read_state("momentum_buffer", b)) for b in bench.buckets]
    assert [len(buffer) for buffer in buffers] == [b.count for b in bench.layout.buckets]
    assert (buffers[0][: SIZES["a"]] == 2).all()
    bench.store.write_state("momentum_buffer", 0, np.full_like(buffers[0], 8).tobytes())
    for rank in range(3):
        bench.push(rank, 2.0, round=1)
    assert bench.values() == {"a": -2 - (0.5 * 8 + 2), "b": -2 - 3.0, "c": -2 - 3.0}


@pytest.mark.parametrize(
    ("name", "bucket", "length", "text"),
    [
        ("exp_avg", 0, 64, "no optimizer state 'exp_avg'; this rule has ['momentum_buffer']"),
        ("momentum_buffer", 4, 64, "no bucket 4"),
        ("momentum_buffer", 0, 60, "60 bytes came, 64 expected"),
        ("momentum_buffer", 0, 0, "0 bytes came"),
        ("momentum_buffer", 0, 68, "68 bytes came"),
    ],
)
def test_state_that_does_not_fit_is_refused(name, bucket, length, text):
    bench = Bench("sgd", [{"lr": 1.0, "momentum": 0.5}])
    with pytest.raises(ProtocolError) as caught:
        bench.store.write_state(name, bucket, bytes(length))
    assert text in str(caught.value)


def test_a_state_begins_when_an_option_first_needs_it():
    bench = Bench("sgd", [{"lr": 1.0}])
    with pytest.raises(ProtocolError, match="is not in use"):
        bench.store.read_state("momentum_buffer", 0)
    hypers = bench.hypers_of({"lr": 1.0, "momentum": 0.5})
    bench.store.ensure_state(hypers)
    for round_ in range(2):
        for rank in range(3):
            bench.push(rank, 1.0, round=round_, hypers=hypers)
    assert bench.values() == dict.fromkeys(SIZES, -1.0 - 1.5)


def test_a_state_that_begins_at_a_value_of_its_own_does():
    bench = Bench("adagrad", [{"lr": 1.0, "initial_accumulator_value": 0.25}])
    state = as_floats(bench.store.read_state("sum", 0))
    assert (state[: SIZES["a"]] == 0.25).all()


def test_step_counts_are_set_for_every_piece():
    bench = Bench("adam", [{"lr": 0.1}])
    bench.store.set_steps(np.array([3, 5, 7]))
    assert bench.steps() == {"a": 3, "b": 5, "c": 7}
    for rank in range(3):
        bench.push(rank)
    assert bench.steps() == {"a": 4, "b": 6, "c": 8}


@pytest.mark.parametrize("steps", [[1, 2], [1, 2, 3, 4], [1, -1, 1], [[1, 2, 3]]])
def test_step_counts_that_are_none_are_refused(steps):
    bench = Bench("adam", [{"lr": 0.1}])
    with pytest.raises(ProtocolError, match="3 step counts expected"):
        bench.store.set_steps(np.array(steps))
    assert bench.steps() == dict.fromkeys(SIZES, 0)


# --- room ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "dtype", "copies"),
    [("sum", "float32", 0), ("adam", "float32", 2), ("adam", "bfloat16", 3)],
)
def test_all_that_a_shard_will_need_is_asked_for_at_once(monkeypatch, rule, dtype, copies):
    asked: list[int] = []
    monkeypatch.setattr("zps.hub.store.ensure_available", lambda nbytes, _: asked.append(nbytes))
    layout = Bench(rule, dtype=dtype).layout
    assert asked == [layout.total_bytes + 4 * layout.flat_elements * copies]


def test_a_shard_that_does_not_fit_is_refused_before_anything_is_allocated(monkeypatch):
    def refuse(nbytes: int, what: str) -> None:
        monkeypatch.setattr(segment, "available_bytes", lambda: pytest.fail("too late"))
        raise OutOfMemory(f"{what}: {nbytes}")

    monkeypatch.setattr("zps.hub.store.ensure_available", refuse)
    with pytest.raises(OutOfMemory, match="this shard"):
        Bench("adam")


# --- foreign rules ------------------------------------------------------------------------------


class Recorder:
    """A foreign rule that subtracts the gradient and writes down what it was told."""

    def __init__(
        self,
        masters: list[np.ndarray],
        gradients: list[np.ndarray],
        group_of: list[int],
        groups: Sequence[Mapping[str, Any]],
    ):
        self.masters, self.gradients = masters, gradients
        self.group_of = group_of
        self.calls: list[tuple[list[int], list[float]]] = []
        self.state = dict.fromkeys(range(len(masters)), b"")

    def step(self, present: Sequence[int], groups: Sequence[Mapping[str, Any]]) -> None:
        self.calls.append((list(present), [group["lr"] for group in groups]))
        for param in present:
            self.masters[param] -= groups[self.group_of[param]]["lr"] * self.gradients[param]

    def export_state(self, param: int) -> bytes:
        return self.state[param]

    def import_state(self, param: int, data: bytes) -> None:
        self.state[param] = data


def foreign(**options: Any) -> tuple[Bench, Recorder]:
    made: list[Recorder] = []

    def factory(*args: Any) -> Recorder:
        made.append(Recorder(*args))
        return made[0]

    return Bench(factory, [{"lr": 1.0}, {"lr": 0.5}], **options), made[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_foreign_rule_steps_on_views_of_the_shard(dtype):
    bench, _ = foreign(dtype=dtype)
    for rank in range(3):
        bench.push(rank, float(rank))
    assert bench.values() == {"a": -1.0, "b": -0.5, "c": -1.0}
    assert bench.versions() == [1] * len(bench.buckets)
    assert bench.steps() == dict.fromkeys(SIZES, 1)


def test_a_foreign_rule_steps_once_a_round_over_all_that_have_a_gradient():
    bench, rule = foreign(fuse=True)
    for rank in range(3):
        bench.push(rank, absent=frozenset({1}))
    assert rule.calls == [([0, 2], [1.0, 0.5])]
    assert bench.values() == {"a": -1.0, "b": 0.0, "c": -1.0}


def test_a_foreign_rule_is_told_the_rate_that_staleness_leaves():
    bench, rule = foreign(fuse=True, mode="async", staleness_policy="inverse", alpha=1.0)
    bench.push(0, base=0)
    bench.push(1, base=0)
    assert [rates for _, rates in rule.calls] == [[1.0, 0.5], [0.5, 0.25]]


def test_a_foreign_rules_state_goes_through_as_it_is():
    bench, _ = foreign()
    bench.store.write_foreign(1, b"xyz")
    assert bench.store.read_foreign(1) == b"xyz"
    for param in (-1, 3):
        with pytest.raises(ProtocolError, match="no state of a foreign rule"):
            bench.store.read_foreign(param)
    with pytest.raises(ProtocolError, match="this rule has \\[\\]"):
        bench.store.read_state("exp_avg", 0)


def test_an_average_that_waits_is_not_overwritten_by_the_next_round():
    bench = Bench("add")
    pushed = [bench.push(rank, flush=False) for rank in range(WORLD)]
    first, second = (Update(0, round_, tuple(pushed)) for round_ in range(2))
    assert bench.store.accumulate(first)
    assert not bench.store.accumulate(second)
    bench.store.vacate(second)  # which did not lie in it
    assert not bench.store.accumulate(second)
    bench.store.vacate(first)
    assert bench.store.accumulate(second)
