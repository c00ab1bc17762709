"""The link of a worker that shares the hub's memory: slots and weights are mapped, nothing is sent
but small control messages, and waiting is a futex."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from zps import native
from zps.codec.plan import Plan
from zps.errors import Closed, ProtocolError, WaitTimeout
from zps.memory.bell import Bell, Knocker, Ring
from zps.memory.control import OUTCOME_BITS, Control, done_target, outcomes_of
from zps.memory.segment import Segment, SegmentRef
from zps.wire import messages as m
from zps.worker.link import PushInfo, push_in_parts
from zps.worker.session import Session

_ONE = np.uint64(1)
_ONE_BUCKET = np.zeros(1, np.uint32)
_NEVER = np.full(1, np.iinfo(np.uint64).max)  # no word of a bucket is ever that high
_SLICE_NS = 100_000_000  # how long Ctrl-C and a dead hub may go unnoticed
_PULL_TRIES = 1000
_PULL_S = 5.0
_BEAT_LATE_S = 3.0
_ENDING_S = 0.5


class ShmLink:
    """See `Link`. Raises ProtocolError when the hub's memory cannot be mapped here."""

    private = False

    def __init__(self, session: Session, plan: Plan, attach: m.Attach, *, aliased: bool):
        self._session = session
        self._layout = layout = plan.layout
        self._slot_bytes = plan.total_bytes
        self.first_round = attach.first_round
        self.formed = attach.formed
        assert attach.control is not None
        assert attach.weights is not None
        assert attach.slots is not None
        assert attach.bell is not None
        try:
            control = _attach(attach.control, writable=False)
            self._weights = _attach(attach.weights, writable=True)
            self._slots = _attach(attach.slots, writable=True)
            self._bell = Bell(_attach(attach.bell, writable=True), len(layout.buckets))
            self._knocker = _knocker(attach, session.rank)
        except ProtocolError:
            session.check_alive(_ENDING_S)  # the hub may be ending since it answered
            raise
        self._control = Control(
            control,
            world_size=session.world_size,
            buckets=len(layout.buckets),
            pieces=len(layout.pieces),
        )
        self._control.check(session.welcome.epoch)
        for segment, needed in (
            (self._weights, layout.total_bytes),
            (self._slots, plan.total_bytes),
        ):
            if segment.nbytes < needed:
                raise ProtocolError(f"the hub's arena has {segment.nbytes} bytes, not {needed}")
        self._aliased = aliased
        self._rung = np.uint64(0)  # the word that says the last push by the bell is consumed
        self._base = np.zeros(len(layout.buckets), np.uint64)
        self._done = self._control.done_address(session.rank)
        self._done_words = self._control.done[session.rank]
        self._mail = self._control.mail_address(session.rank)

    # --- Link ---------------------------------------------------------------------------------

    @property
    def weights(self) -> NDArray[np.uint8]:
        return self._weights.bytes

    @property
    def slots(self) -> NDArray[np.uint8]:
        return self._slots.bytes

    def push(
        self, round_: int, buckets: NDArray[np.uint32], info: PushInfo
    ) -> int | NDArray[np.uint64]:
        all_again = len(buckets) == len(self._base) and info.hypers is None and info.absent is None
        if all_again and self._done_words[0] >= self._rung:
            return self._ring(round_, info)
        return push_in_parts(buckets, lambda part: self._send(round_, part, info))

    def _ring(self, round_: int, info: PushInfo) -> int:
        """Push all buckets by the bell."""
        bases = self._control.seq >> _ONE if self._aliased else self._base
        weight, scale, finite, hold = info.samples, info.grad_scale, info.finite, info.hold
        session = self._session
        with session.sequenced() as seq:
            self._bell.write(Ring(seq, session.sent, round_, weight, scale, finite, hold), bases)
            self._rung = np.uint64(seq << OUTCOME_BITS)
            self._knocker.knock()
        return seq

    def _send(self, round_: int, buckets: list[int], info: PushInfo) -> int:
        """Push by a message."""
        payload = [] if info.hypers is None else [info.hypers]
        payload += [] if info.absent is None else [info.absent.tobytes()]
        welcome = self._session.welcome
        bases = self._versions(buckets) if self._aliased else self._base[buckets]
        with self._session.sequenced() as seq:
            message = m.Push(
                epoch=welcome.epoch,
                session=welcome.session,
                seq=seq,
                round=round_,
                buckets=buckets,
                bases=bases.tolist(),
                samples=info.samples,
                grad_scale=info.grad_scale,
                finite=info.finite,
                hold=info.hold,
                hypers=info.hypers is not None,
                absent=info.absent is not None,
            )
            self._session.send(message, *payload)
        return seq

    def wait(self, buckets: NDArray[np.uint32], seqs: NDArray[np.uint64], timeout_s: float) -> None:
        targets = done_target(seqs)
        deadline = time.monotonic() + timeout_s
        session, control = self._session, self._control
        while True:
            mail = int(control.mail[session.rank])
            if session.received < mail:
                session.collect(mail)
            elsewhere = session.attend()
            left_ns = int(max(0.0, deadline - time.monotonic()) * 1e9)
            result = native.wait(
                control.signal_address,
                self._done,
                buckets,
                targets,
                self._mail,
                mail & 0xFFFFFFFF,
                session.settings.spin_us,
                0 if elsewhere else min(_SLICE_NS, left_ns),
            )
            if result is native.Waited.REACHED:
                return
            session.check_usable()
            session.check_alive()
            if left_ns == 0:
                raise WaitTimeout(
                    f"rank {session.rank} waited {timeout_s:.3g} s for bucket "
                    f"{self._first_missing(buckets, targets)}{self._why()}"
                )

    def done(self, buckets: NDArray[np.uint32], seqs: NDArray[np.uint64]) -> bool:
        return self._first_missing(buckets, done_target(seqs)) is None

    def listen(self, timeout_s: float) -> None:
        session, control = self._session, self._control
        mail = int(control.mail[session.rank])
        if session.received >= mail:
            signal, spin_us = control.signal_address, session.settings.spin_us
            word = mail & 0xFFFFFFFF
            native.wait(
                signal, self._done, _ONE_BUCKET, _NEVER, self._mail, word, spin_us,
                int(timeout_s * 1e9),
            )  # fmt: skip
        session.collect(int(control.mail[session.rank]))

    def outcomes(self, buckets: NDArray[np.uint32]) -> NDArray[np.uint64]:
        return outcomes_of(self._done_words[buckets])

    def fetch(self, buckets: Sequence[int] | NDArray[np.uint32]) -> None:
        pass

    def upload(self) -> None:
        pass

    def download(self) -> None:
        pass

    def pull(self, bucket: int, out: NDArray[np.uint8]) -> int:
        spec, control = self._layout.buckets[bucket], self._control
        # Held here, so that a thread that closes this link cannot take the memory from under us.
        source = self._weights.bytes[spec.byte : spec.byte + spec.nbytes]
        if len(source) < spec.nbytes:
            raise Closed(f"rank {self._session.rank} is closed")
        deadline = time.monotonic() + _PULL_S
        while True:
            version = native.pull(
                control.seq_address(bucket),
                source.ctypes.data,
                out.ctypes.data,
                min(spec.nbytes, len(out)),
                _PULL_TRIES,
            )
            if version >= 0:
                self._base[bucket] = version
                return version
            self._session.check_alive()
            if time.monotonic() > deadline:
                raise WaitTimeout(f"bucket {bucket} was being written for {_PULL_S:g} s")

    def version(self, bucket: int) -> int:
        return int(self._control.seq[bucket]) >> 1

    def close(self) -> None:
        for segment in (self._weights, self._slots, self._control.segment):
            segment.close()
        self._bell.close()
        self._knocker.close()

    @property
    def closed_rounds(self) -> NDArray[np.int64]:
        return self._control.closed

    @property
    def rounds_over(self) -> int:
        closed = self._control.closed
        return int(closed.min()) if len(closed) else 0

    @property
    def steps(self) -> NDArray[np.int64]:
        return self._control.steps

    @property
    def owes(self) -> int:
        return 0  # the hub keeps the slots for as long as it needs them

    def last_words(self) -> str:
        return self._control.last_words

    def replica(self) -> NDArray[np.uint8] | None:
        begin = self._slot_bytes
        if self._slots.nbytes <= begin:
            return None
        return self._slots.bytes[begin : begin + self._layout.arena_bytes]

    # --- parts --------------------------------------------------------------------------------

    def _why(self) -> str:
        """For messages: who keeps us waiting, the hub itself or other workers."""
        age_s = time.monotonic() - self._control.beat_s
        if age_s > _BEAT_LATE_S:
            return f"; the hub's loop last turned {age_s:.1f} s ago: it is stopped or overloaded"
        return self._session.who_is_missing()

    def _versions(self, buckets: list[int]) -> NDArray[np.uint64]:
        versions: NDArray[np.uint64] = self._control.seq[buckets] >> _ONE
        return versions

    def _first_missing(
        self, buckets: NDArray[np.uint32], targets: NDArray[np.uint64]
    ) -> int | None:
        words = self._done_words[buckets]
        missing = np.flatnonzero(words < targets)
        return int(buckets[missing[0]]) if len(missing) else None


def reachable(attach: m.Attach) -> None:
    """Raise ProtocolError unless this process may map what the hub offers."""
    for at in (attach.control, attach.weights, attach.slots, attach.bell):
        assert at is not None
        SegmentRef(at.pid, at.fd, at.nbytes).check()
    _knocker(attach, 0).close()


def _knocker(attach: m.Attach, rank: int) -> Knocker:
    assert attach.bell is not None
    assert attach.doorway is not None
    return Knocker(attach.bell.pid, attach.doorway, rank)


def _attach(at: m.SegmentAt, *, writable: bool) -> Segment:
    return Segment.attach(SegmentRef(at.pid, at.fd, at.nbytes), writable=writable)
