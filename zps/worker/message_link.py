"""The link of a worker that shares no memory with its hub: gradients and weights are messages.

The worker has slots and weights of its own. A small push takes its gradients along; for a large one
the hub asks bucket by bucket, when it has room, and a bucket is sent from where it lies. What comes
back is written into the weights while somebody waits for it: they change at no other time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from zps.codec.plan import Plan
from zps.errors import ProtocolError, WaitTimeout
from zps.memory.control import Outcome, done_target, done_word, outcomes_of
from zps.memory.deltas import Deltas
from zps.memory.segment import private_bytes
from zps.wire import messages as m
from zps.wire.sockets import Frame
from zps.worker.link import PushInfo, push_in_parts
from zps.worker.session import Payload, Session

INLINE_BYTES = 256 << 10  # a round trip costs more than a hub that holds as much of every worker
_SLICE_S = 0.1  # how long Ctrl-C and a dead hub may go unnoticed


class MessageLink:
    """See `Link`."""

    private = True

    def __init__(
        self,
        session: Session,
        plan: Plan,
        attach: m.Attach,
        *,
        way_back: Plan,
        weights: NDArray[np.uint8] | None = None,
        slots: NDArray[np.uint8] | None = None,
    ):
        """
        way_back        how weights are encoded
        weights, slots  memory to use, as `Link` describes it; None: of this link's own
        """
        self._session = session
        self._plan = plan
        self._layout = layout = plan.layout
        self.first_round = attach.first_round
        self.formed = attach.formed
        count = len(layout.buckets)
        if weights is None:
            weights = private_bytes(layout.total_bytes, "the weights of this worker")
        if slots is None:
            slots = private_bytes(plan.total_bytes, "the gradients of this worker")
        self._weights, self._slots = weights, slots
        self._versions = np.zeros(count, np.int64)
        self._closed = np.zeros(count, np.int64)
        self._over = 0
        self._steps = np.zeros(len(layout.pieces), np.int64)
        self._done = np.zeros(count, np.uint64)
        self._announced: set[int] = set()  # buckets the hub has yet to ask for
        self._deltas = None if way_back.identity else Deltas(way_back)
        session.on_payload = self._on_payload

    # --- Link ---------------------------------------------------------------------------------

    @property
    def weights(self) -> NDArray[np.uint8]:
        return self._weights

    @property
    def slots(self) -> NDArray[np.uint8]:
        return self._slots

    @property
    def closed_rounds(self) -> NDArray[np.int64]:
        return self._closed

    @property
    def rounds_over(self) -> int:
        return self._over

    @property
    def steps(self) -> NDArray[np.int64]:
        return self._steps

    def push(self, round_: int, buckets: NDArray[np.uint32], info: PushInfo) -> NDArray[np.uint64]:
        return push_in_parts(buckets, lambda part: self._push(round_, part, info))

    def _push(self, round_: int, buckets: list[int], info: PushInfo) -> int:
        payload: list[Frame] = [] if info.hypers is None else [info.hypers]
        payload += [] if info.absent is None else [info.absent.tobytes()]
        inline = int(self._plan.bucket_nbytes[buckets].sum()) <= INLINE_BYTES
        if inline:
            payload += [bytes(self._slot(bucket)) for bucket in buckets]
        with self._session.sequenced() as seq:
            message = m.Push(
                **self._session.header(seq),
                round=round_,
                buckets=buckets,
                bases=self._versions[buckets].tolist(),
                samples=info.samples,
                grad_scale=info.grad_scale,
                finite=info.finite,
                hold=info.hold,
                hypers=info.hypers is not None,
                absent=info.absent is not None,
                inline=inline,
            )
            if not inline:
                self._announced.update(buckets)
            self._session.send(message, *payload)
        return seq

    def wait(self, buckets: NDArray[np.uint32], seqs: NDArray[np.uint64], timeout_s: float) -> None:
        targets = done_target(seqs)
        deadline = time.monotonic() + timeout_s
        while not (self._done[buckets] >= targets).all():
            elsewhere = self._session.attend()
            left_s = deadline - time.monotonic()
            if self._session.take(0.0 if elsewhere else min(_SLICE_S, max(0.0, left_s))):
                deadline = max(deadline, time.monotonic() + timeout_s)  # it moves on
            elif left_s <= 0:
                missing = int(buckets[np.flatnonzero(self._done[buckets] < targets)[0]])
                raise WaitTimeout(
                    f"rank {self._session.rank} waited {timeout_s:.3g} s for bucket {missing}"
                    f"{self._session.who_is_missing()}"
                )

    def done(self, buckets: NDArray[np.uint32], seqs: NDArray[np.uint64]) -> bool:
        targets = done_target(seqs)
        while not (self._done[buckets] >= targets).all():
            if not self._session.take(0):
                return False
        return True

    def listen(self, timeout_s: float) -> None:
        while self._session.take(timeout_s):
            timeout_s = 0.0

    def outcomes(self, buckets: NDArray[np.uint32]) -> NDArray[np.uint64]:
        return outcomes_of(self._done[buckets])

    def fetch(self, buckets: Sequence[int] | NDArray[np.uint32]) -> None:
        self._pull(buckets, whole=False)

    def _pull(self, buckets: Sequence[int] | NDArray[np.uint32], *, whole: bool) -> None:
        for at in range(0, len(buckets), m.MAX_PUSH_BUCKETS):
            part = [int(bucket) for bucket in buckets[at : at + m.MAX_PUSH_BUCKETS]]
            self._session.request(m.Pull, buckets=part, whole=whole)

    def upload(self) -> None:
        for bucket in self._layout.buckets:
            data = self._weights[bucket.byte : bucket.byte + bucket.nbytes]
            self._write("published", bucket.index, data)
        for index, extra in enumerate(self._layout.extras):
            byte = self._layout.extra_bytes[index]
            self._write("extra", index, self._weights[byte : byte + extra.nbytes])

    def download(self) -> None:
        self._pull(range(len(self._layout.buckets)), whole=True)
        for index, extra in enumerate(self._layout.extras):
            _, payload = self._session.request(m.Read, what="extra", field="", index=index)
            byte = self._layout.extra_bytes[index]
            _fill(self._weights[byte : byte + extra.nbytes], payload)

    def pull(self, bucket: int, out: NDArray[np.uint8]) -> int:
        spec = self._layout.buckets[bucket]
        out[:] = self._weights[spec.byte : spec.byte + spec.nbytes]
        return self.version(bucket)

    def version(self, bucket: int) -> int:
        return int(self._versions[bucket])

    def replica(self) -> NDArray[np.uint8] | None:
        return None

    @property
    def owes(self) -> int:
        return len(self._announced)

    def last_words(self) -> str:
        return ""

    def close(self) -> None:
        self._weights = self._slots = np.empty(0, np.uint8)

    # --- what the hub sends -------------------------------------------------------------------

    def _on_payload(self, message: Payload, payload: list[Frame]) -> None:
        if isinstance(message, m.Fetch):
            self._send_asked(message)
        elif isinstance(message, m.Weights):
            self._take_weights(message, payload)
        else:
            for bucket, outcome in zip(message.buckets, message.outcomes, strict=True):
                self._done[bucket] = done_word(message.push, Outcome(outcome))

    def _send_asked(self, fetch: m.Fetch) -> None:
        limit = self._session.settings.bucket_bytes
        for bucket in fetch.buckets:
            slot = self._slot(bucket)
            frames = [slot[at : at + limit] for at in range(0, len(slot), limit)]
            with self._session.sequenced() as seq:
                data = m.Data(**self._session.header(seq), push=fetch.push, bucket=bucket)
                # Not copied: the slot is this worker's again only when the hub has consumed it.
                self._session.send(data, *frames)
            self._announced.discard(bucket)

    def _take_weights(self, message: m.Weights, payload: list[Frame]) -> None:
        bucket = message.bucket
        if bucket >= len(self._layout.buckets) or not payload:
            raise ProtocolError(f"the hub sent weights of bucket {bucket}, or none")
        spec = self._layout.buckets[bucket]
        steps = np.frombuffer(payload[0], np.int64)
        if len(steps) != len(spec.pieces):
            raise ProtocolError(f"the hub sent {len(steps)} step counts for bucket {bucket}")
        if message.coded:
            if self._deltas is None:
                raise ProtocolError("the hub sent encoded weights, which were not agreed on")
            self._deltas.apply(bucket, _joined(payload[1:]), self._weights)
        else:
            _fill(self._weights[spec.byte : spec.byte + spec.nbytes], payload[1:])
        self._steps[spec.pieces.start : spec.pieces.stop] = steps
        self._versions[bucket] = message.version
        self._closed[bucket] = message.closed
        self._over = message.over
        if message.push is not None:
            self._done[bucket] = done_word(message.push, Outcome(message.outcome))

    # --- parts --------------------------------------------------------------------------------

    def _slot(self, bucket: int) -> memoryview:
        begin = self._plan.bucket_offset[bucket]
        return self._slots[begin : begin + self._plan.bucket_nbytes[bucket]].data

    def _write(self, what: str, index: int, data: NDArray[np.uint8]) -> None:
        limit = self._session.settings.bucket_bytes
        chunks = [bytes(data[at : at + limit]) for at in range(0, len(data), limit)]
        self._session.request(m.Write, *chunks, what=what, field="", index=index)


def _fill(target: NDArray[np.uint8], frames: Sequence[Frame]) -> None:
    came = sum(len(frame) for frame in frames)
    if came != len(target):
        raise ProtocolError(f"the hub sent {came} bytes where {len(target)} belong")
    at = 0
    for frame in frames:
        target[at : at + len(frame)] = np.frombuffer(frame, np.uint8)
        at += len(frame)


def _joined(frames: Sequence[Frame]) -> NDArray[np.uint8]:
    arrays = [np.frombuffer(frame, np.uint8) for frame in frames]
    return arrays[0] if len(arrays) == 1 else np.concatenate([np.empty(0, np.uint8), *arrays])
