"""One worker's dealings with one hub: what was declared there, and the rounds of its buckets."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from zps.config import Settings
from zps.core.layout import Layout, Param
from zps.errors import ConfigError, ProtocolError
from zps.wire import messages as m
from zps.worker.link import Link, PushInfo
from zps.worker.message_link import MessageLink
from zps.worker.session import Session
from zps.worker.shm_link import ShmLink
from zps.worker.work import Part

log = logging.getLogger("zps")

_EVERY = slice(None)


class Channel:
    """A layout at one hub, its slots and weights as tensors, and the round of each bucket.

    Tensors and extras are known by their index in the layout.
    """

    def __init__(
        self,
        session: Session,
        settings: Settings,
        layout: Layout,
        *,
        rule: str,
        hypers: bytes,
        aliased: bool,
    ):
        """Declare, and return once every worker has declared the same.

        aliased  weights may be views of the hub's memory
        Raises LayoutMismatch, ConfigError, OutOfMemory, WaitTimeout naming the missing ranks.
        """
        self.session = session
        self.layout = layout
        self._settings = settings
        self.link = _connect(session, settings, layout, rule, hypers, aliased=aliased)
        self.aliased = aliased
        session.last_words = self.link.last_words
        count = len(layout.buckets)
        self._next_round = np.full(count, self.link.first_round, np.int64)
        self._last_seq = np.zeros(count, np.uint64)
        self._replica = self._make_replica()
        self.slots = [self._tensor(self.link.slots, i) for i in range(len(layout.params))]
        self.weights = [self._tensor(self._replica, i) for i in range(len(layout.params))]

    # --- tensors ------------------------------------------------------------------------------

    def published(self, index: int) -> torch.Tensor:
        """The link's own copy of a parameter's weights, for whoever publishes them."""
        return self._tensor(self.link.weights, index)

    def extra(self, index: int) -> torch.Tensor:
        """The shared copy of an extra, as rank 0 last published it."""
        layout = self.layout
        return _tensor(self.link.weights, layout.extra_bytes[index], layout.extras[index])

    def buckets_of(self, params: Iterable[int]) -> NDArray[np.uint32]:
        """The buckets in which these parameters lie, ascending."""
        layout = self.layout
        pieces = (layout.pieces[p] for index in params for p in layout.pieces_of(index))
        return np.array(sorted({piece.bucket for piece in pieces}), np.uint32)

    # --- rounds -------------------------------------------------------------------------------

    def wait_for_slots(self, buckets: NDArray[np.uint32]) -> None:
        """Return once the slots of these buckets may be written again."""
        self.link.wait(buckets, self._last_seq[buckets], self._settings.timeout_s)

    def push(self, buckets: NDArray[np.uint32], info: PushInfo) -> Part:
        """Push whole buckets that already lie in the slots, each in its next round."""
        rounds = self._next_round[buckets]
        first = int(rounds[0]) if len(rounds) else 0
        together = len(buckets) <= 1 or bool((rounds == first).all())
        for number in (first,) if together else np.unique(rounds).tolist():
            same = buckets if together else buckets[rounds == number]
            for at in range(0, len(same), m.MAX_PUSH_BUCKETS):
                part = same[at : at + m.MAX_PUSH_BUCKETS]
                self._last_seq[part] = self.link.push(number, part.tolist(), info)
            self._next_round[same] = number + 1
        return Part(self.link, buckets, self._last_seq[buckets])

    def refresh(self, buckets: Sequence[int] | NDArray[np.uint32] | None = None) -> None:
        """Copy the hub's weights here, where they are not views of them anyway."""
        if not self.aliased:
            self.link.fetch(range(len(self.layout.buckets)) if buckets is None else buckets)
        if self._settings.quorum < 1:
            # A worker that fell behind goes on where the others are: what it pushes next will have
            # been computed on the weights it gets now. What it computed before stays in its round.
            chosen = _EVERY if buckets is None else np.asarray(buckets)
            closed = self.link.closed_rounds[chosen]
            self._next_round[chosen] = np.maximum(self._next_round[chosen], closed)
        if self.aliased or self.link.private:
            return
        for bucket in range(len(self.layout.buckets)) if buckets is None else buckets:
            spec = self.layout.buckets[bucket]
            self.link.pull(int(bucket), self._replica[spec.byte : spec.byte + spec.nbytes])

    def close(self) -> None:
        """Let go of the memory; the session is the caller's."""
        self.slots, self.weights = [], []
        self._replica = np.empty(0, np.uint8)
        self.link.close()

    # --- parts --------------------------------------------------------------------------------

    def _make_replica(self) -> NDArray[np.uint8]:
        if self.aliased or self.link.private:
            return self.link.weights
        shared = self.link.replica()  # the hub compensates delays by what we computed on
        return np.zeros(self.layout.arena_bytes, np.uint8) if shared is None else shared

    def _tensor(self, arena: NDArray[np.uint8], index: int) -> torch.Tensor:
        return _tensor(arena, self.layout.param_byte(index), self.layout.params[index])


def _connect(
    session: Session, settings: Settings, layout: Layout, rule: str, hypers: bytes, *, aliased: bool
) -> Link:
    """Shared memory where both sides can and may, messages otherwise."""
    if settings.link != "message" and session.same_host:
        attach = _declare(session, layout, rule, hypers, shared=True)
        session.received = 1
        try:
            return ShmLink(session, layout, attach, aliased=aliased)
        except ProtocolError as error:
            if settings.link == "shm":
                raise
            log.warning("rank %d uses messages instead of shared memory: %s", session.rank, error)
    elif settings.link == "shm":
        raise ConfigError(
            f"ZPS_LINK=shm, but the hub at {session.address} is on another host, or in another "
            "PID namespace; set ZPS_LINK=auto"
        )
    return MessageLink(session, layout, _declare(session, layout, rule, hypers, shared=False))


def _declare(
    session: Session, layout: Layout, rule: str, hypers: bytes, *, shared: bool
) -> m.Attach:
    with session.sequenced() as seq:
        declare = m.Declare(
            epoch=session.welcome.epoch,
            session=session.welcome.session,
            seq=seq,
            layout_hash=layout.hash,
            rule=rule,
            shared=shared,
        )
        answer, _ = session.request(declare, m.pack(layout.to_wire()), hypers)
    assert isinstance(answer, m.Attach)
    return answer


def _tensor(arena: NDArray[np.uint8], byte: int, param: Param) -> torch.Tensor:
    """A tensor with a storage of its own over shared bytes, so that saving it saves no more."""
    dtype: torch.dtype = getattr(torch, param.dtype)
    if param.numel == 0:
        return torch.empty(param.shape, dtype=dtype)
    flat = torch.frombuffer(arena[byte : byte + param.nbytes], dtype=dtype)
    return flat.reshape(param.shape)
