"""Peer `kernel`: what no round of zps can beat, the hub's fused kernel with nobody to tell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from . import problem
from .base import Peer, Seat, Server, cores
from .problem import Array
from .zps_round import Zps

_PAGE = 4096
_SLICE_NS = 100_000_000
_SPIN_US = 100


class Kernel(Peer):
    """Rank 0 applies all gradients with as many threads as a hub has; the others do nothing.

    Everything lies where a hub has it: weights and slots in shared memory, where each worker writes
    its own gradient, the momentum in private memory of the one that applies.
    """

    name: ClassVar[str] = "kernel"
    about: ClassVar[str] = "zps's fused kernel alone on the same gradients: no message, no copy"

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
        self._turns = _Turns(shared.address + end, seat.rank, seat.world)
        self._base = torch.from_numpy(problem.gradient(seat.rank, seat.size, seat.seed))
        self._grad = torch.from_numpy(slots[seat.rank])
        self._apply = _Apply(self._weights, slots, threads) if seat.rank == 0 else None

    def prepare(self, round_number: int) -> None:
        import torch

        self._turns.prepare(round_number)
        torch.mul(self._base, problem.factor(round_number), out=self._grad)

    def round(self) -> None:
        self._turns.begin()
        if self._apply:
            self._apply()

    def weights(self) -> Array:
        return self._weights

    def close(self) -> None:
        if self._apply:
            self._apply.close()


class _Turns:
    """Rank 0 applies when all have begun the round, and no slot is written before it has applied.

    address  of a page that all ranks share, zero at first
    Only the first is part of what is timed: a gradient that is not there cannot be applied.
    """

    def __init__(self, address: int, rank: int, world: int) -> None:
        from zps import native

        self._native = native
        self._begun, self._applied, self._words = address, address + 64, address + 128
        self._leads = rank == 0
        self._own = np.array([rank], np.uint32)
        self._leader = np.zeros(1, np.uint32)
        self._others = np.arange(1, world, dtype=np.uint32)

    def prepare(self, rounds: int) -> None:
        """Says that so many rounds have been applied, or waits until rank 0 does."""
        self._rounds = rounds
        if self._leads:
            self._post(self._applied, rounds)
        else:
            self._wait(self._applied, self._leader, rounds, spin_us=0)

    def begin(self) -> None:
        """Says that this rank has begun, or waits until all the others do."""
        if self._leads:
            self._wait(self._begun, self._others, self._rounds + 1, spin_us=_SPIN_US)
        else:
            self._post(self._begun, self._rounds + 1)

    def _post(self, signal: int, value: int) -> None:
        self._native.post(signal, self._words, self._own, np.array([value], np.uint64))

    def _wait(self, signal: int, index: NDArray[np.uint32], value: int, *, spin_us: int) -> None:
        targets = np.full(index.shape, value, np.uint64)
        while self._native.Waited.REACHED is not self._native.wait(
            signal, self._words, index, targets, 0, 0, spin_us, _SLICE_NS
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
