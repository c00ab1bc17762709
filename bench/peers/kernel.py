"""Peer `kernel`: what no round of zps can beat, the hub's fused kernel with nobody to wait for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np

from . import problem
from .base import Peer, Seat, Server, cores
from .problem import Array
from .zps_round import Zps

_PAGE = 4096
_SLICE_NS = 100_000_000


class Kernel(Peer):
    """Rank 0 applies all gradients with as many threads as a hub has; the others do nothing.

    Everything lies where a hub has it: weights and slots in shared memory, where each worker writes
    its own gradient, the momentum in private memory of the one that applies.
    """

    name: ClassVar[str] = "kernel"
    about: ClassVar[str] = "zps's fused kernel alone on the same gradients: no message, no waiting"

    @classmethod
    def available(cls) -> str | None:
        return Zps.available()

    @classmethod
    def memory_bytes(cls, size: int, world: int) -> int:
        return 4 * size * (2 + world * 2)  # weights, momentum; base and slot of each

    @classmethod
    @contextmanager
    def serve(cls, world: int, size: int, seed: int, folder: Path) -> Iterator[Server]:
        from zps.config import Settings
        from zps.memory.segment import Segment

        shared = Segment.create("bench", _shared_bytes(size, world))
        shared.bytes[: 4 * size].view(np.float32)[:] = problem.initial_weights(size, seed)
        threads = Settings.load().hub_threads or cores()
        try:
            yield Server(f"{shared.ref.pid} {shared.ref.fd} {threads}", (), threads)
        finally:
            shared.close()

    def setup(self, seat: Seat) -> None:
        import torch

        from zps.memory.segment import Segment, SegmentRef

        pid, fd, threads = (int(part) for part in seat.address.split())
        ref = SegmentRef(pid, fd, _shared_bytes(seat.size, seat.world))
        shared = Segment.attach(ref, writable=True)
        end = shared.nbytes - _PAGE
        starts = range(0, end, _row_bytes(seat.size))
        rows = [shared.bytes[at : at + 4 * seat.size].view(np.float32) for at in starts]
        self._weights, *slots = rows
        self._turn = _Turn(shared.address + end, leads=seat.rank == 0)
        self._base = torch.from_numpy(problem.gradient(seat.rank, seat.size, seat.seed))
        self._grad = torch.from_numpy(slots[seat.rank])
        self._apply = _Apply(self._weights, slots, threads) if seat.rank == 0 else None

    def prepare(self, round_number: int) -> None:
        import torch

        self._turn.pass_on(round_number)
        torch.mul(self._base, problem.factor(round_number), out=self._grad)

    def round(self) -> None:
        if self._apply:
            self._apply()

    def weights(self) -> Array:
        return self._weights

    def close(self) -> None:
        if self._apply:
            self._apply.close()


class _Turn:
    """Keeps slots from being written while they are applied, outside of what is timed.

    address  of a cache line that all ranks share, zero at first: a signal, and from its 8th byte on
             the number of rounds that have been applied
    """

    def __init__(self, address: int, *, leads: bool) -> None:
        from zps import native

        self._native = native
        self._signal, self._word = address, address + 8
        self._leads = leads
        self._index = np.zeros(1, np.uint32)

    def pass_on(self, rounds: int) -> None:
        """Says that so many rounds have been applied, or waits until the one that applies does."""
        done = np.array([rounds], np.uint64)
        if self._leads:
            self._native.post(self._signal, self._word, self._index, done)
            return
        reached = self._native.Waited.REACHED
        while reached is not self._native.wait(
            self._signal, self._word, self._index, done, 0, 0, 0, _SLICE_NS
        ):
            continue


class _Apply:
    """One round of SGD with momentum on the mean of `slots`, all arrays (n,) float32."""

    def __init__(self, weights: Array, slots: list[Array], threads: int) -> None:
        from zps import native
        from zps.memory.segment import private_floats
        from zps.optim.registry import rule

        sgd = rule("sgd")
        self._momentum = private_floats(len(weights), "momentum")
        self._pool = native.Pool(threads)
        self._native = native
        self._job = native.Job(
            rule=sgd.kernel,
            segments=np.array([(0, len(weights), 0, 0)], native.SEGMENT),
            grad_dtype=native.DTYPE["float32"],
            weights_ptr=weights.ctypes.data,
            master_ptr=weights.ctypes.data,
            state_ptrs=[self._momentum.ctypes.data],
            slots=[slot.ctypes.data for slot in slots],
            divisor=float(len(slots)),
            hypers=sgd.pack([{"lr": problem.LR, "momentum": problem.MOMENTUM}]),
            steps=np.zeros(1, np.int64),
        )

    def __call__(self) -> None:
        assert self._job.steps is not None
        self._job.steps += 1
        self._native.apply(self._pool, [self._job])

    def close(self) -> None:
        self._pool.close()


def _row_bytes(size: int) -> int:
    return -(-4 * size // _PAGE) * _PAGE


def _shared_bytes(size: int, world: int) -> int:
    """Weights, one slot for each worker, and a page for their turns."""
    return (1 + world) * _row_bytes(size) + _PAGE
