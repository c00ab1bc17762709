"""Gradients and weights of workers that share no memory with the hub: all of it in messages.

A push is announced by its header. The bytes of a bucket come with it when they are few; otherwise
the hub asks for them when it has room (`core.intake`), reads them where they arrived, and answers
each consumed bucket with its new weights.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from zps import native
from zps.codec.plan import Plan
from zps.core.intake import Intake
from zps.errors import ProtocolError
from zps.hub.held import Held
from zps.hub.job import Job, Peer
from zps.hub.roster import Roster
from zps.hub.store import Pushed
from zps.memory.control import Outcome
from zps.memory.deltas import Deltas
from zps.wire import messages as m
from zps.wire.sockets import Frame, Router

Bytes = NDArray[np.uint8]

_ALIGN_BYTES = 8  # of what the kernels read; every allocator gives as much


@dataclass(slots=True, eq=False)
class _Announced:
    """One push of a peer; `bases` are the versions its buckets were computed on."""

    peer: Peer
    pushed: Pushed
    bases: dict[int, int]


@dataclass(slots=True, eq=False)
class _Answer:
    """A bucket's weights for one peer: after its push, or because it asked (push is None)."""

    bucket: int
    push: int | None
    outcome: Outcome = Outcome.APPLIED
    whole: bool = False  # it asked for the values themselves


