"""Participants of bench.pull: the ways in which a worker comes to hold the current weights.

A round is a pull; the push before it, which makes the weights new, is not timed.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from . import problem
from .base import Peer, Seat
from .problem import Array
from .zps_round import Zps


class PullAlias(Zps):
    name: ClassVar[str] = "zps-alias"
    about: ClassVar[str] = "weights are views of the hub's memory: a pull has nothing to do"
    settings: ClassVar[dict[str, Any]] = {"pull": "alias"}

    @classmethod
    def memory_bytes(cls, size: int, world: int) -> int:
        return super().memory_bytes(size, world) + 4 * size * world

    @classmethod
    def connect(cls, seat: Seat) -> Any:
        import zps

        return zps.Worker(seat.address, rank=seat.rank, world_size=seat.world, **cls.settings)

    def prepare(self, round_number: int) -> None:
        super().prepare(round_number)
        self._worker.push("w").wait()

    def round(self) -> None:
        self._worker.pull("w").wait()


class PullCopy(PullAlias):
    name = "zps-copy"
    about = "weights are copied bucket by bucket under a seqlock"
    settings: ClassVar[dict[str, Any]] = {"pull": "copy"}


class PullMessage(PullAlias):
    name = "zps-message"
    about = "weights come in messages over ipc"
    # As a view it would hold what came with the answer to the push, and ask for nothing.
    settings: ClassVar[dict[str, Any]] = {"link": "message", "pull": "copy"}


class Memcpy(Peer):
    """As many bytes, copied by NumPy within the worker: what a copy costs at least."""

    name: ClassVar[str] = "memcpy"
    about: ClassVar[str] = "numpy.copyto of as many bytes in the worker's own memory"

    @classmethod
    def memory_bytes(cls, size: int, world: int) -> int:
        return 4 * size * world * 5  # what it solves the problem with, and the copy

    def setup(self, seat: Seat) -> None:
        ranks = range(seat.world)
        self._mean = np.mean(
            [problem.gradient(rank, seat.size, seat.seed) for rank in ranks],
            axis=0,
            dtype=np.float32,
        )
        self._weights = problem.initial_weights(seat.size, seat.seed)
        self._momentum = np.zeros_like(self._weights)
        self._copy = np.zeros_like(self._weights)

    def prepare(self, round_number: int) -> None:
        self._momentum *= np.float32(problem.MOMENTUM)
        self._momentum += self._mean * np.float32(problem.factor(round_number))
        self._weights -= np.float32(problem.LR) * self._momentum

    def round(self) -> None:
        np.copyto(self._copy, self._weights)

    def weights(self) -> Array:
        return self._copy

    def close(self) -> None:
        pass
