"""async: nothing waits, nothing is lost, and nobody ever reads half an update."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.workers import Context, Crew, together
from zps.hub.process import HubProcess

PULLS = 10_000
BUCKET = 64 * 2**10
SIZES = {"a": 30_000, "b": 16_000, "c": 1_000}  # the first takes two buckets

ASYNC = {"mode": "async"}


@contextmanager
def held_up(hub: HubProcess) -> Iterator[None]:
    """The hub sees nothing of what happens here until it is over; then all of it at once."""
    os.kill(hub.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(hub.pid, signal.SIGCONT)


@pytest.mark.parametrize("rule", ["add", "sgd", "torch.optim.SGD"])
def test_pushes_that_arrive_together_all_count(crew: Crew, rule):
    hub = crew.hub(**ASYNC)
    hypers = {} if rule == "add" else {"lr": 1.0, "maximize": True}
    with together(hub.address, {"w": torch.zeros(5)}, rule, world=3, hypers=hypers) as workers:
        for round_ in range(4):
            with held_up(hub):
                works = [
                    worker.push({"w": torch.full((5,), 10.0**worker.rank)}) for worker in workers
                ]
            for work in works:
                work.wait()
            workers[0].pull()
            assert workers[0].weights("w").tolist() == [111.0 * (round_ + 1)] * 5
        assert workers[0].stats()["counters"]["updates"] == 12


def write_without_end(ctx: Context) -> int:
    tensors = {name: torch.zeros(size) for name, size in SIZES.items()}
    worker = ctx.worker()
    worker.declare(tensors, rule="assign")
    count = 0
    while not ctx.is_told(1):
        count += 1
        for name in tensors:
            worker.slot(name).fill_(float(count))
        worker.push(list(tensors)).wait()
    ctx.hear(1)
    return count


def read_without_end(ctx: Context) -> tuple[int, int]:
    """Pulls, and how many different values were seen; each bucket has to hold one throughout."""
    worker = ctx.worker()
    worker.declare({name: torch.zeros(size) for name, size in SIZES.items()}, rule="assign")
    layout = worker.layout
    spans = [
        worker.weights(layout.params[p.param].name)[p.param_begin : p.param_begin + p.count]
        for p in layout.pieces
    ]
    assert len(spans) == len(layout.buckets) == 4
    seen, last, pulls = set(), [0.0] * len(spans), 0
    while pulls < PULLS or len(seen) < 100:
        worker.pull()
        pulls += 1
        for i, span in enumerate(spans):
            least, most = (float(value) for value in span.aminmax())
            assert least == most, f"pull {pulls}: bucket {i} holds {least} and {most}"
            assert least >= last[i], "a bucket went back in time"
            last[i] = least
            seen.add(least)
    ctx.tell(0)
    return pulls, len(seen)


def read_or_write(ctx: Context) -> object:
    return write_without_end(ctx) if ctx.rank == 0 else read_without_end(ctx)


def test_ten_thousand_pulls_under_a_writer_are_never_torn(run):
    written, (pulls, seen) = run(read_or_write, hub={**ASYNC, "bucket_bytes": BUCKET})
    assert pulls >= PULLS
    assert written >= seen >= 100


def train_alone_and_together(ctx: Context) -> list[float]:
    """Rank 0 takes 200 rounds before rank 1 has its first: nobody waits for anybody."""
    worker = ctx.worker()
    worker.declare({"w": torch.zeros(3)}, rule="add")
    if ctx.rank == 0:
        for _ in range(200):
            worker.push({"w": torch.ones(3)}).wait()
        ctx.tell(1)
        ctx.hear(1)
    else:
        ctx.hear(0)
        worker.push({"w": torch.ones(3)}).wait()
        ctx.tell(0)
    worker.pull()
    return worker.weights("w").tolist()


def test_nobody_waits_for_anybody(run):
    assert run(train_alone_and_together, hub=ASYNC) == [[201.0] * 3] * 2
