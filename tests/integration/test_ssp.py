"""ssp: fast workers run ahead of slow ones, and never further than the bound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import zps
from tests.training.reference import new_params, steps_in_hub
from tests.workers import Context, Crew, together

LINKS = ("shm", "message", "tcp")

ROUNDS = 30


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_a_push_waits_while_it_is_too_far_ahead(crew: Crew, bound):
    hub = crew.hub(mode="ssp", staleness=bound)
    ones = {"w": torch.ones(4)}
    with together(hub.address, {"w": torch.zeros(4)}, "add", world=3) as (fast, slow, slower):
        for _ in range(bound):
            fast.push(ones).wait()  # up to here nobody else has done anything
        # Round numbers begin at 0: this one is bound + 1 ahead of workers that have pushed none.
        work = fast.push(ones)
        assert fast.stats()["waiting_for"] == [1, 2]  # the hub has the push when it answers
        assert not work.done()
        second = slow.push(ones)
        assert slow.stats()["waiting_for"] == [2]
        assert (work.done(), second.done()) == (False, bound > 0)
        slower.push(ones).wait()
        second.wait()
        work.wait()
        fast.pull()
        assert fast.weights("w").tolist() == [float(bound + 3)] * 4
        again = fast.push(ones)
        assert fast.stats()["waiting_for"] == [1, 2]
        slow.close()
        slower.close()
        again.wait()


def run_free(ctx: Context, path: str, bound: int) -> int:
    """`begun[rank]` rounds have begun on each rank, counted before the first gradient leaves."""
    begun = np.memmap(path, np.int64, "r+")
    opt = zps.Optimizer(torch.optim.SGD(new_params(), lr=0.1), worker=ctx.worker())
    others = [rank for rank in range(ctx.world) if rank != ctx.rank]
    slow = ctx.world - 1
    most = 0
    for round_ in range(ROUNDS):
        if ctx.rank == slow and round_ + bound - 1 < ROUNDS:
            while ctx.hear(0) < round_ + bound - 1:  # the furthest that rank 0 may have come
                pass
        begun[ctx.rank] = round_ + 1
        steps_in_hub(opt, range(round_, round_ + 1), rank=ctx.rank)
        lead = round_ + 1 - min(begun[other] for other in others)
        assert lead <= bound, f"rank {ctx.rank} ended round {round_}, the others began {begun}"
        most = max(most, lead)
        if ctx.rank == 0:
            ctx.tell(slow, round_)
    return int(most)


@pytest.mark.parametrize("bound", [1, 3])
def test_the_bound_is_reached_and_never_exceeded(run, tmp_path: Path, bound):
    path = tmp_path / "begun"
    np.zeros(3, np.int64).tofile(path)
    leads = run(run_free, str(path), bound, world=3, hub={"mode": "ssp", "staleness": bound})
    assert max(leads) == bound
