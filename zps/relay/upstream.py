"""A node's session at the hub of all nodes. The node hub's loop turns it and never waits for it.

upstream.ask(m.Barrier, then=on_answer)     # goes out when the socket takes it
poller.register(fd) for fd in upstream.watched
upstream.turn()                             # sends what waits, hands answers to who asked
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping

import zmq

from zps.config import Settings
from zps.errors import ConfigError, HubLost, ZpsError
from zps.wire import messages as m
from zps.wire.sockets import Frame
from zps.worker.session import Payload, Session, refusal

log = logging.getLogger("zps.hub")

Then = Callable[[m.Message, list[Frame]], None]
OnRefusal = Callable[[m.Refuse], None]

_NO_FIELDS: Mapping[str, object] = {}
_GOODBYE_S = 1.0
_SLICE_MS = 100  # how long an end of the other hub may go unnoticed
_TURN_MESSAGES = 256  # what the hub sends does not keep this node's workers from theirs


class Upstream(Session):
    """A session whose `send` queues, and whose requests are answered by calls.

    settings  `hub` is the address, `node_rank` the rank there and `nodes` the world's size
    Raises ConfigError for settings that a node hub cannot work with, here or there, HubUnreachable,
    DuplicateRank, RankOutOfRange. The hello is waited for: there is nobody to serve before it.
    """

    def __init__(self, settings: Settings):
        address = _checked(settings)
        try:
            super().__init__(address, settings, settings.node_rank, settings.nodes)
        except ConfigError as error:
            raise ConfigError(
                f"the hub of all nodes at {address} refuses this node: {error}. Its world_size is "
                f"the number of nodes, {settings.nodes}"
            ) from None
        try:
            self.agreed = self.agree()
        except BaseException:
            self.close()
            raise
        self.sent_bytes = 0
        """Payload that went up: gradients first of all."""
        self.received_bytes = 0
        """Payload of WEIGHTS that came down, with their step counts."""
        self._queue: deque[list[Frame]] = deque()
        self._asked: dict[int, tuple[Then, OnRefusal | None]] = {}

    @property
    def watched(self) -> tuple[int | zmq.Socket[bytes], ...]:
        """What becomes readable when there is something to `turn` for; the socket is the first."""
        end = self._pidfd if self._pidfd >= 0 else self._dealer.monitor
        return self._dealer.socket, end

    @property
    def backlog(self) -> bool:
        """Whether something waits until the socket takes it."""
        return bool(self._queue)

    def send(self, message: m.Sessioned, *payload: Frame) -> None:
        """Send now, or at a later `turn`: until it has left, `payload` must not change."""
        self._queue.append([m.encode(message), *payload])
        self.sent_bytes += sum(len(frame) for frame in payload)
        self.flush()

    def ask(
        self,
        kind: type[m.Sessioned],
        *payload: Frame,
        fields: Mapping[str, object] = _NO_FIELDS,
        then: Then = lambda *_: None,
        refused: OnRefusal | None = None,
    ) -> None:
        """Send a request; a later `turn` calls `then` with its answer.

        fields   of the message, besides those that every one has
        refused  called instead with a refusal; None: `turn` raises what it stands for
        """
        with self.sequenced() as seq:
            self._asked[seq] = (then, refused)
            self.send(kind.model_validate({**self.header(seq), **fields}), *payload)

    def flush(self) -> None:
        """Send what the socket takes."""
        while self._queue and self._dealer.try_send(self._queue[0]):
            self._queue.popleft()

    def turn(self) -> None:
        """Send what waits, and act on what has come.

        Raises HubLost once the other hub has ended, and what a refusal of a push stands for.
        """
        self.flush()
        for _ in range(_TURN_MESSAGES):
            frames = self._dealer.receive(0)
            if frames is None:
                self.check_alive()
                break
            self._act(m.decode(frames[0]), frames[1:])
        self.flush()

    def leave(self, *, failed: bool, owes: Callable[[], int] = int) -> None:
        """Say goodbye, and close once it was heard, or a second later: there is no job any more.

        What has been pushed goes first, if this is no failure.

        owes  how many buckets of it the other hub has yet to ask for
        """
        if failed:
            self._queue.clear()
        else:
            self._hand_over(owes)
        self.on_payload = lambda *_: None  # what it would be written into is about to go
        with contextlib.suppress(ZpsError):
            bye = self.post(m.Bye, failed=failed)
            while self._queue and self._dealer.socket.poll(int(_GOODBYE_S * 1000), zmq.POLLOUT):
                self.flush()
            self.answer(bye, timeout_s=_GOODBYE_S)
        self._queue.clear()
        self.close()

    def _hand_over(self, owes: Callable[[], int]) -> None:
        """Serve the other hub until it has all that was pushed, but not for ever."""
        deadline = time.monotonic() + self.settings.timeout_s
        why = f"the hub of all nodes has not asked for it in {self.settings.timeout_s:g} s"
        try:
            while owes() and time.monotonic() < deadline:
                self.turn()
                if owes():
                    self._dealer.socket.poll(_SLICE_MS, zmq.POLLIN)
        except ZpsError as error:
            why = str(error)
        if owes():
            log.warning("this node leaves, and gradients of it are lost: %s", why)

    def _act(self, message: m.Message, payload: list[Frame]) -> None:
        if isinstance(message, Payload):
            self.received_bytes += sum(len(frame) for frame in payload)
            self.on_payload(message, payload)
        elif isinstance(message, m.Closing):
            raise HubLost(f"it has ended the job: {message.text}")
        elif isinstance(message, m.Refuse):
            _, refused = self._asked.pop(-1 if message.seq is None else message.seq, (None, None))
            if refused is None:
                raise refusal(message)
            refused(message)
        else:
            then, _ = self._asked.pop(getattr(message, "seq", -1), (None, None))
            if then is not None:
                then(message, payload)


def _checked(settings: Settings) -> str:
    """The address of the hub of all nodes. Raises ConfigError naming what is missing."""
    for name in ("hub", "nodes", "node_rank", "world_size"):
        if getattr(settings, name) is None:
            raise ConfigError(
                f"a node hub needs the setting {name}: hub is the address of the hub of all nodes, "
                "world_size the number of workers on all of them"
            )
    if len(settings.hubs) != 1:
        raise ConfigError(f"{len(settings.hubs)} hubs are named; a node hub works with one")
    return settings.hubs[0]
