"""Rounds that go by without the event loop: see `native.Lane`.

Most rounds of a job in step are alike: everyone rings for the same one, and nothing else is new. As
long as that lasts, native code watches the bells and carries the rounds out. Whatever else happens
(a message, a death, a push with more to say) comes back here, and finds the engine as if it had
taken every push itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from zps import native
from zps.hub.job import Job, Peer
from zps.hub.roster import Roster
from zps.hub.store import Hypers, Pushed
from zps.trace import Tracer


class Due(NamedTuple):
    """A round that needs no decision, and everyone in it, in rank order."""

    round: int
    peers: list[Peer]


class Express:
    """The express rounds of one job.

    plain    a push of every bucket by this worker, with nothing to tell: see `Pushes.plain`
    doorway  the pipe whose words say that somebody has rung
    """

    def __init__(
        self,
        job: Job,
        roster: Roster,
        pool: native.Pool,
        tracer: Tracer,
        *,
        plain: Callable[[Peer], Pushed],
        doorway: int,
    ):
        self._job = job
        self._roster = roster
        self._pool = pool
        self._tracer = tracer
        self._plain = plain
        self._doorway = doorway
        self._lane: native.Lane | None = None
        self._made_for: tuple[int, ...] = ()
        self._hypers: Hypers | None = None

    def due(self) -> Due | None:
        """The next round, if it may be one of these."""
        round_ = self._job.engine.at_rest()
        peers = [] if round_ is None else self._members()
        return Due(round_, peers) if round_ is not None and peers else None

    def run(self, due: Due, elsewhere: Sequence[int], timeout_s: float) -> None:
        """Carry out rounds until something else is to be done.

        due        the first of them; nothing has come since it was found out
        elsewhere  descriptors that end it when they are readable
        """
        round_, peers = due
        lane = self._lane_of(peers)
        before = [peer.heard for peer in peers]
        lane.run(round_, before, self._doorway, elsewhere, int(timeout_s * 1e9))
        for peer, heard in zip(peers, lane.heard, strict=True):
            if heard != peer.heard:
                peer.last_seq = peer.heard = heard
        times = lane.times
        self._job.engine.advance(len(times))
        for begin_ns, applied_ns, end_ns in times:
            self._tracer.add("apply", begin_ns, applied_ns)
            self._tracer.add("reply", applied_ns, end_ns)

    def _members(self) -> list[Peer]:
        """Everyone, in rank order; nobody unless what each pushed last was an ordinary ring."""
        peers = []
        for rank in self._job.engine.rounds.members:
            peer = self._roster.of_rank(rank)
            if peer is None or not peer.rings or peer.bell is None or peer.hypers is None:
                return []
            peers.append(peer)
        clipped = peers and peers[0].hypers and peers[0].hypers.max_grad_norm is not None
        return [] if clipped else peers

    def _lane_of(self, peers: Sequence[Peer]) -> native.Lane:
        """The lane for these members; another one if the jobs have served other rounds since."""
        store, control = self._job.store, self._job.control
        made_for = (self._job.engine.applied, *(peer.session for peer in peers))
        hypers = peers[0].hypers  # the lowest rank's are those of the round
        if self._lane is None or made_for != self._made_for or hypers is not self._hypers:
            jobs, steps = store.whole_round([self._plain(peer) for peer in peers])
            members = [
                (peer.bell.address, control.done_address(peer.rank)) for peer in peers if peer.bell
            ]
            self._lane = native.Lane(
                self._pool,
                jobs,
                steps,
                members,
                control.closed_address,
                control.signal_address,
                divides=store.divides,
            )
            self._made_for, self._hypers = made_for, hypers
        return self._lane
