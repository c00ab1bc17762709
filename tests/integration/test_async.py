"""async: nothing waits, nothing is lost, and nobody ever reads half an update."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.workers import Crew, together
from zps.hub.process import HubProcess

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
