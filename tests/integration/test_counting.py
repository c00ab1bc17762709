"""Workers that run free: no push is lost, and none counts twice."""

from __future__ import annotations

import pytest
import torch

from tests.workers import Context

LINKS = ("shm", "message")

PUSHES = 300
SIZES = {"a": 3, "b": 5000, "c": 1}  # "b" takes several buckets


def count(ctx: Context) -> tuple[dict[str, set[float]], int]:
    """Every rank adds its own power of a thousand, all at once or tensor by tensor."""
    worker = ctx.worker()
    worker.declare({name: torch.zeros(size) for name, size in SIZES.items()}, rule="add")
    ones = {name: torch.full((size,), 1000.0**ctx.rank) for name, size in SIZES.items()}
    order = list(SIZES)[:: -1 if ctx.rank else 1]
    for number in range(PUSHES):
        if number % 2:
            works = [worker.push(ones)]
        else:
            works = [worker.push({name: ones[name]}) for name in order]
        for work in works if number % 3 else works[:1]:  # the rest is waited for at the next push
            work.wait()
        if number % 7 == 0:
            worker.pull()
    for work in works:
        work.wait()
    ctx.meet()
    worker.pull()
    updates = worker.stats()["counters"]["updates"]
    ctx.meet()
    return {name: set(worker.weights(name).tolist()) for name in SIZES}, updates


@pytest.mark.parametrize("mode", ["bsp", "ssp", "async"])
def test_free_running_workers_add_up(run, mode):
    buckets = 1 + 5 + 1
    for sums, updates in run(count, world=2, hub={"mode": mode}):
        assert sums == {name: {PUSHES * 1001.0} for name in SIZES}
        assert updates == buckets * PUSHES * (1 if mode == "bsp" else 2)
