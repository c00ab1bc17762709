"""A node's rounds on their way: one gradient up to the hub of all nodes, its answer back.

Nothing here waits. `hand_over` is given what an ordinary engine would apply, and `answered` tells
what has come back since it was asked last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from zps.codec.plan import Plan
from zps.errors import ProtocolError
from zps.hub.store import Hypers, Pushed, Update
from zps.memory.control import Control, Outcome
from zps.relay.store import NodeStore
from zps.relay.upstream import Upstream
from zps.wire import messages as m
from zps.wire.hypers import pack_hypers
from zps.wire.sockets import Frame
from zps.worker.encoder import Encoder
from zps.worker.link import PushInfo
from zps.worker.message_link import MessageLink

_Pushes = tuple[tuple[int, int], ...]  # (rank, seq) of each

_MOST_SAMPLES = 1e30  # what a push may carry; a sum over the workers may lie just above


class NodeLink(MessageLink):
    """The link upstream, whose weights are the arena that the node's workers read."""

    def __init__(self, session: Upstream, store: NodeStore, attach: m.Attach):
        agreed = session.agreed
        plan = Plan.build(store.layout, agreed.push_codecs, agreed.compression_min_bytes)
        back = Plan.build(store.layout, agreed.pull_codecs, agreed.compression_min_bytes)
        super().__init__(
            session,
            plan,
            attach,
            way_back=back,
            weights=store.weights.bytes,
            slots=store.slots if plan.identity else None,
        )
        self._encoder = None if plan.identity else Encoder(plan, self.slots, stream=session.rank)
        self._gradients = store.slots
        self._control: Control = store.control
        self._steps = store.control.steps
        self.consumed: list[tuple[int, int, Outcome]] = []
        """(push, bucket, outcome) of what has come back since whoever reads it cleared it."""

    def lay(self, buckets: Sequence[int]) -> None:
        """Encode the gradients of these buckets into the slots, if they are to be encoded."""
        if self._encoder is not None:
            for bucket in buckets:
                self._encoder.encode_bucket(bucket, self._gradients)

    def has_left(self, buckets: Sequence[int], info: PushInfo) -> None:
        """What was laid is on its way: what it lost comes next time."""
        if self._encoder is None:
            return
        if info.finite and info.samples > 0:
            absent = () if info.absent is None else info.absent.tolist()
            self._encoder.commit(buckets, 1.0, absent=absent)
        else:
            self._encoder.withhold(buckets)

    def _take_weights(self, message: m.Weights, payload: list[Frame]) -> None:
        push, bucket = message.push, message.bucket
        if push is None or bucket >= len(self._control.seq):
            super()._take_weights(message, payload)  # nobody reads: all are in a collective
            return
        self._control.seq[bucket] += 1  # odd: readers retry
        super()._take_weights(message, payload)
        self._control.seq[bucket] += 1
        outcome = Outcome(message.outcome)
        if self._encoder is not None and outcome is not Outcome.APPLIED:
            self._encoder.revert((bucket,))
        self.consumed.append((push, bucket, outcome))


