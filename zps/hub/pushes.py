"""What workers push: judged, then handed to the engine, or to the courier for bytes to come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from zps.errors import ProtocolError
from zps.hub.courier import Courier
from zps.hub.job import Job, Peer, Refused
from zps.hub.store import Hypers, Pushed
from zps.memory.bell import Ring
from zps.trace import Tracer
from zps.wire import messages as m
from zps.wire import packing
from zps.wire.sockets import Frame

_PLAIN = Ring(seq=0, after=0, round=0, samples=1.0, grad_scale=1.0, finite=True, hold=False)


class Pushes:
    """The pushes of one job.

    keeps_base  its rule wants the weights that a gradient was computed on
    """

    def __init__(self, job: Job, courier: Courier, tracer: Tracer, *, keeps_base: bool):
        self._job = job
        self._courier = courier
        self._tracer = tracer
        self._keeps_base = keeps_base

    def message(self, peer: Peer, push: m.Push, payload: Sequence[Frame]) -> None:
        """Take a PUSH. Raises ProtocolError, Refused or ConfigError, without effect."""
        told = push.hypers + push.absent
        payload, inline = payload[:told], payload[told:]
        self._check(push, payload)
        self._check_free(peer, push.buckets)
        if peer.slots is not None and inline:
            raise ProtocolError("a push with a payload, from a worker that shares its memory")
        absent = packing.array(payload[-1], np.uint32).tolist() if push.absent else ()
        hypers = self._job.new_hypers(bytes(payload[0])) if push.hypers else peer.hypers
        assert hypers is not None
        peer.rings = False
        pushed = self._pushed(peer, push, hypers, frozenset(absent))
        with self._tracer.span("decide"):
            if peer.slots is None:
                self._courier.push(peer, pushed, push, inline)
            else:
                self._job.engine.push(pushed, push.buckets, push.bases)
        peer.hypers = hypers

    def ring(self, peer: Peer, ring: Ring, bases: Sequence[int]) -> None:
        """Take a push of every bucket by the bell. Raises as `message` does."""
        _check_weights(ring.samples, ring.grad_scale)
        buckets = range(len(bases))
        self._check_free(peer, buckets)
        assert peer.hypers is not None
        with self._tracer.span("decide"):
            self._job.engine.push(self._pushed(peer, ring, peer.hypers), buckets, bases)
        peer.rings = not ring.hold

    def plain(self, peer: Peer) -> Pushed:
        """A push of every bucket with nothing to tell, for who loads jobs ahead of it."""
        assert peer.hypers is not None
        return self._pushed(peer, _PLAIN, peer.hypers)

    def _check(self, push: m.Push, payload: Sequence[Frame]) -> None:
        if len(payload) != push.hypers + push.absent or len(push.buckets) != len(push.bases):
            raise ProtocolError("a push whose frames do not match its header")
        if push.absent and len(payload[-1]) > 4 * len(self._job.layout.params):
            raise ProtocolError("a push with more absent parameters than there are")
        _check_weights(push.samples, push.grad_scale)
        if len(set(push.buckets)) != len(push.buckets):
            raise ProtocolError("a push names a bucket twice")

    def _check_free(self, peer: Peer, buckets: Iterable[int]) -> None:
        engine, courier, session = self._job.engine, self._courier, peer.session
        for bucket in buckets:
            if courier.is_open(session, bucket) or engine.slot_busy(session, bucket):
                raise Refused("slot_busy", f"bucket {bucket} was pushed again before it was taken")

    def _pushed(
        self,
        peer: Peer,
        push: m.Push | Ring,
        hypers: Hypers,
        absent: frozenset[int] = frozenset(),
    ) -> Pushed:
        slots, base = peer.slots, 0
        if self._keeps_base:
            slot_bytes = self._job.store.plan.total_bytes
            base = slots.address + slot_bytes if slots else peer.base_address
        return Pushed(
            rank=peer.rank,
            session=peer.session,
            round=push.round,
            seq=push.seq,
            slots=slots.bytes if slots else None,
            slots_address=slots.address if slots else 0,
            base_address=base,
            samples=push.samples,
            grad_scale=push.grad_scale,
            finite=push.finite,
            hold=push.hold,
            absent=absent,
            hypers=hypers,
            remote=slots is None,
            base=peer.base,
        )


def _check_weights(samples: float, grad_scale: float) -> None:
    weight = samples / grad_scale if grad_scale > 0 else -1.0
    if samples != 0 and not (m.in_range(samples) and m.in_range(weight)):
        raise ProtocolError(f"samples={samples}, grad_scale={grad_scale}")
