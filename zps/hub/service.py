"""A job and all that serves it, and what a worker gets when it takes part."""

from __future__ import annotations

from dataclasses import dataclass

from zps import native
from zps.codec.plan import Plan
from zps.config import Settings
from zps.hub.courier import Courier
from zps.hub.express import Express
from zps.hub.job import Declaration, Job, Peer, Refused
from zps.hub.pushes import Pushes
from zps.hub.roster import Roster
from zps.memory.bell import Bell, Doorway
from zps.memory.segment import Segment, private_bytes
from zps.trace import Tracer
from zps.wire import messages as m
from zps.wire.sockets import Router


@dataclass(frozen=True, slots=True)
class Service:
    """What exists beside a job for as long as it does.

    courier     messages of weights and gradients
    pushes      what has been pushed, by message or by bell, on its way into the engine
    express     rounds that need no decision
    keeps_base  gradients are compensated for the weights they were computed on, so both are kept
    """

    job: Job
    courier: Courier
    pushes: Pushes
    express: Express
    doorway: Doorway
    keeps_base: bool

    @classmethod
    def open(
        cls,
        job: Job,
        settings: Settings,
        roster: Roster,
        router: Router,
        *,
        pool: native.Pool,
        tracer: Tracer,
        doorway: Doorway,
    ) -> Service:
        keeps_base = settings.staleness_policy == "dc"
        courier = Courier(
            *(job, roster, router),
            budget=settings.hub_buffer_bytes,
            in_step=settings.mode == "bsp" and settings.quorum == 1,
            way_back=Plan.build(job.layout, settings.pull_codecs, settings.compression_min_bytes),
        )
        pushes = Pushes(job, courier, tracer, keeps_base=keeps_base)
        express = Express(*(job, roster, pool, tracer), plain=pushes.plain, doorway=doorway.inner)
        return cls(job, courier, pushes, express, doorway, keeps_base)

    def equip(self, peer: Peer, *, shared: bool) -> None:
        """Slots in memory that both see, or else room for what has to be remembered of it.

        Raises OutOfMemory.
        """
        layout, store = self.job.layout, self.job.store
        if shared and peer.pidfd >= 0:
            if peer.slots is None:
                nbytes = store.plan.total_bytes + (layout.arena_bytes if self.keeps_base else 0)
                peer.slots = Segment.create(f"slots-{peer.rank}", nbytes)
                peer.bell = Bell.create(peer.rank, len(layout.buckets))
            return
        peer.share_nothing()  # it could not map what it was offered
        assert peer.hypers is not None
        self.job.engine.expect_remote(peer.hypers)  # may refuse, before anything is kept for it
        if peer.base is None and (self.keeps_base or self.courier.remembers_peers()):
            peer.base = private_bytes(layout.arena_bytes, f"what rank {peer.rank} holds")

    def attachment(self, peer: Peer, seq: int, *, formed: bool) -> m.Attach:
        """The answer to a worker's request `seq` to take part: where everything lies."""
        shared = peer.slots is not None
        return m.Attach(
            seq=seq,
            control=_at(self.job.control.segment) if shared else None,
            weights=_at(self.job.store.weights) if shared else None,
            slots=_at(peer.slots) if peer.slots else None,
            bell=_at(peer.bell.segment) if peer.bell else None,
            doorway=self.doorway.outer if peer.bell else None,
            first_round=peer.first_round,
            formed=formed,
        )


def check_repeated(peer: Peer, declared: Declaration, *, shared: bool) -> None:
    """Raise Refused if a peer that has declared says something else now.

    It may change to messages, when it cannot map what it was offered, until it is at work.
    """
    first = peer.first_hypers
    assert first is not None
    if declared.hypers.groups != first.groups:
        raise Refused(
            "declared",
            f"rank {peer.rank} has declared other hyperparameters; new ones come with a push",
        )
    if shared != peer.shares and peer.at_work:
        agreed = "shared memory" if peer.shares else "messages"
        raise Refused("declared", f"rank {peer.rank} is at work over {agreed}, and stays with that")


def _at(segment: Segment) -> m.SegmentAt:
    ref = segment.ref
    return m.SegmentAt(pid=ref.pid, fd=ref.fd, nbytes=ref.nbytes)
