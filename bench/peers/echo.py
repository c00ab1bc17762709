"""Peer `echo`: one bare ROUTER that sends back what it gets, over ipc: a round trip's floor."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import ClassVar

import numpy as np
import zmq

from . import problem
from .base import Peer, Seat, Server
from .problem import Array
from .server_process import server_process

_FLOATS = 16  # 64 bytes, about as much as the header of a push


class Echo(Peer):
    name: ClassVar[str] = "echo"
    about: ClassVar[str] = "pyzmq DEALER to ROUTER and back over ipc, 64 bytes, nothing is done"

    @classmethod
    def memory_bytes(cls, size: int, world: int) -> int:
        return 0

    @classmethod
    @contextmanager
    def serve(cls, world: int, size: int, seed: int, folder: Path) -> Iterator[Server]:
        address = f"ipc://{folder / 'echo.sock'}"
        with server_process(cls.name, _serve, address) as (_, pid):
            yield Server(address, (pid,), 1)

    @staticmethod
    def answer(rounds: int) -> Array:
        """What a worker holds after so many rounds: the last message it has sent."""
        return np.full(_FLOATS, problem.factor(rounds - 1), np.float32)

    def setup(self, seat: Seat) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(seat.address)
        self._sent = self._got = b""

    def prepare(self, round_number: int) -> None:
        self._sent = self.answer(round_number + 1).tobytes()

    def round(self) -> None:
        self._socket.send(self._sent)
        self._got = self._socket.recv()

    def weights(self) -> Array:
        return np.frombuffer(self._got, np.float32)

    def close(self) -> None:
        self._context.destroy(linger=0)


def _serve(address: str, parent: Connection) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(address)
        parent.send("ready")
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        while True:
            router.send_multipart(router.recv_multipart())


def _end_with(parent: Connection) -> None:
    """Another thread waits for the end: a poller would be more than an echo has to do."""
    with suppress(EOFError):
        parent.recv()
    os._exit(0)
