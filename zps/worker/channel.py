"""One worker's dealings with one hub: what was declared there, and the rounds of its buckets."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from zps.codec.plan import Plan
from zps.config import Settings
from zps.core.layout import Param
from zps.core.shards import Shard
from zps.memory.control import Outcome
from zps.wire import messages as m
from zps.worker.encoder import Encoder
from zps.worker.link import Link, PushInfo
from zps.worker.message_link import MessageLink
from zps.worker.session import Session
from zps.worker.shm_link import ShmLink
from zps.worker.work import Part

Readable = Literal["state", "weights", "foreign"]
Writable = Literal["state", "foreign"]

_EVERY = slice(None)


class Channel:
    """A layout at one hub, its slots and weights as tensors, and the round of each bucket.

    Tensors and extras are known by their index in the layout; `parts` says what each tensor is in
    the whole model.
    """

    def __init__(
        self,
        session: Session,
        settings: Settings,
        shard: Shard,
        attach: m.Attach,
        *,
        aliased: bool,
        together: bool,
    ):
        """Go on from where the hub has let this worker in.

        attach    the hub's last message so far
        aliased   weights may be views of the hub's memory
        together  all buckets are pushed together, or judged together: they share their rounds
        """
        self.session = session
        self.layout = layout = shard.layout
        self.parts = shard.parts
        self._settings = settings
        self._together = together
        self._owners = np.array([part.param for part in shard.parts], np.uint32)
        self._is_whole = self._owners.tolist() == list(range(shard.total))
        session.received = 1
        in_step = settings.mode == "bsp" and settings.quorum == 1
        self.aliased = aliased and (attach.control is not None or in_step)  # else it has to fetch
        plan = Plan.build(layout, settings.push_codecs, settings.compression_min_bytes)
        self.link: Link
        if attach.control is not None:
            self.link = ShmLink(session, plan, attach, aliased=aliased)
        else:
            back = Plan.build(layout, settings.pull_codecs, settings.compression_min_bytes)
            self.link = MessageLink(session, plan, attach, way_back=back)
        session.last_words = self.link.last_words
        count = len(layout.buckets)
        self._next_round = np.full(count, self.link.first_round, np.int64)
        self._last_seq = np.zeros(count, np.uint64)
        self._settled = np.zeros(count, np.uint64)  # the last whose outcome is known
        self._is_settled = True  # all of them are
        self._count = count
        self._accounts = threading.Lock()  # of what was lost: one thread pushes, another waits
        self._replica = self._make_replica()
        self.encoder = Encoder(
            plan,
            self.link.slots,
            stream=session.rank,
            places=[(part.param, part.begin) for part in shard.parts],
        )
        self.weights = [self._tensor(self._replica, i) for i in range(len(layout.params))]

    # --- tensors ------------------------------------------------------------------------------

    def published(self, index: int) -> torch.Tensor:
        """The link's own copy of a parameter's weights, for whoever publishes them."""
        return self._tensor(self.link.weights, index)

    def extra(self, index: int) -> torch.Tensor:
        """The shared copy of an extra, as rank 0 last published it."""
        layout = self.layout
        return _tensor(self.link.weights, layout.extra_bytes[index], layout.extras[index])

    def slot(self, index: int) -> torch.Tensor | None:
        """Where a parameter's gradient is laid as it is; None for one that is encoded."""
        if self.encoder.is_coded(index):
            return None
        return _tensor(self.encoder.place(index), 0, self.layout.params[index])

    def buckets_of(self, params: Iterable[int]) -> NDArray[np.uint32]:
        """The buckets in which these parameters lie, ascending."""
        layout = self.layout
        pieces = (layout.pieces[p] for index in params for p in layout.pieces_of(index))
        return np.array(sorted({piece.bucket for piece in pieces}), np.uint32)

    def times_updated(self, index: int) -> int:
        """How often the hub has updated a parameter; may change at any time."""
        return int(self.link.steps[self.layout.pieces_of(index)[0]])

    # --- rounds -------------------------------------------------------------------------------

    def wait_for_slots(self, buckets: NDArray[np.uint32]) -> None:
        """Return once these buckets may be encoded and written again."""
        if self._is_settled:
            return
        seqs = self._last_seq[buckets]
        if (self._settled[buckets] < seqs).any():
            self.link.wait(buckets, seqs, self._settings.timeout_s)
            self._settle(buckets, seqs, self.link.outcomes(buckets))

    def push(self, buckets: NDArray[np.uint32], info: PushInfo) -> Part:
        """Push whole buckets that already lie in the slots, each in its next round.

        info.absent has indices of the whole model.
        """
        if info.absent is not None and not self._is_whole:
            info = self._with_own_absent(info, info.absent)
        at = self._where(buckets)
        rounds = self._next_round[at]
        first = int(rounds[0]) if len(rounds) else 0
        if (rounds == first).all():
            self._last_seq[at] = self.link.push(first, buckets, info)
            self._next_round[at] = first + 1
        else:
            rounds = rounds.copy()  # it may be a view of what changes here
            for number in np.unique(rounds).tolist():
                same = buckets[rounds == number]
                self._last_seq[same] = self.link.push(number, same, info)
                self._next_round[same] = number + 1
        with self._accounts:
            self._is_settled = False
            if info.finite and info.samples > 0:
                absent = () if info.absent is None else info.absent.tolist()
                self.encoder.commit(buckets, info.grad_scale, absent=absent)
            else:
                # It counts nothing, so that what was lost before is still to be sent.
                self.encoder.withhold(buckets)
        return Part(self.link, buckets, self._last_seq[buckets], self._settle)

    def _where(self, buckets: NDArray[np.uint32]) -> NDArray[np.uint32] | slice:
        """The same buckets as an index; of all, one that costs nothing to follow."""
        return _EVERY if len(buckets) == self._count else buckets

    def refresh(self, buckets: Sequence[int] | NDArray[np.uint32] | None = None) -> None:
        """Copy the hub's weights here, where they are not views of them anyway."""
        if not self.aliased:
            self.link.fetch(range(len(self.layout.buckets)) if buckets is None else buckets)
        if self._settings.quorum < 1:
            # A worker that fell behind goes on where the others are: what it pushes next will have
            # been computed on the weights it gets now. What it computed before stays in its round.
            chosen = _EVERY if buckets is None or self._together else np.asarray(buckets)
            # One round for a whole gradient: its buckets are looked at while they close one by
            # one, and a round that waits for all of its buckets would wait for those in the next.
            closed = self.link.rounds_over if self._together else self.link.closed_rounds[chosen]
            self._next_round[chosen] = np.maximum(self._next_round[chosen], closed)
        if self.aliased or self.link.private:
            return
        for bucket in range(len(self.layout.buckets)) if buckets is None else buckets:
            spec = self.layout.buckets[bucket]
            self.link.pull(int(bucket), self._replica[spec.byte : spec.byte + spec.nbytes])

    # --- requests -----------------------------------------------------------------------------

    def publish(self) -> None:
        """Make what lies in the arena the truth; returns once every live worker has called it."""
        if self.session.rank == 0:
            self.link.upload()
        self.session.request(m.Publish)
        self.link.download()

    def read(self, what: Readable, index: int, field: str = "") -> bytes:
        """Bytes of optimizer state that live in the hub: see the READ message."""
        _, payload = self.session.request(m.Read, what=what, field=field, index=index)
        return b"".join(payload)

    def write(self, what: Writable, index: int, data: bytes, field: str = "") -> None:
        """Replace what `read` returns."""
        step = self._settings.bucket_bytes
        chunks = [data[at : at + step] for at in range(0, len(data), step)]
        self.session.request(m.Write, *chunks, what=what, field=field, index=index)

    def set_steps(self, steps: NDArray[np.int64]) -> None:
        """Set the step count of every parameter of the whole model, of which this hub has some."""
        own = steps[self._owners]
        self.session.request(m.SetSteps, own.tobytes())

    def close(self) -> None:
        """Let go of the memory; the session is the caller's."""
        self.weights = []
        self._replica = np.empty(0, np.uint8)
        self.link.close()

    # --- parts --------------------------------------------------------------------------------

    def _settle(
        self,
        buckets: NDArray[np.uint32],
        seqs: NDArray[np.uint64],
        outcomes: NDArray[np.uint64],
    ) -> None:
        """What was encoded and came to nothing is fed back as if it had never left.

        Once for each push: whoever waits for it later may find a newer one encoded.
        """
        at = self._where(buckets)
        with self._accounts:
            new = seqs > self._settled[at]
            if not new.all():
                at = buckets = buckets[new]
                seqs, outcomes = seqs[new], outcomes[new]
            self._settled[at] = seqs
            self._is_settled = bool((self._settled == self._last_seq).all())
            if outcomes.any():
                self.encoder.revert(buckets[outcomes != Outcome.APPLIED].tolist())

    def _make_replica(self) -> NDArray[np.uint8]:
        if self.aliased or self.link.private:
            return self.link.weights
        shared = self.link.replica()  # the hub compensates delays by what we computed on
        return np.zeros(self.layout.arena_bytes, np.uint8) if shared is None else shared

    def _with_own_absent(self, info: PushInfo, absent: NDArray[np.uint32]) -> PushInfo:
        own = np.flatnonzero(np.isin(self._owners, absent)).astype(np.uint32)
        return replace(info, absent=own if len(own) else None)

    def _tensor(self, arena: NDArray[np.uint8], index: int) -> torch.Tensor:
        return _tensor(arena, self.layout.param_byte(index), self.layout.params[index])


def _tensor(arena: NDArray[np.uint8], byte: int, param: Param) -> torch.Tensor:
    """A tensor with a storage of its own over shared bytes, so that saving it saves no more."""
    dtype: torch.dtype = getattr(torch, param.dtype)
    if param.numel == 0:
        return torch.empty(param.shape, dtype=dtype)
    flat = torch.frombuffer(arena[byte : byte + param.nbytes], dtype=dtype)
    return flat.reshape(param.shape)
