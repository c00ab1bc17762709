"""Threads that share a worker: none keeps another from what it does, or gets what is another's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.workers import PATIENCE_S, Crew, at_once, together
from zps import Worker
from zps.errors import Closed, Rejected
from zps.worker.message_link import INLINE_BYTES

LINKS = ("shm", "message")

NAMES = {f"p{i}": torch.zeros(64) for i in range(4)}
ONE = {"p0": torch.ones(64)}

Start = Callable[..., Future[Any]]


@pytest.fixture
def hub(crew: Crew) -> str:
    return crew.hub().address


@pytest.fixture
def start() -> Iterator[Start]:
    """`start(call, *args)` in a thread of its own; returns its Future."""
    with ThreadPoolExecutor() as pool:
        yield pool.submit


def test_threads_may_share_a_worker(hub):
    with together(hub, NAMES, "add") as workers:

        def train(worker: Worker, name: str) -> None:
            for _ in range(50):
                worker.push({name: torch.ones(64)}).wait()
                assert worker.stats()["formed"]

        calls: list[Any] = [
            lambda worker=worker, name=name: train(worker, name)
            for worker in workers
            for name in NAMES
        ]
        at_once(*calls)
        assert all((worker.weights(name) == 100).all() for worker in workers for name in NAMES)


def test_a_thread_at_a_barrier_does_not_hold_up_one_that_trains(hub, start):
    with together(hub, NAMES, "add") as (first, second):
        barrier = start(first.barrier)
        while first.stats()["waiting_for"] != [1]:
            pass  # until it is at the barrier
        for _ in range(3):
            works = [worker.push(ONE) for worker in (first, second)]
            for work in works:
                work.wait()
        assert not barrier.done()
        second.barrier()
        barrier.result(PATIENCE_S)
        assert bool((first.weights("p0") == 6).all())


def test_a_thread_that_waits_sends_what_another_has_pushed(crew, start):
    """Gradients that only the thread in `wait` can be asked for."""
    size = INLINE_BYTES // 2
    names = {"a": torch.zeros(size), "b": torch.zeros(size)}
    with together(crew.hub().address, names, "add") as (first, second):
        early = first.push({"a": torch.ones(size)})
        waits = start(early.wait)
        while not waits.running():
            pass
        first.push({"b": torch.ones(size)})
        second.push({"b": torch.ones(size)}).wait()
        assert not waits.done()
        second.push({"a": torch.ones(size)}).wait()
        waits.result(PATIENCE_S)
        assert all(bool((second.weights(name) == 2).all()) for name in names)


def test_a_refusal_is_for_the_thread_that_asked(hub, start):
    with together(hub, NAMES, "add") as (first, second):
        work = first.push(ONE)
        waits = start(work.wait)
        for _ in range(20):
            with pytest.raises(Rejected, match="no optimizer state"):
                first.channels[0].read("state", 0, "momentum")
        assert not waits.done()
        second.push(ONE).wait()
        waits.result(PATIENCE_S)


def test_closing_ends_the_waits_of_other_threads(hub, start):
    with together(hub, NAMES, "add") as (first, second):
        waits = start(first.push(ONE).wait)
        while not waits.running():
            pass
        first.close()
        with pytest.raises(Closed):
            waits.result(PATIENCE_S)
        second.push(ONE).wait()
