"""A peer that speaks bytes: what no honest worker sends can be sent with it.

raw = Raw(hub.address)
raw.join({"w": (4,)}, rank=0, world_size=1)      # an honest handshake and declaration
raw.ask(raw.push(round=0, buckets=[0], bases=[7]))
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgpack
import zmq

from zps.core.layout import Layout, Param
from zps.memory.segment import Segment, SegmentRef
from zps.wire import messages as m
from zps.wire import packing
from zps.wire.hypers import pack_hypers
from zps.wire.sockets import host_id

PATIENCE_S = 20.0
JOB = "hostile"  # of a hub that is shared by these tests alone
Fields = dict[str, Any]
M = TypeVar("M", bound=m.Message)


class Raw:
    """One DEALER, and the epoch, session and sequence number of an honest worker."""

    def __init__(self, address: str):
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.connect(address)
        self.epoch = self.session = self.seq = 0
        self.payload: list[bytes] = []  # of the last message received
        self.layout = Layout.build([], bucket_bytes=4096)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        if self.session:  # this process lives on, so the hub would not take it for dead
            bye = self.header("bye", failed=False)
            self.send(bye)
            # The next test finds the hub empty: it does not start before the hub has taken leave.
            while self.socket.poll(1000):
                if getattr(m.decode(self.socket.recv_multipart()[0]), "seq", None) == bye["seq"]:
                    break
        self._context.destroy(linger=1000)

    # --- bytes --------------------------------------------------------------------------------

    def send(self, header: Fields | bytes, *payload: bytes) -> None:
        """Send a header, encoded unless it is bytes already, and its payload."""
        data = header if isinstance(header, bytes) else msgpack.packb(header)
        self.socket.send_multipart([data, *payload])

    def receive(self) -> m.Message:
        """The next message; fails when none comes."""
        assert self.socket.poll(int(PATIENCE_S * 1000)), "the hub does not answer"
        frames = self.socket.recv_multipart()
        self.payload = frames[1:]
        return m.decode(frames[0])

    def ask(self, header: Fields | bytes, *payload: bytes) -> m.Message:
        self.send(header, *payload)
        return self.receive()

    def refused(self, header: Fields | bytes, *payload: bytes) -> m.Refuse:
        """Send what the hub has to refuse; returns its refusal."""
        self.send(header, *payload)
        return self.expect(m.Refuse)

    def expect(self, kind: type[M]) -> M:
        """The next message, which has to be of this kind."""
        answer = self.receive()
        assert isinstance(answer, kind), answer
        return answer

    # --- honest messages, to be bent ----------------------------------------------------------

    def hello(self, **changes: Any) -> Fields:
        fields = {
            "t": "hello",
            "protocol": m.PROTOCOL,
            "job": JOB,
            "rank": 0,
            "world_size": 1,
            "incarnation": secrets.token_hex(8),
            "host": host_id(),
            "pid": os.getpid(),
            "settings": {},
        }
        return {**fields, **changes}

    def header(self, tag: str, **fields: Any) -> Fields:
        """A header with the next sequence number of this session."""
        self.seq += 1
        return {"t": tag, "epoch": self.epoch, "session": self.session, "seq": self.seq, **fields}

    def push(self, **changes: Any) -> Fields:
        fields = {
            "round": 0,
            "buckets": [0],
            "bases": [0],
            "samples": 1.0,
            "grad_scale": 1.0,
            "finite": True,
            "hold": False,
            "hypers": False,
            "absent": False,
        }
        return self.header("push", **{**fields, **changes})

    def declaration(
        self,
        shapes: Mapping[str, Sequence[int]],
        rule: str = "sum",
        hypers: Mapping[str, Any] | None = None,
        *,
        shared: bool = True,
    ) -> tuple[Fields, bytes, bytes]:
        """A DECLARE of float32 tensors, each in buckets of its own, and its two payload frames."""
        params = [Param(name, tuple(shape), "float32") for name, shape in shapes.items()]
        self.layout = Layout.build(params, bucket_bytes=4096, fuse=False)
        header = self.header("declare", layout_hash=self.layout.hash, rule=rule, shared=shared)
        groups = [{"params": list(range(len(params))), **(hypers or {})}]
        return header, packing.pack(self.layout.to_wire()), pack_hypers(groups, None)

    # --- honest steps -------------------------------------------------------------------------

    def greet(self, **changes: Any) -> m.Welcome:
        """Say hello, and remember what was agreed."""
        self.send(self.hello(**changes))
        welcome = self.expect(m.Welcome)
        self.epoch, self.session = welcome.epoch, welcome.session
        self.seq = welcome.session << 32
        return welcome

    def join(
        self, shapes: Mapping[str, Sequence[int]], rule: str = "sum", **changes: Any
    ) -> m.Attach:
        """Greet, declare and publish; with more workers, they have to join meanwhile.

        shared=False: it maps none of the hub's memory, and its gradients go in messages.
        """
        hypers, shared = changes.pop("hypers", None), changes.pop("shared", True)
        self.greet(**changes)
        self.send(*self.declaration(shapes, rule, hypers, shared=shared))
        attach = self.expect(m.Attach)
        if shared:
            self.slots = Segment.attach(SegmentRef(**attach.slots.model_dump()), writable=True)
        if not attach.formed:
            self.send(self.header("publish"))
            self.expect(m.Ok)
        return attach

    def stats(self) -> Fields:
        """The hub's account."""
        self.send(self.header("stats"))
        self.expect(m.Ok)
        facts: Fields = packing.unpack(self.payload[0])
        return facts