class Forward:
    """The way of one job's updates between a node's store and the hub of all nodes."""

    def __init__(self, upstream: Upstream, store: NodeStore, hypers: Hypers):
        """hypers: what was declared upstream."""
        self._upstream = upstream
        self._store = store
        self._link: NodeLink | None = None
        self._told = pack_hypers(hypers.groups, hypers.max_grad_norm)
        self._last = hypers
        self._under_way: dict[tuple[int, int], Update] = {}  # by (push, bucket)

    @property
    def attached(self) -> bool:
        """Whether the hub of all nodes has taken the declaration."""
        return self._link is not None

    def owes(self) -> int:
        """How many buckets that were pushed the hub of all nodes has yet to ask for."""
        return 0 if self._link is None else self._link.owes

    def attach(self, attach: m.Attach) -> None:
        """It has: rounds may go up from now on."""
        self._link = NodeLink(self._upstream, self._store, attach)

    # --- rounds -------------------------------------------------------------------------------

    def hand_over(self, updates: list[Update]) -> None:
        """Push the mean of each update's gradients; those of the same workers go together."""
        assert self._link is not None, "a push before the job has formed"
        self._store.reduce(updates)
        together: defaultdict[tuple[int, _Pushes], list[Update]] = defaultdict(list)
        for update in sorted(updates, key=lambda update: update.bucket):
            pushes = tuple((c.rank, c.seq) for c in update.contributions)
            together[update.round, pushes].append(update)
        for alike in together.values():
            info = self._info(alike[0].contributions)
            buckets = [update.bucket for update in alike]
            self._link.lay(buckets)
            seqs = self._link.push(alike[0].round, np.array(buckets, np.uint32), info).tolist()
            self._link.has_left(buckets, info)
            self._under_way |= dict(zip(zip(seqs, buckets, strict=True), alike, strict=True))

    def answered(self) -> list[tuple[Update, Outcome]]:
        """What has come back: the weights of these buckets lie in the arena."""
        if self._link is None:
            return []
        consumed, self._link.consumed = self._link.consumed, []
        found = [
            (self._under_way.pop((push, bucket), None), outcome)
            for push, bucket, outcome in consumed
        ]
        return [(update, outcome) for update, outcome in found if update is not None]

    def _info(self, contributions: Sequence[Pushed]) -> PushInfo:
        counted = [c for c in contributions if c.samples > 0]
        if not counted:
            return PushInfo(
                samples=0.0,
                finite=all(c.finite for c in contributions),
                hold=any(c.hold for c in contributions),
            )
        absent = counted[0].absent.intersection(*(c.absent for c in counted))
        return PushInfo(
            samples=min(sum(c.samples for c in counted), _MOST_SAMPLES),
            finite=all(c.finite for c in contributions),
            hold=any(c.hold for c in contributions),
            hypers=self._changed(counted[0].hypers),
            absent=_sorted(absent) if absent else None,
        )

    def _changed(self, hypers: Hypers) -> bytes | None:
        """The hyperparameters as they travel, if they are not what was said last."""
        if hypers is self._last:
            return None
        data = pack_hypers(hypers.groups, hypers.max_grad_norm)
        self._last = hypers
        if data == self._told:
            return None
        self._told = data
        return data

    # --- weights and buffers ------------------------------------------------------------------

    def upload(self) -> None:
        """Send the arena, weights and extras, up for the next PUBLISH."""
        layout, arena = self._store.layout, self._store.weights.bytes
        for bucket in layout.buckets:
            self._write("published", bucket.index, arena[bucket.byte :][: bucket.nbytes])
        for index, extra in enumerate(layout.extras):
            self._write("extra", index, arena[layout.extra_bytes[index] :][: extra.nbytes])

    def download(self, then: Callable[[], None]) -> None:
        """Bring weights and extras into the arena, then call."""
        layout = self._store.layout
        parts = range(0, len(layout.buckets), m.MAX_PUSH_BUCKETS)
        left = len(parts) + len(layout.extras)

        def one_less(*_: object) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                then()

        def take(index: int, _: m.Message, payload: list[Frame]) -> None:
            self._store.write_extra(index, b"".join(payload))
            one_less()

        for at in parts:
            buckets = list(range(at, min(at + m.MAX_PUSH_BUCKETS, len(layout.buckets))))
            fields = {"buckets": buckets, "whole": True}
            self._upstream.ask(m.Pull, fields=fields, then=one_less)
        for index in range(len(layout.extras)):
            extra = {"what": "extra", "field": "", "index": index}
            self._upstream.ask(m.Read, fields=extra, then=partial(take, index))
        if not left:
            then()

    def download_steps(self, then: Callable[[], None]) -> None:
        """Bring the step counts up to date, which somebody may have set, then call."""

        def take(_: m.Message, payload: list[Frame]) -> None:
            data = b"".join(payload)
            steps = self._store.control.steps
            if len(data) != steps.nbytes:
                raise ProtocolError(f"{len(data)} bytes of step counts, not {steps.nbytes}")
            steps[:] = np.frombuffer(data, np.int64)
            then()

        fields = {"what": "steps", "field": "", "index": 0}
        self._upstream.ask(m.Read, fields=fields, then=take)

    def _write(self, what: str, index: int, data: NDArray[np.uint8]) -> None:
        limit = self._upstream.settings.bucket_bytes
        chunks = [data[at : at + limit].data for at in range(0, len(data), limit)]
        fields = {"what": what, "field": "", "index": index}
        self._upstream.ask(m.Write, *chunks, fields=fields)


def _sorted(absent: frozenset[int]) -> NDArray[np.uint32]:
    return np.array(sorted(absent), np.uint32)
