"""The server side of peer `rpc`; imported only by processes that use torch.

Source: "Implementing Batch RPC Processing Using Asynchronous Executions" in the PyTorch tutorials.
Two changes keep it right: additions happen under the lock (two workers may push at once), and
`zero_grad` keeps the gradient tensors (None would break the next addition).
"""

from __future__ import annotations

import threading
import warnings
from multiprocessing.connection import Connection

import torch
import torch.distributed.rpc as rpc

from . import problem
from .base import cores

SERVER = "server"

Tensors = list[torch.Tensor]


class ParameterServer:
    """Averages the gradients of all workers, steps one optimizer, answers with the parameters."""

    def __init__(self, world: int, size: int, seed: int) -> None:
        self._weights = torch.from_numpy(problem.initial_weights(size, seed))
        self._weights.grad = torch.zeros_like(self._weights)
        self._grad = self._weights.grad
        self._optimizer = torch.optim.SGD([self._weights], lr=problem.LR, momentum=problem.MOMENTUM)
        self._world = world
        self._pushed = 0
        self._lock = threading.Lock()
        self._updated: torch.futures.Future[torch.Tensor] = torch.futures.Future()

    def update(self, grad: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        with self._lock:
            self._grad += grad
            self._pushed += 1
            updated = self._updated
            if self._pushed == self._world:
                self._grad /= self._world
                self._optimizer.step()
                self._optimizer.zero_grad(set_to_none=False)
                self._pushed = 0
                self._updated = torch.futures.Future()
                updated.set_result(self._weights)
        return updated


_server: ParameterServer | None = None


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def update_and_fetch(grad: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    """Adds one worker's gradient; the answer comes when every worker's have been added."""
    assert _server is not None, "only the server process is asked to update"
    return _server.update(grad)


def join(name: str, rank: int, world: int, address: str) -> None:
    """Enters the group; calls never time out, the harness does."""
    options = rpc.TensorPipeRpcBackendOptions(init_method=address, rpc_timeout=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own start-up uses what torch has deprecated
        rpc.init_rpc(  # type: ignore[no-untyped-call]
            name, rank=rank, world_size=world, rpc_backend_options=options
        )


def serve(world: int, size: int, seed: int, address: str, parent: Connection) -> None:
    """The server process: stays until every worker has left."""
    global _server
    torch.set_num_threads(cores())
    _server = ParameterServer(world, size, seed)
    parent.send("ready")
    join(SERVER, world, world + 1, address)
    rpc.shutdown()