class Courier:
    """What travels between one job and its remote workers."""

    def __init__(
        self,
        job: Job,
        roster: Roster,
        router: Router,
        *,
        budget: int,
        in_step: bool,
        way_back: Plan,
    ):
        """
        budget    bytes of gradients to hold at a time, and as many of copied weights on their way,
                  which the workers share evenly
        in_step   a bucket does not change before every worker has had its weights
        way_back  how weights are encoded
        """
        self._job = job
        self._plan = job.store.plan
        self._checks = _checks(self._plan)
        self._roster = roster
        self._router = router
        self._in_step = in_step
        self._deltas = None if way_back.identity else Deltas(way_back)
        self._held = Held(job, self._deltas) if self._deltas is not None and in_step else None
        self._budget = budget
        self._intake = Intake(budget)
        self._copies: dict[int, list[weakref.ref[Bytes]]] = {}  # by session; gone once they left
        self._open: dict[tuple[int, int], _Announced] = {}  # by (session, bucket)
        self._outbox: defaultdict[int, deque[_Answer | m.Message]] = defaultdict(deque)
        self._pulling: Counter[int] = Counter()  # buckets that each session still waits for
        self._unreachable: list[int] = []

    # --- from workers -------------------------------------------------------------------------

    def is_open(self, session: int, bucket: int) -> bool:
        """Whether a push of this bucket has not been answered yet."""
        return (session, bucket) in self._open

    def push(self, peer: Peer, pushed: Pushed, push: m.Push, payload: Sequence[Frame]) -> None:
        """Take a push that has passed the hub's checks; `payload` are its buckets if it has them.

        Raises ProtocolError, without effect, when they are not what the layout says.
        """
        expected = len(push.buckets) if push.inline else 0
        if len(payload) != expected:
            raise ProtocolError(f"{len(payload)} payloads came with a push that has {expected}")
        arrays = [
            self._bytes_of(bucket, [frame])
            for bucket, frame in zip(push.buckets, payload, strict=push.inline)
        ]
        rounds = self._job.engine.rounds
        for bucket, base in zip(push.buckets, push.bases, strict=True):
            rounds.check(peer.rank, push.round, bucket, base)
        announced = _Announced(peer, pushed, dict(zip(push.buckets, push.bases, strict=True)))
        whole = self._job.engine.expect_remote(pushed.hypers, hold=pushed.hold)
        for bucket in push.buckets:
            self._open[peer.session, bucket] = announced
        if push.inline:
            for bucket, array in zip(push.buckets, arrays, strict=True):
                self._deliver(announced, bucket, array)
        else:
            for bucket in push.buckets:
                nbytes = int(self._plan.bucket_nbytes[bucket])
                self._intake.announce(peer.rank, push.round, bucket, nbytes, whole=whole)

    def data(self, peer: Peer, data: m.Data, payload: Sequence[Frame]) -> None:
        """Take the bytes of an announced bucket. Raises ProtocolError, without effect."""
        announced = self._open.get((peer.session, data.bucket))
        if announced is None or announced.pushed.seq != data.push:
            raise ProtocolError(f"bytes of bucket {data.bucket} that nobody announced")
        array = self._bytes_of(data.bucket, payload)
        base = announced.bases[data.bucket]
        self._job.engine.rounds.check(peer.rank, announced.pushed.round, data.bucket, base)
        if not self._intake.arrived(peer.rank, announced.pushed.round, data.bucket):
            raise ProtocolError(f"bytes of bucket {data.bucket} that nobody asked for")
        self._deliver(announced, data.bucket, array)

    def pull(self, peer: Peer, pull: m.Pull) -> None:
        """Send buckets as they are now, then OK. Raises ProtocolError for one there is not."""
        for bucket in pull.buckets:
            if bucket >= len(self._job.layout.buckets):
                raise ProtocolError(f"no bucket {bucket}")
        if self._pulling[peer.session] + len(pull.buckets) > len(self._job.layout.buckets):
            raise ProtocolError("pulls of more buckets than there are, before they were answered")
        self._pulling[peer.session] += len(pull.buckets)
        self._outbox[peer.session] += [
            _Answer(bucket, None, whole=pull.whole) for bucket in pull.buckets
        ]
        self._outbox[peer.session].append(m.Ok(seq=pull.seq))

    def remembers_peers(self) -> bool:
        """Whether it has to be known of each peer what it holds."""
        return self._deltas is not None and not self._in_step

    def published(self) -> None:
        """All workers are about to take over the weights as they are."""
        if self._held is not None:
            self._held.reset()

    def forget(self, peer: Peer) -> None:
        """The peer has gone: nothing comes from it, nothing goes to it."""
        self._intake.forget(peer.rank)
        self._outbox.pop(peer.session, None)
        del self._pulling[peer.session]
        self._copies.pop(peer.session, None)
        if self._held is not None:
            self._held.forget(peer.session)
        for key in [key for key in self._open if key[0] == peer.session]:
            del self._open[key]

    # --- to workers ---------------------------------------------------------------------------

    def turn(self) -> None:
        """Answer what has been consumed, ask for what there is room for, send what can be sent."""
        engine = self._job.engine
        if not (self._open or self._outbox or engine.released or engine.consumed):
            return  # nobody is served by messages
        for pushed, bucket in engine.released:
            self._intake.consumed(pushed.rank, pushed.round, bucket)
        engine.released.clear()
        for pushed, bucket, outcome in engine.consumed:
            if self._open.pop((pushed.session, bucket), None) is not None:
                self._answer(pushed, bucket, outcome)
        engine.consumed.clear()
        self._ask()
        for session in list(self._outbox):
            self._send_some(session)

    def unreachable(self) -> list[int]:
        """Sessions that a message could not be delivered to since the last call."""
        found, self._unreachable = self._unreachable, []
        return found

    @property
    def backlog(self) -> bool:
        """Whether something waits for room in a socket."""
        return bool(self._outbox)

    # --- parts --------------------------------------------------------------------------------

    def _bytes_of(self, bucket: int, frames: Sequence[Frame]) -> NDArray[np.uint8]:
        """What arrived, whole and aligned; as it lies if it is so already."""
        sizes = self._plan.bucket_nbytes
        expected = int(sizes[bucket]) if bucket < len(sizes) else 0
        came = sum(len(frame) for frame in frames)
        if came != expected:
            raise ProtocolError(
                f"{came} bytes came for bucket {bucket}, which has {expected}: nothing was taken"
            )
        arrays = [np.frombuffer(frame, np.uint8) for frame in frames]
        if len(arrays) == 1 and arrays[0].ctypes.data % _ALIGN_BYTES == 0:
            whole = arrays[0]
        else:
            whole = _aligned(expected)
            np.concatenate(arrays, out=whole)
        for name, offset, encoding in self._checks.get(bucket, ()):
            if wrong := encoding.check(int(whole.ctypes.data) + offset):
                raise ProtocolError(f"the encoded gradient of {name!r}: {wrong}: nothing was taken")
        return whole

    def _deliver(self, announced: _Announced, bucket: int, array: NDArray[np.uint8]) -> None:
        offset = int(self._plan.bucket_offset[bucket])
        pushed = replace(announced.pushed, slots=array, slots_address=array.ctypes.data - offset)
        self._job.engine.push(pushed, (bucket,), (announced.bases[bucket],))

    def _answer(self, pushed: Pushed, bucket: int, outcome: Outcome) -> None:
        queue = self._outbox[pushed.session]
        if self._in_step:
            queue.append(_Answer(bucket, pushed.seq, outcome))
            return
        last = queue[-1] if queue else None
        if not isinstance(last, m.Consumed) or last.push != pushed.seq:
            last = m.Consumed(push=pushed.seq, buckets=[], outcomes=[])
            queue.append(last)
        last.buckets.append(bucket)
        last.outcomes.append(int(outcome))

    def _ask(self) -> None:
        wanted: defaultdict[tuple[int, int], list[int]] = defaultdict(list)  # (session, push)
        rounds = self._job.engine.rounds
        for ask in self._intake.next(rounds.would_close, rounds.would_keep):
            peer = self._roster.of_rank(ask.rank)
            assert peer is not None, "a peer that has gone was not forgotten"
            push = self._open[peer.session, ask.bucket].pushed.seq
            wanted[peer.session, push].append(ask.bucket)
        for (session, push), buckets in wanted.items():
            self._outbox[session].appendleft(m.Fetch(push=push, buckets=buckets))

    def _send_some(self, session: int) -> None:
        peer = self._roster.of_session(session)
        queue = self._outbox[session]
        while queue and peer is not None and self._router.is_clear(peer.route):
            if not self._has_room_for(session, queue[0]):
                break
            item = queue.popleft()
            frames = self._frames(peer, item) if isinstance(item, _Answer) else [m.encode(item)]
            if isinstance(item, _Answer) and item.push is None:
                self._pulling[session] -= 1
            if not self._router.send(peer.route, frames):
                self._unreachable.append(session)
                peer = None
        if not queue or peer is None:
            del self._outbox[session]

    def _has_room_for(self, session: int, item: _Answer | m.Message) -> bool:
        """Whether its copy may be made: a socket takes many before it says that it is full.

        Each session has its share of the budget, so that one that does not read keeps none of the
        others waiting.
        """
        if not isinstance(item, _Answer) or item.push is not None:
            return True
        nbytes = self._job.layout.buckets[item.bucket].nbytes
        own = self._copies.get(session, ())
        sizes = [copy.nbytes for ref in own if (copy := ref()) is not None]
        remote = sum(peer.slots is None for peer in self._roster)
        return not sizes or sum(sizes) + nbytes <= self._budget // remote

    def _frames(self, peer: Peer, answer: _Answer) -> list[Frame]:
        """Made at the last moment: what waits for room takes none."""
        job, bucket = self._job, answer.bucket
        spec = job.layout.buckets[bucket]
        data, coded = self._data(peer, answer)
        header = m.Weights(
            bucket=bucket,
            version=int(job.control.seq[bucket]) >> 1,
            closed=int(job.control.closed[bucket]),
            over=int(job.control.closed.min()),
            push=answer.push,
            outcome=int(answer.outcome),
            coded=coded,
        )
        steps = job.control.steps[spec.pieces.start : spec.pieces.stop]
        return [m.encode(header), steps.tobytes(), data.data]

    def _data(self, peer: Peer, answer: _Answer) -> tuple[Bytes, bool]:
        """What a peer is sent of a bucket, and whether that is an encoded difference."""
        if self._held is not None:
            return self._held.answer(peer.session, answer.bucket, whole=answer.whole)
        if self._deltas is not None and not answer.whole:
            assert peer.base is not None
            delta = self._deltas.encode(answer.bucket, self._job.store.weights.bytes, peer.base)
            if delta is not None:
                return delta, True
        return self._values(peer, answer), False

    def _values(self, peer: Peer, answer: _Answer) -> Bytes:
        spec = self._job.layout.buckets[answer.bucket]
        weights = self._job.store.published(answer.bucket)
        if peer.base is not None:
            peer.base[spec.byte : spec.byte + spec.nbytes] = weights
        # The answer to a push cannot change before it has left: the peer pushes again only then.
        return weights if answer.push is not None else self._copy(peer.session, weights)

    def _copy(self, session: int, weights: Bytes) -> Bytes:
        copied = weights.copy()
        there = [ref for ref in self._copies.get(session, ()) if ref() is not None]
        self._copies[session] = [*there, weakref.ref(copied)]
        return copied


def _checks(plan: Plan) -> dict[int, list[tuple[str, int, native.Encoding]]]:
    """For each bucket, what of it can be wrong: (parameter, offset, encoding)."""
    found: defaultdict[int, list[tuple[str, int, native.Encoding]]] = defaultdict(list)
    for index, piece in enumerate(plan.layout.pieces):
        codec = plan.table[plan.codec_index[index]]
        if codec["kind"] == native.KIND["topk"]:
            param = plan.layout.params[piece.param]
            encoding = native.Encoding(codec, piece.count, native.DTYPE[param.dtype])
            found[piece.bucket].append((param.name, int(plan.piece_offset[index]), encoding))
    return dict(found)


def _aligned(nbytes: int) -> NDArray[np.uint8]:
    raw = np.empty(nbytes + _ALIGN_BYTES, np.uint8)
    start = -raw.ctypes.data % _ALIGN_BYTES
    return raw[start : start + nbytes]
