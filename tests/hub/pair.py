"""A job of two at a real hub: a good worker, and a raw peer that a test bends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import numpy as np
import torch

from tests.hub.raw import Raw
from zps import Worker
from zps.wire import messages as m

#: One bucket for `a`, two for `b`: a bucket has 4096 bytes.
SHAPES = {"a": (8,), "b": (2000,)}
LR = 0.5


class Pair:
    """A job of two: rank 0 is a good worker, rank 1 is whatever the test makes of it."""

    def __init__(self, worker: Worker, raw: Raw, attach: m.Attach):
        self.worker = worker
        self.raw = raw
        self.attach = attach
        self.round = 0

    def weights(self) -> torch.Tensor:
        return torch.cat([self.worker.weights(name) for name in SHAPES]).clone()

    def state(self) -> tuple[dict[str, Any], bytes]:
        return self.worker.stats(), self.weights().numpy().tobytes()

    def finish_round(self, pushed: Callable[[], None] | None = None) -> None:
        """Both push ones in all buckets, and the weights fall by LR."""
        before = self.weights()
        self.raw.slots.bytes.view(np.float32)[:] = 1
        work = self.worker.push({name: torch.ones(shape) for name, shape in SHAPES.items()})
        if pushed is None:
            header = self.raw.push(round=self.round, buckets=[0, 1, 2], bases=[self.round] * 3)
            self.raw.send(header)
        else:
            pushed()
        work.wait()
        self.round += 1
        assert torch.equal(self.weights(), before - LR)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """What happens inside has no effect, and the next round is a good one."""
        before = self.state()
        yield
        assert self.state() == before
        self.finish_round()


def hypers(*groups: dict[str, Any], max_grad_norm: object = None) -> bytes:
    return msgpack.packb({"groups": list(groups), "max_grad_norm": max_grad_norm})
