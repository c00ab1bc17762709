"""The node hub: an ordinary hub to this machine's workers, one worker to the hub of all nodes.

Ranks are those of the whole job, here and in the workers: a node hub only expects fewer of them.
Upstream the node has a rank too, its number among the nodes. What the workers of a node decide
together (a round, a barrier, what is published) goes up once all of them have asked, and they are
answered once upstream has answered. Optimizer state is only there: who asks for it is passed on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import zmq

from zps.config import Settings
from zps.errors import ZpsError
from zps.hub.engine import Engine, Policy
from zps.hub.hub import Hub
from zps.hub.job import Declaration, Job, Peer, Refused
from zps.memory.control import Control
from zps.relay.forward import Forward
from zps.relay.store import NodeStore, resolve
from zps.relay.upstream import Upstream
from zps.wire import messages as m
from zps.wire import packing
from zps.wire.sockets import Frame, Router

log = logging.getLogger("zps.hub")


class NodeHub(Hub):
    """See `Hub`. `settings.hub` is the address of the hub of all nodes.

    upstream  the session of its first job; for a later one it says hello anew
    """

    role = "node"

    def __init__(
        self,
        settings: Settings,
        router: Router,
        *,
        upstream: Upstream,
        on_event: Callable[[str], None] = lambda _: None,
    ):
        self._own_settings = settings
        self._upstream: Upstream | None = None
        super().__init__(_at_home(upstream), router, resolve_rule=resolve, on_event=on_event)
        self._adopt(upstream)

    # --- life ---------------------------------------------------------------------------------

    def _begin(self) -> None:
        super()._begin()
        self._forward: Forward | None = None
        self._no_entry: m.Refuse | None = None  # what upstream said to this node's declaration
        self._publishing = False  # all have asked, and upstream has not answered
        self._died = False  # the last worker to leave did so by dying

    def _adopt(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._writes = False
        for fd in upstream.watched:
            self.watch(fd, self._turn)

    def _rejoin(self) -> None:
        """For the next job: nobody of it is here yet whom waiting for the answer would keep."""
        upstream = Upstream(self._own_settings)
        self.settings = _at_home(upstream)
        self._begin()
        self._adopt(upstream)

    def _leave(self, *, failed: bool) -> None:
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            for fd in upstream.watched:
                self.unwatch(fd)
            owes = int if self._forward is None else self._forward.owes
            upstream.leave(failed=failed, owes=owes)

    def _end_job(self) -> None:
        self._leave(failed=self._died)
        super()._end_job()

    def _close(self) -> None:
        failed = self._died or len(self._roster) > 0
        try:
            super()._close()
        finally:
            self._leave(failed=failed)

    def _lose(self, peer: Peer, why: str) -> None:
        self._died = True
        super()._lose(peer, why)

    def _on_bye(self, peer: Peer, bye: m.Bye) -> None:
        self._died = False
        if len(self._roster) == 1 and not bye.failed:
            self._leave(failed=False)  # first, so that who is answered may begin another job
        super()._on_bye(peer, bye)

    # --- upstream -----------------------------------------------------------------------------

    @property
    def _up(self) -> Upstream:
        assert self._upstream is not None, "a worker was admitted without an upstream session"
        return self._upstream

    def _turn(self) -> None:
        """Something has come from the hub of all nodes, or it takes messages again."""
        upstream = self._up
        try:
            upstream.turn()
        except ZpsError as error:
            self.stop(f"the hub of all nodes at {upstream.address}: {error}")
            return
        if self._job is not None and self._forward is not None:
            for update, outcome in self._forward.answered():
                self._job.engine.finish((update,), outcome)
        self._flush()

    def _flush(self) -> None:
        super()._flush()
        if self._upstream is None:
            return
        self._upstream.flush()
        if self._writes is not self._upstream.backlog:
            self._writes = self._upstream.backlog
            events = zmq.POLLIN | zmq.POLLOUT if self._writes else zmq.POLLIN
            self.watch(self._upstream.watched[0], self._turn, events)

    # --- joining ------------------------------------------------------------------------------

    def _on_hello(self, route: bytes, hello: m.Hello) -> None:
        if self._upstream is None:
            self._rejoin()
        super()._on_hello(route, hello)

    def _on_declare(self, peer: Peer, message: m.Declare, payload: Sequence[Frame]) -> None:
        if self._roster.formed and not peer.declared:
            raise Refused(
                "late",
                f"rank {peer.rank} cannot join a running job behind a node hub: what its node has "
                "pushed already of a round cannot be taken back. Start the job again from a "
                "checkpoint",
            )
        is_first = self._job is None
        try:
            super()._on_declare(peer, message, payload)
        finally:  # also when there was a job, but no room for this worker in it
            if is_first and self._job is not None:
                self._ask_to_enter(message, payload)

    def _ask_to_enter(self, message: m.Declare, payload: Sequence[Frame]) -> None:
        """Declare upstream what a worker has declared here, and all others will."""
        self._up.ask(
            m.Declare,
            *payload,
            fields={**_fields_of(message), "shared": False},
            then=self._on_attach,
            refused=self._on_no_entry,
        )

    def _make_engine(self, declared: Declaration, control: Control, policy: Policy) -> Engine:
        store = NodeStore(
            declared.layout,
            resolve(declared.rule),
            declared.group_of,
            declared.hypers,
            pool=self._pool,
            control=control,
        )
        self._forward = Forward(self._up, store, declared.hypers)
        return Engine(store, control, policy, self._tracer, hand_over=self._forward.hand_over)

    def _number(self, job: Job) -> int:
        return self.settings.node_rank or 0

    def _on_attach(self, answer: m.Message, _: list[Frame]) -> None:
        assert isinstance(answer, m.Attach)
        assert self._forward is not None
        if answer.formed:
            text = (
                f"node {self.settings.node_rank} cannot join a running job: start all nodes again "
                "from a checkpoint"
            )
            self._no_entry = m.Refuse(seq=None, code="late", text=text)
        else:
            self._forward.attach(answer)

    def _on_no_entry(self, refusal: m.Refuse) -> None:
        text = f"{refusal.text} (said the hub of all nodes, whose ranks are nodes)"
        self._no_entry = refusal.model_copy(update={"text": text})

    def _let_in(self, job: Job) -> None:
        """Nobody before upstream has let the node in; then all of them, or none."""
        if self._no_entry is not None:
            for peer, seq in self._entering:
                if self._roster.holds(peer):
                    self._refuse_as(peer, seq, self._no_entry)
            self._entering.clear()
        elif self._forward is not None and self._forward.attached:
            super()._let_in(job)

    # --- what all do together -----------------------------------------------------------------

    def _on_collective(self, what: str, asked: Mapping[int, int]) -> None:
        upstream, forward = self._up, self._forward
        self._publishing |= what == "publish"
        if forward is None:
            upstream.ask(m.Barrier, then=lambda *_: self._answer_all(asked))
        elif what == "barrier":
            # One worker may have set the step counts while the others came here.
            upstream.ask(
                m.Barrier,
                then=lambda *_: forward.download_steps(lambda: self._answer_all(asked)),
            )
        elif self.settings.node_rank == 0:
            forward.upload()
            upstream.ask(m.Publish, then=lambda *_: self._on_published(asked))
        else:
            upstream.ask(
                m.Publish,
                then=lambda *_: forward.download(lambda: self._on_published(asked)),
            )

    def _on_published(self, asked: Mapping[int, int]) -> None:
        self._publishing = False
        self._form()
        self._answer_all(asked)

    # --- what is upstream ---------------------------------------------------------------------

    def _on_read(self, peer: Peer, read: m.Read) -> None:
        if read.what == "extra":
            super()._on_read(peer, read)
        else:
            self._pass_on(peer, read)

    def _on_write(self, peer: Peer, write: m.Write, payload: Sequence[Frame]) -> None:
        if write.what in ("published", "extra"):
            super()._on_write(peer, write, payload)
        else:
            self._pass_on(peer, write, payload)

    def _on_set_steps(self, peer: Peer, message: m.SetSteps, payload: Sequence[Frame]) -> None:
        forward = self._forward
        assert forward is not None

        def then(*_: object) -> None:
            forward.download_steps(lambda: self._answer_all({peer.rank: message.seq}))

        self._pass_on(peer, message, payload, then=then)

    def _on_stats(self, peer: Peer, message: m.Stats) -> None:
        def then(_: m.Message, payload: list[Frame]) -> None:
            facts = self._merged(packing.unpack(payload[0]))
            if self._roster.holds(peer):
                self._reply(peer, m.Ok(seq=message.seq), packing.pack(facts))

        self._up.ask(m.Stats, then=then)

    def _missing(self) -> list[int]:
        return [] if self._publishing else super()._missing()

    def _merged(self, theirs: dict[str, Any]) -> dict[str, Any]:
        """This hub's account, completed by what is known of the other nodes."""
        mine = self.stats()
        others = {name: self._ranks_of(theirs[name]) for name in ("missing", "waiting_for")}
        return {
            **mine,
            "missing": sorted({*mine["missing"], *others["missing"]}),
            "waiting_for": sorted({*mine["waiting_for"], *others["waiting_for"]}),
            "counters": theirs["counters"],
            "upstream": {
                **theirs,
                "address": self._up.address,
                "sent_bytes": self._up.sent_bytes,
                "received_bytes": self._up.received_bytes,
            },
        }

    def _ranks_of(self, nodes: Iterable[int]) -> list[int]:
        """The ranks of other nodes; of this one more is known here."""
        count = len(self._roster.ranks)
        others = (node for node in nodes if node != self.settings.node_rank)
        return [rank for node in others for rank in range(node * count, (node + 1) * count)]

    def _pass_on(
        self,
        peer: Peer,
        message: m.Sessioned,
        payload: Sequence[Frame] = (),
        then: Callable[[m.Message, list[Frame]], None] | None = None,
    ) -> None:
        """Ask upstream what a worker has asked, and answer it with what comes."""
        self._declared(peer)

        def answer(_: m.Message, frames: list[Frame]) -> None:
            if self._roster.holds(peer):
                self._reply(peer, m.Ok(seq=message.seq), *frames)

        self._up.ask(
            type(message),
            *payload,
            then=then or answer,
            refused=lambda refusal: self._refuse_as(peer, message.seq, refusal),
            fields=_fields_of(message),
        )

    def _refuse_as(self, peer: Peer, seq: int, refusal: m.Refuse) -> None:
        """What upstream refused the node is refused to a worker."""
        if self._roster.holds(peer):
            text = m.cut(refusal.text)
            self._deliver(peer, [m.encode(m.Refuse(seq=seq, code=refusal.code, text=text))])


def _fields_of(message: m.Sessioned) -> dict[str, object]:
    """What is the request's own: not whose it is, and which."""
    known = m.Sessioned.model_fields
    return {name: value for name, value in vars(message).items() if name not in known}


def _at_home(upstream: Upstream) -> Settings:
    """What the node's workers agree on: as upstream, but in shared memory nothing is encoded."""
    return upstream.agreed.replace(compression="none", pull_compression="none")
