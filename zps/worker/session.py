"""One life of one worker at one hub: handshake, requests and their answers, who is alive."""

from __future__ import annotations

import os
import secrets
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import zmq

from zps.config import Settings
from zps.core.address import parse
from zps.errors import (
    Closed,
    ConfigError,
    DuplicateRank,
    ForkedProcess,
    HubLost,
    LayoutMismatch,
    OutOfMemory,
    ProtocolError,
    RankOutOfRange,
    Rejected,
    SessionLost,
    WaitTimeout,
    ZpsError,
)
from zps.wire import messages as m
from zps.wire import packing
from zps.wire.address import home_of, sweep_home
from zps.wire.messages import SHARED_SETTINGS
from zps.wire.sockets import Dealer, Frame, host_id, readable

Payload = m.Fetch | m.Weights | m.Consumed
"""What a hub sends unasked to a worker that shares no memory with it."""

_Answer = tuple[m.Message, list[Frame]]

_WHY_S = 0.5
_SLICE_S = 0.1  # how long Ctrl-C and a dead hub may go unnoticed
_MAX_FRAME_BYTES = 1 << 40  # a worker trusts the size of what its own hub sends
_LOCAL: dict[str, type[ZpsError]] = {
    "duplicate_rank": DuplicateRank,
    "rank_out_of_range": RankOutOfRange,
    "no_session": SessionLost,
    "old_session": SessionLost,
    "layout": LayoutMismatch,
    "hubs": ConfigError,
    "settings": ConfigError,
    "ConfigError": ConfigError,
    "out_of_memory": OutOfMemory,
}


