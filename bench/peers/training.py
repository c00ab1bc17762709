"""Participants of bench.train: the same model and loop, with three ways to share gradients.

`size` of a seat is the width of the hidden layers; 4096 makes 25 million parameters.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from . import zps_round
from .base import Peer, Seat, Server
from .gloo import Gloo
from .problem import Array

if TYPE_CHECKING:
    import torch

FEATURES = 1024
BATCH = 16
LR = 0.01
MOMENTUM = 0.9


def parameters(width: int) -> int:
    """Parameters of the model: FEATURES - width - width - FEATURES, with biases."""
    return (FEATURES + 1) * width + (width + 1) * width + (width + 1) * FEATURES


class Training(Peer):
    """One step a round: forward, backward, optimizer, on fixed random data of this rank's own."""

    @classmethod
    def memory_bytes(cls, size: int, world: int) -> int:
        return 4 * parameters(size) * world * 5  # weights, gradient, momentum, shared copies

    def setup(self, seat: Seat) -> None:
        import torch

        self._model = _model(seat.size, seat.seed)
        self._flat = list(self._model.parameters())
        self._x, self._y = _batch(seat.rank, seat.seed)
        self._loss = torch.nn.MSELoss()
        self._optimizer = self.share(seat)

    @abstractmethod
    def share(self, seat: Seat) -> torch.optim.Optimizer:
        """Connect this worker's model with the others; returns what steps it."""

    def prepare(self, round_number: int) -> None:
        """Nothing: a loop computes its gradients itself."""

    def round(self) -> None:
        self._optimizer.zero_grad()
        self._loss(self._model(self._x), self._y).backward()
        self._optimizer.step()

    def weights(self) -> Array:
        flat: Array = np.concatenate([p.detach().numpy().ravel() for p in self._flat])
        return flat


class TrainZps(Training):
    name: ClassVar[str] = "zps"
    about: ClassVar[str] = "zps.Optimizer, gradients leave during backward, SGD in the hub"

    @classmethod
    def available(cls) -> str | None:
        return zps_round.Zps.available()

    @classmethod
    @contextmanager
    def serve(cls, world: int, size: int, seed: int, folder: Path) -> Iterator[Server]:
        with zps_round.start_hub(world) as server:
            yield server

    def share(self, seat: Seat) -> torch.optim.Optimizer:
        import torch

        import zps

        zps.init(hub=seat.address, rank=seat.rank, world_size=seat.world)
        self._shutdown = zps.shutdown
        local = torch.optim.SGD(self._model.parameters(), lr=LR, momentum=MOMENTUM)
        return zps.Optimizer(local, self._model)

    def close(self) -> None:
        self._shutdown()


class TrainDdp(Training):
    name: ClassVar[str] = "ddp"
    about: ClassVar[str] = (
        "tuned DistributedDataParallel over gloo, fused torch.optim.SGD in every worker"
    )

    @classmethod
    def available(cls) -> str | None:
        return Gloo.available()

    def share(self, seat: Seat) -> torch.optim.Optimizer:
        import torch

        Gloo.join(seat)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own start-up uses what torch has deprecated
            # Both options are off by default; they are the fastest for a model like this one.
            self._model = torch.nn.parallel.DistributedDataParallel(
                self._model, gradient_as_bucket_view=True, static_graph=True
            )
        return fused_sgd(self._model)

    def close(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()


class TrainLocal(Training):
    name: ClassVar[str] = "local"
    about: ClassVar[str] = "every worker for itself: no communication, other weights on each rank"

    def share(self, seat: Seat) -> torch.optim.Optimizer:
        return fused_sgd(self._model)

    def close(self) -> None:
        pass


def fused_sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    """torch's fastest SGD with momentum on a CPU."""
    import torch

    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, fused=True)


def reference(ranks: Sequence[int], width: int, seed: int, steps: int) -> Array:
    """The weights after `steps` steps on the mean gradient of these ranks' batches: the oracle.

    Plain NumPy float32, from the forward pass on; torch only draws the first weights and the data.
    """
    weights = [p.detach().numpy().copy() for p in _model(width, seed).parameters()]
    batches = [[part.numpy() for part in _batch(rank, seed)] for rank in ranks]
    buffers = [np.zeros_like(weight) for weight in weights]
    for _ in range(steps):
        found = [_gradients(weights, x, y) for x, y in batches]
        for weight, buffer, *own in zip(weights, buffers, *found, strict=True):
            buffer *= np.float32(MOMENTUM)
            buffer += sum(own) / np.float32(len(ranks))
            weight -= np.float32(LR) * buffer
    return np.concatenate([weight.ravel() for weight in weights])


def _gradients(weights: Sequence[Array], x: Array, y: Array) -> list[Array]:
    """Of the mean squared error, for layers x @ w.T + b with a ReLU between any two."""
    inputs, layers = [x], list(zip(weights[::2], weights[1::2], strict=True))
    for w, b in layers[:-1]:
        inputs.append(np.maximum(inputs[-1] @ w.T + b, 0))
    w, b = layers[-1]
    delta = 2 * (inputs[-1] @ w.T + b - y) / np.float32(y.size)
    found: list[Array] = []
    for (w, _), into in zip(reversed(layers), reversed(inputs), strict=True):
        found = [delta.T @ into, delta.sum(axis=0), *found]
        delta = (delta @ w) * (into > 0)
    return found


def _batch(rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's data, the same in every step."""
    import torch

    draw = torch.Generator().manual_seed(seed + 1 + rank)
    x, y = (torch.randn(BATCH, FEATURES, generator=draw) for _ in range(2))
    return x, y


def _model(width: int, seed: int) -> torch.nn.Module:
    """Every rank begins with the same weights."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Linear(FEATURES, width), nn.ReLU()),
        *(nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, FEATURES),
    )
