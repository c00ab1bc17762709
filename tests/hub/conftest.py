"""A hub, a raw peer, and a job of two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

from tests.hub.pair import LR, SHAPES, Pair
from tests.hub.raw import JOB, Raw
from tests.workers import Crew, at_once
from zps import Worker


@pytest.fixture(scope="module")
def hub(crew: Crew) -> str:
    return crew.hub(job=JOB).address


@pytest.fixture
def raw(hub: str) -> Iterator[Raw]:
    with Raw(hub) as peer:
        yield peer


@pytest.fixture
def pair(hub: str, raw: Raw) -> Iterator[Pair]:
    with ExitStack() as stack:
        worker = Worker(hub, rank=0, world_size=2, job=JOB, timeout_s=20)
        stack.enter_context(worker)
        tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        join = {"rank": 1, "world_size": 2}
        _, attach = at_once(
            lambda: worker.declare(tensors, "sgd", lr=LR),
            lambda: raw.join(SHAPES, "sgd", hypers={"lr": LR}, **join),
        )
        pair = Pair(worker, raw, attach)
        pair.finish_round()
        yield pair