class Session:
    """A DEALER and what was agreed over it.

    Threads may share it. Its lock is held while the socket is used, and never while something is
    waited for: one of the threads that wait reads for all, and hands each its answer.
    """

    def __init__(self, address: str, settings: Settings, rank: int | None, world_size: int | None):
        """Say hello. Raises HubUnreachable, or what the hub's refusal stands for."""
        parse(address)
        self.address = address
        self.settings = settings
        self.received = 0  # messages since the declaration was answered, that one included
        self.sent = 0  # the sequence number of the last message
        self._given_up = 0  # the count at which one of them did not come
        self.last_words: Callable[[], str] = str  # where the hub leaves the reason for its end
        self.on_payload: Callable[[Payload, list[Frame]], None] = _unexpected
        self.heed: Callable[[m.Partial], None] = lambda _: None  # must not use a socket
        #: Called without the lock, by each turn of a wait: does what other hubs ask for, and says
        #: whether it has already waited, for one of them.
        self.attend: Callable[[], bool] = bool
        self.neighbours: list[Session] = []  # a wait here ends when something comes to them
        self._pid = os.getpid()
        self._closed = ""
        self._lock = threading.RLock()
        self._turn = threading.Condition()
        self._reader = 0  # the thread that reads
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)  # it is to look at the socket
        self._answers: dict[int, _Answer | None] = {}  # by request; None: it has yet to come
        self._payloads = 0  # messages that came unasked: it moves on
        self._seq = 0
        self._pidfd = -1
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._dealer = Dealer(self._context, address, _MAX_FRAME_BYTES)
        #: Readable when a message may have come, until the socket has been looked at.
        self.descriptor = int(self._dealer.socket.getsockopt(zmq.FD))
        try:
            self.welcome = self._hello(rank, world_size)
        except BaseException:
            self.close()
            raise
        self.rank = self.welcome.rank
        self.world_size = self.welcome.world_size
        self._seq = self.welcome.session << 32  # sequence numbers rise over the lives of a rank

    def _hello(self, rank: int | None, world_size: int | None) -> m.Welcome:
        timeout_s = self.settings.connect_timeout_s
        explicit = self.settings.explicit()
        shared = {name: explicit[name] for name in SHARED_SETTINGS if name in explicit}
        shared.pop("world_size", None)
        hello = m.Hello(
            protocol=m.PROTOCOL,
            job=self.settings.job,
            rank=rank,
            world_size=world_size,
            incarnation=secrets.token_hex(8),
            host=host_id(),
            pid=self._pid,
            settings=shared,
        )
        self._dealer.send([m.encode(hello)], timeout_s)
        frames = self._dealer.receive(timeout_s)
        if frames is None:
            raise WaitTimeout(f"the hub at {self.address} did not answer in {timeout_s:g} s")
        answer = m.decode(frames[0])
        if isinstance(answer, m.Refuse):
            raise refusal(answer)
        if not isinstance(answer, m.Welcome):
            raise ProtocolError(f"a hello was answered with {answer.tag}")
        if answer.host == hello.host:
            try:
                self._pidfd = os.pidfd_open(answer.pid)
            except ProcessLookupError as error:
                raise HubLost(f"the hub at {self.address} ended during the handshake") from error
        return answer

    @property
    def same_host(self) -> bool:
        """Whether the hub's processes and memory can be reached from here."""
        return self._pidfd >= 0

    def agree(self) -> Settings:
        """The settings of this worker, with the hub's values of the shared ones.

        Raises ConfigError for a value that this version does not know.
        """
        theirs = self.welcome.settings.items()
        shared = {k: v for k, v in theirs if v is not None and k != "world_size"}
        try:
            return self.settings.replace(**shared)
        except ConfigError as error:
            raise ConfigError(
                f"the hub at {self.address} has settings that this worker cannot take: {error}\n"
                "Install the same version of zps on both sides, or choose what both know"
            ) from None

    # --- requests -----------------------------------------------------------------------------

    @contextmanager
    def sequenced(self) -> Iterator[int]:
        """The next sequence number, with the socket held until it has been used."""
        with self._lock:
            self.check_usable()
            self._seq += 1
            yield self._seq

    def header(self, seq: int) -> dict[str, int]:
        """The fields that every message of this session begins with."""
        return {"epoch": self.welcome.epoch, "session": self.welcome.session, "seq": seq}

    def send(self, message: m.Sessioned, *payload: Frame) -> None:
        """Send without waiting for an answer; raises HubLost when the hub takes nothing."""
        frames = [m.encode(message), *payload]
        with self._lock:
            waited = 0.0
            while not self._dealer.try_send(frames):
                self._dealer.socket.poll(100, zmq.POLLOUT)
                self.check_alive()
                waited += 0.1
                if waited > self.settings.timeout_s:
                    raise HubLost(f"the hub at {self.address} took no message for {waited:.0f} s")
            self.sent = message.seq
            self._rouse()

    def request(
        self,
        kind: type[m.Sessioned],
        *payload: Frame,
        timeout_s: float | None = None,
        **fields: object,
    ) -> _Answer:
        """Send and wait for the answer; raises what a refusal stands for, HubLost, WaitTimeout."""
        return self.answer(self.post(kind, *payload, **fields), timeout_s=timeout_s)

    def post(self, kind: type[m.Sessioned], *payload: Frame, **fields: object) -> m.Sessioned:
        """Send a request, whose `answer` has to be asked for."""
        with self.sequenced() as seq:
            message = kind.model_validate({**self.header(seq), **fields})
            self._answers[seq] = None
            self.send(message, *payload)
        return message

    def answer(self, message: m.Sessioned, *, timeout_s: float | None = None) -> _Answer:
        """The answer to what was posted; raises as `request` does."""
        timeout_s = self.settings.timeout_s if timeout_s is None else timeout_s
        answer = self._await(message, timeout_s)
        if answer is None:
            text = f"no answer to {message.tag!r} in {timeout_s:g} s"
            raise WaitTimeout(text + self.who_is_missing())
        if isinstance(answer[0], m.Refuse):
            raise refusal(answer[0])
        return answer

    def _await(self, message: m.Sessioned, timeout_s: float) -> _Answer | None:
        deadline = time.monotonic() + timeout_s
        seen = self._payloads
        try:
            while self._answers[message.seq] is None:
                if not self._read(min(_SLICE_S, max(0.0, deadline - time.monotonic()))):
                    self._serve_neighbours()
                    self.check_alive()
                    if time.monotonic() >= deadline:
                        break
                elif self._payloads != seen:
                    seen = self._payloads
                    deadline = max(deadline, time.monotonic() + timeout_s)  # it moves on
        finally:
            answer = self._answers.pop(message.seq)
        return answer

    def take(self, timeout_s: float) -> bool:
        """Act on one message, or let another thread do so; False when none has come in time.

        Raises what a refusal stands for, and HubLost.
        """
        if self._read(timeout_s):
            return True
        self.check_alive()
        return False

    def collect(self, count: int) -> None:
        """Take messages until `count` have come since the declaration; raises what they refuse.

        One that does not come is waited for once: the hub may have been unable to deliver it.
        """
        deadline = 0.0
        while self.received < count and self._given_up < count:
            deadline = deadline or time.monotonic() + 0.5
            left_s = deadline - time.monotonic()
            if not self._read(max(0.0, left_s)) and left_s <= 0:
                self.check_alive()
                self._given_up = count

    def _serve_neighbours(self) -> None:
        """What their hubs ask for may be what the answer waits for."""
        for other in self.neighbours:
            while not other._closed and other.take(0.0):
                pass

    # --- reading ------------------------------------------------------------------------------

    def _read(self, timeout_s: float) -> bool:
        """Act on one message, unless another thread reads: then wait until it has.

        False when none has come in time.
        """
        with self._turn:
            self.check_usable()
            if self._reader:
                before = self.received
                self._turn.wait(timeout_s)
                return self.received > before
            self._reader = threading.get_ident()
        try:
            frames = self._receive(timeout_s)
            if frames is not None:
                self._judge(frames)
        finally:
            with self._turn:
                self._reader = 0
                self._turn.notify_all()
        return frames is not None

    def _receive(self, timeout_s: float) -> list[Frame] | None:
        """A message. Waits no longer once the hub has ended, or something comes to a neighbour.

        Descriptors are waited on, as the socket itself is free for others meanwhile.
        """
        deadline = time.monotonic() + timeout_s if timeout_s else 0.0
        while True:
            frames = self._next(0.0)
            left_s = deadline - time.monotonic() if timeout_s else 0.0
            if frames is not None or left_s <= 0 or self._closed:
                return frames
            poller = select.poll()
            own = (self.descriptor, self._wake)
            end = self._pidfd if self._pidfd >= 0 else self._dealer.monitor_descriptor
            near = [other.descriptor for other in self.neighbours if not other._closed]
            for fd in (*own, end, *near):
                poller.register(fd, select.POLLIN)
            ready = {fd for fd, _ in poller.poll(left_s * 1000)}
            if self._wake in ready:
                os.eventfd_read(self._wake)
            if end in ready and (self._pidfd >= 0 or self._is_cut()):
                return self._next(0.05)  # what a dying hub said last may still be on its way
            if not ready.isdisjoint(near):
                return self._next(0.0)

    def _is_cut(self) -> bool:
        with self._lock:
            return not self._dealer.socket.closed and self._dealer.is_cut()

    def _next(self, patience_s: float) -> list[Frame] | None:
        with self._lock:
            if self._dealer.socket.closed:
                return None
            frames = self._dealer.receive(patience_s)
            if frames is not None:
                self.received += 1
            return frames

    def _rouse(self) -> None:
        """Have the thread that reads look at the socket: using it may clear its descriptor."""
        if self._reader not in (0, threading.get_ident()):
            os.eventfd_write(self._wake, 1)

    def _judge(self, frames: list[Frame]) -> None:
        """Act on a message, or lay it where the thread that waits for it finds it."""
        answer = m.decode(frames[0])
        seq = getattr(answer, "seq", None)
        if seq in self._answers:
            self._answers[seq] = (answer, frames[1:])
            return
        if isinstance(answer, Payload):
            self._payloads += 1
            self.on_payload(answer, frames[1:])
        if isinstance(answer, m.Refuse):
            raise refusal(answer)
        if isinstance(answer, m.Closing):
            self._closed = f"the hub at {self.address} has ended this job: {answer.text}"
            raise HubLost(self._closed)
        if isinstance(answer, m.Partial):
            self.heed(answer)

    # --- state --------------------------------------------------------------------------------

    @property
    def inherited(self) -> bool:
        """Whether this process got it by a fork, and may not use it."""
        return os.getpid() != self._pid

    def check_usable(self) -> None:
        """Raise ForkedProcess or Closed when this object may not be used here or any more."""
        if os.getpid() != self._pid:
            raise ForkedProcess(
                f"this worker belongs to process {self._pid}; call zps.init() after the fork, or "
                "use the start method 'spawn'"
            )
        if self._closed:
            raise Closed(f"rank {self.rank} is closed: {self._closed}")

    def check_alive(self, patience_s: float = 0.0) -> None:
        """Raise HubLost when the hub's process has ended, or does so within `patience_s`."""
        if self._pidfd < 0:
            with self._lock:
                if self._dealer.socket.closed:
                    raise Closed(f"rank {self.rank} is closed: {self._closed}")
                if not self._dealer.is_cut():
                    return
                try:
                    self._hear_out()
                finally:
                    ended = f"the connection to the hub at {self.address} has ended"
                    self._closed = self._closed or ended
            raise HubLost(f"{self._closed}. If the hub lives, it has given this worker up.")
        if readable(self._pidfd, patience_s):
            with self._lock:
                if self._dealer.socket.closed:  # by another thread, and the descriptor with it
                    raise Closed(f"rank {self.rank} is closed: {self._closed}")
                self._hear_out()
            home = home_of(self.address)
            if home is not None:
                sweep_home(home)  # a killed hub cannot do it itself
            why = self.last_words() or "its log says why"
            process = f"the hub at {self.address} (process {self.welcome.pid})"
            self._closed = f"{process} has ended: {why}"
            raise HubLost(f"{self._closed}. Start it again and resume from a checkpoint of yours.")

    def _hear_out(self) -> None:
        """Take what the hub said last; raises it, if it was the reason for its end."""
        while (frames := self._dealer.receive(0.05)) is not None:
            self._judge(frames)

    def stats(self) -> dict[str, Any]:
        """The hub's own account: see the STATS message."""
        _, payload = self.request(m.Stats)
        facts: dict[str, Any] = packing.unpack(payload[0])
        return facts

    def who_is_missing(self) -> str:
        """For messages: whom the hub waits for, as far as it can still say."""
        try:
            answer = self._await(self.post(m.Stats), _WHY_S)
            facts = {} if answer is None else packing.unpack(answer[1][0])
        except (ZpsError, IndexError, zmq.ZMQError):
            facts = {}
        if not facts:
            return "; the hub does not say why"
        if facts.get("missing"):
            return f"; ranks {facts['missing']} have not joined"
        if facts.get("waiting_for"):
            return f"; the hub waits for ranks {facts['waiting_for']}"
        return ""

    def close(self, why: str = "it was shut down") -> None:
        """Close the socket; the goodbye is the caller's."""
        if os.getpid() != self._pid:
            return  # a forked child must not touch its parent's sockets
        self._closed = self._closed or why
        with self._turn:
            while self._reader not in (0, threading.get_ident()):
                os.eventfd_write(self._wake, 1)
                self._turn.wait(_SLICE_S)
        with self._lock:
            if self._dealer.socket.closed:
                return
            self._dealer.close()
            self._context.term()
            os.close(self._wake)
            if self._pidfd >= 0:
                os.close(self._pidfd)
                self._pidfd = -1


def _unexpected(message: m.Message, _: list[Frame]) -> None:
    raise ProtocolError(f"the hub sent {message.tag} to a worker that shares its memory")


def refusal(message: m.Refuse) -> ZpsError:
    """The error that a hub's refusal stands for."""
    kind = _LOCAL.get(message.code)
    if kind is not None and not issubclass(kind, Rejected):
        return kind(message.text)
    return (kind or Rejected)(message.text, code=message.code)
