"""What stale gradients do to the weights: every policy against a replay of the accepted pushes."""

from __future__ import annotations

import torch

from tests.workers import Crew, together
from zps.memory.control import Outcome


def test_a_round_that_is_stale_in_part_does_not_wait_for_the_rest(crew: Crew):
    hub = crew.hub(mode="async", staleness_policy="drop", staleness=0)
    tensors = {"a": torch.zeros(3), "b": torch.zeros(3)}
    hypers = {"lr": 1.0, "max_grad_norm": 1.0}
    with together(hub.address, tensors, "sgd", hypers=hypers) as (first, second):
        ones = {name: torch.ones(3) for name in tensors}
        for _ in range(10):
            first.push(ones).wait()
            first.pull()
        second.pull("a")
        work = second.push(ones).wait(10)
        assert work.outcomes == (Outcome.APPLIED, Outcome.STALE)
        second.pull()
        counters = second.stats()["counters"]
        assert counters["dropped_stale"] == 1
        assert counters["updates"] == 21
