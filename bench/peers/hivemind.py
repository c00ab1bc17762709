"""Peer `hivemind`: averaging among equals that find each other, then a local optimizer in each."""

from __future__ import annotations

import multiprocessing
import os
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from . import problem
from .base import Peer, Seat
from .problem import Array
from .processes import descendants

if TYPE_CHECKING:
    import hivemind

_PATIENCE_S = 300.0
_OWN_BYTES = 300 << 20  # two processes and the daemon that sends
# Only an upper bound: a group begins as soon as everybody is in it.
_MATCHMAKING_S = 1.0


class Hivemind(Peer):
    """As hivemind.Optimizer averages gradients, with everybody in one group, uncompressed.

    Every round the workers look for each other anew: that is what makes it robust between
    strangers, and on one machine it is most of a small round.
    """

    name: ClassVar[str] = "hivemind"
    about: ClassVar[str] = (
        "hivemind.DecentralizedAverager over loopback, fused torch.optim.SGD in every worker"
    )
    same_bits: ClassVar[bool] = False  # each adds the average's difference from its own gradient

    @classmethod
    def available(cls) -> str | None:
        if reason := super().available():
            return reason
        found = find_spec("hivemind")
        return None if found else "hivemind is not installed; run `pip install hivemind`"

    @classmethod
    def memory_bytes(cls, size: int, world: int) -> int:
        # Base, gradient, weights, momentum; parts in flight, sent and received, and the average.
        return world * (4 * size * 8 + _OWN_BYTES)

    def setup(self, seat: Seat) -> None:
        import torch

        # It forks processes of its own, which Python denies to daemons.
        multiprocessing.set_start_method("fork", force=True)
        multiprocessing.current_process().daemon = False
        os.environ.setdefault("HIVEMIND_LOGLEVEL", "ERROR")
        import hivemind

        self._dht = _join(seat)
        self._averager = hivemind.DecentralizedAverager(
            [torch.zeros(seat.size)],
            self._dht,
            prefix="bench",
            target_group_size=seat.world,
            min_group_size=seat.world,
            min_matchmaking_time=_MATCHMAKING_S,
            request_timeout=_MATCHMAKING_S / 2,
            start=True,
        )
        self._alone = seat.world == 1  # it averages with others only
        self._base = torch.from_numpy(problem.gradient(seat.rank, seat.size, seat.seed))
        self._weights = torch.from_numpy(problem.initial_weights(seat.size, seat.seed))
        self._optimizer = torch.optim.SGD(
            [self._weights], lr=problem.LR, momentum=problem.MOMENTUM, fused=True
        )

    def pids(self) -> list[int]:
        own = [self._dht.pid, self._averager.pid]
        return own + [child for pid in own for child in descendants(pid)]

    def prepare(self, round_number: int) -> None:
        import torch

        with self._averager.get_tensors() as (grad,):
            torch.mul(self._base, problem.factor(round_number), out=grad)

    def round(self) -> None:
        if not self._alone:
            self._averager.step(timeout=_PATIENCE_S)
        with self._averager.get_tensors() as (grad,):
            self._weights.grad = grad
            self._optimizer.step()

    def weights(self) -> Array:
        flat: Array = np.ascontiguousarray(self._weights.numpy())
        return flat

    def close(self) -> None:
        self._averager.shutdown()
        self._dht.shutdown()


def _join(seat: Seat) -> hivemind.DHT:
    """The table where the workers find each other; rank 0 begins it."""
    import hivemind
    from torch.distributed import FileStore

    store = FileStore(seat.address.removeprefix("file://"), seat.world)
    store.set_timeout(timedelta(seconds=_PATIENCE_S))
    if seat.rank > 0:
        known = store.get("peers").decode().split()
        return hivemind.DHT(initial_peers=known, start=True)
    table = hivemind.DHT(start=True)
    store.set("peers", " ".join(str(address) for address in table.get_visible_maddrs()))
    return table
