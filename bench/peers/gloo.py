"""Peer `gloo`: ring all-reduce over loopback, then a local optimizer in every worker."""

from __future__ import annotations

import os
from typing import ClassVar

import numpy as np

from . import problem
from .base import Peer, Seat
from .problem import Array


class Gloo(Peer):
    name: ClassVar[str] = "gloo"
    about: ClassVar[str] = "gloo all_reduce in place, fused torch.optim.SGD in every worker"

    @classmethod
    def available(cls) -> str | None:
        if reason := super().available():
            return reason
        import torch.distributed as dist

        built = dist.is_available() and dist.is_gloo_available()
        return None if built else "this torch is built without gloo"

    @classmethod
    def memory_bytes(cls, size: int, world: int) -> int:
        return 4 * size * world * 5  # base, gradient, weights, momentum, gloo's scratch

    @staticmethod
    def join(seat: Seat) -> None:
        """Enters torch's default process group."""
        import torch.distributed as dist

        # The name of the host may resolve to an outside address; loopback is the fastest way here.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo", init_method=seat.address, rank=seat.rank, world_size=seat.world
        )

    def setup(self, seat: Seat) -> None:
        import torch
        import torch.distributed as dist

        self.join(seat)
        self._dist = dist
        self._base = torch.from_numpy(problem.gradient(seat.rank, seat.size, seat.seed))
        self._weights = torch.from_numpy(problem.initial_weights(seat.size, seat.seed))
        self._weights.grad = torch.zeros_like(self._weights)
        self._grad = self._weights.grad
        # The sum of the gradients with this rate is their mean with the given one: no pass divides.
        lr = problem.LR / seat.world
        self._optimizer = torch.optim.SGD(
            [self._weights], lr=lr, momentum=problem.MOMENTUM, fused=True
        )

    def prepare(self, round_number: int) -> None:
        import torch

        torch.mul(self._base, problem.factor(round_number), out=self._grad)

    def round(self) -> None:
        self._dist.all_reduce(self._grad)
        self._optimizer.step()

    def weights(self) -> Array:
        flat: Array = np.ascontiguousarray(self._weights.numpy())
        return flat

    def close(self) -> None:
        self._dist.destroy_process_group()
