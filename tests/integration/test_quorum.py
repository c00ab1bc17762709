"""quorum below 1: a share of the workers closes a round, and who comes late catches up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import zps
from tests.training.reference import (
    assert_close,
    average,
    gradients,
    new_params,
    set_gradients,
    values,
)
from tests.workers import Context, Crew, together
from zps.memory.control import Outcome

LINKS = ("shm", "message", "tcp")


def test_a_late_gradient_is_dropped_and_counted(crew: Crew):
    hub = crew.hub(quorum=0.5)
    zeros = {"w": torch.zeros(4)}
    with together(hub.address, zeros, "sgd", hypers={"lr": 1.0, "maximize": True}) as workers:
        fast, slow = workers
        for round_ in range(3):
            outcomes = fast.push({"w": torch.full((4,), 10.0**round_)}).wait().outcomes
            assert outcomes == (Outcome.APPLIED,)
            fast.pull()
        # Computed on the weights of round 0, and so a gradient of round 0.
        assert slow.push({"w": torch.full((4,), 5e6)}).wait().outcomes == (Outcome.LATE,)
        slow.pull()
        assert slow.weights("w").tolist() == [111.0] * 4
        assert slow.stats()["counters"]["dropped_late"] == 1
        # It computes on the newest weights now, and takes part in the newest round.
        assert slow.push({"w": torch.full((4,), 1000.0)}).wait().outcomes == (Outcome.APPLIED,)
        slow.pull()
        assert slow.weights("w").tolist() == [1111.0] * 4
        assert fast.push({"w": torch.full((4,), 7e6)}).wait().outcomes == (Outcome.LATE,)


@pytest.mark.parametrize(("quorum", "needed"), [(0.3, 1), (0.34, 2), (0.6, 2), (0.7, 3), (1.0, 3)])
def test_a_round_closes_with_that_share_of_the_workers(crew: Crew, quorum, needed):
    hub = crew.hub(quorum=quorum)
    zeros = {"w": torch.zeros(4)}
    with together(hub.address, zeros, "sum", world=3) as workers:
        works = []
        for count, worker in enumerate(workers[:needed], start=1):
            works.append(worker.push({"w": torch.full((4,), 10.0**worker.rank)}))
            worker.stats()  # the hub has the push when it answers
            workers[0].stats()  # and what it told this one before has come, too
            assert works[0].done() == (count >= needed)
        for work in works:
            assert work.wait().outcomes == (Outcome.APPLIED,)
        workers[0].pull()
        assert workers[0].weights("w").tolist() == [float("111"[-needed:])] * 4


#: What a round that closes as a whole needs two buckets for, of 4096 bytes.
TWO = {"a": torch.zeros(1024), "b": torch.zeros(1024)}
WHOLE = {"lr": 1.0, "max_grad_norm": 1e6, "fuse": True}


def two(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, value) for name, tensor in TWO.items()}


def test_who_falls_behind_goes_on_with_a_whole_gradient_in_one_round(crew: Crew):
    hub = crew.hub(quorum=0.5)
    with together(hub.address, TWO, "sgd", hypers=WHOLE) as (fast, slow):
        for _ in range(3):
            fast.push(two(1.0)).wait()
            fast.pull()
        slow.pull("a")  # it has seen one bucket of the newest round, and pushes both
        assert set(slow.push(two(1.0)).wait().outcomes) == {Outcome.APPLIED}
        slow.pull()
        assert slow.weights("b").tolist() == [-4.0] * 1024


def test_a_round_seen_while_it_closes_is_still_one_round(crew: Crew, monkeypatch):
    """Otherwise all wait: the buckets of that round for one another, and whose they are for them"""
    hub = crew.hub(quorum=0.5)
    with together(hub.address, TWO, "sgd", hypers=WHOLE, link="shm") as (fast, slow):
        fast.push(two(1.0)).wait()
        seen = np.array([1, 0])  # the hub is between its two writes
        monkeypatch.setattr(slow.channels[0].link._control, "closed", seen)
        slow.pull()
        assert slow.push(two(1.0)).wait().outcomes == (Outcome.LATE,) * 2
        seen[:] = 1
        slow.pull()
        assert slow.push(two(1.0)).wait().outcomes == (Outcome.APPLIED,) * 2


def train_with_quorum(ctx: Context, *, overlap: bool) -> Any:
    """Rank 0 trains alone for a while; then rank 1 comes with a gradient of long ago."""
    params = new_params()
    base = torch.optim.SGD(params, lr=0.1)
    worker = ctx.worker()
    opt = zps.Optimizer(base, overlap=overlap, worker=worker)
    assert len(worker.layout.buckets) > 2

    def train(rounds: range) -> None:
        for round_ in rounds:
            opt.zero_grad()
            grads = gradients(params, ctx.rank, round_)
            sum((p * grad).sum() for p, grad in zip(params, grads, strict=True)).backward()
            opt.step()

    if ctx.rank == 0:
        train(range(4))
        ctx.tell(1)
        ctx.hear(1)
        train(range(4, 5))
        ctx.meet()
        return values(params)
    ctx.hear(0)
    train(range(7, 8))  # late: for nothing
    late = values(params)
    train(range(8, 10))
    ctx.tell(0)
    ctx.meet()
    return late, worker.stats()["counters"]["dropped_late"], len(worker.layout.buckets)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_worker_that_fell_behind_catches_up(run, overlap):
    params = new_params()
    optimizer = torch.optim.SGD(params, lr=0.1)

    def steps(rank: int, rounds: range) -> list[torch.Tensor]:
        for round_ in rounds:
            set_gradients(params, average([gradients(params, rank, round_)]))
            optimizer.step()
        return values(params)

    alone = steps(0, range(4))
    steps(1, range(8, 10))
    last, (late, dropped, buckets) = run(train_with_quorum, overlap=overlap, hub={"quorum": 0.5})
    assert_close(late, alone)
    assert dropped == 2 * buckets  # rank 0's last gradient is late in turn
    assert_close(last, values(params))
