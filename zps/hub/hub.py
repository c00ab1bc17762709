"""The event loop: poll, decode, decide, apply, reply.

One thread owns the ROUTER. A handler either answers or changes the engine; nothing else does I/O.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import zmq

from zps import native
from zps.codec.plan import Plan
from zps.config import Settings
from zps.core.collectives import Collectives
from zps.core.membership import Verdict
from zps.core.rounds import MAX_AHEAD
from zps.errors import OutOfMemory, ProtocolError, ZpsError
from zps.hub import state
from zps.hub.courier import Courier
from zps.hub.docket import Findings
from zps.hub.engine import Engine, Policy
from zps.hub.express import Express
from zps.hub.job import Declaration, Job, Peer, Refused, ResolveRule
from zps.hub.pushes import Pushes
from zps.hub.roster import Roster
from zps.hub.service import Service, check_repeated
from zps.hub.store import Store
from zps.memory.bell import Doorway
from zps.memory.control import Control
from zps.trace import Tracer
from zps.wire import messages as m
from zps.wire import packing
from zps.wire.sockets import Frame, Router, host_id, readable

log = logging.getLogger("zps.hub")

Watched = int | zmq.Socket[bytes]

_BEAT_S = 0.5
_POLL_BACKLOG_MS = 10
_PARTING_S = 0.1
_TURN_MESSAGES = 256  # a peer that never stops sending does not keep the others from their updates
_PROBE_BYTES = memoryview(bytes(m.MAX_PROBE_BYTES))  # one for all: answers not read take no memory


class Hub:
    """One shard of one job at a time. `run` returns when it is stopped."""

    role = "hub"  # in traces

    def __init__(
        self,
        settings: Settings,
        router: Router,
        *,
        resolve_rule: ResolveRule,
        on_event: Callable[[str], None] = lambda _: None,
    ):
        self.settings = settings
        self._router = router
        self._resolve_rule = resolve_rule
        self._on_event = on_event
        self._tracer = Tracer(settings.trace, self.role)
        self._pool = native.Pool(settings.hub_threads or len(os.sched_getaffinity(0)))
        self._poller = zmq.Poller()
        self._poller.register(router.socket, zmq.POLLIN)
        self._poller.register(router.monitor, zmq.POLLIN)
        self._doorway = Doorway()
        self._poller.register(self._doorway.inner, zmq.POLLIN)
        self._watches: dict[Watched, Callable[[], None]] = {}
        self._stopping = ""
        self._last_beat = 0.0
        self._asked: int | None = None  # the request being handled
        self._begin()

    # --- life ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `stop`. Leaves no peer without a word and no memory behind."""
        try:
            while not self._stopping:
                timeout_ms = _POLL_BACKLOG_MS if self._has_backlog else int(_BEAT_S * 1000)
                looked = self._service is not None and self._run_express(self._service.express)
                timeout_ms = 0 if looked else timeout_ms
                self._beat(looked=looked)
                readable = dict(self._poller.poll(timeout_ms))
                only_knocks = readable.keys() == {self._doorway.inner}
                # First: what a worker sent before it died counts.
                self._serve(0 if only_knocks else _TURN_MESSAGES)
                for fd in readable:
                    if fd in self._watches:
                        self._watches[fd]()
                    elif fd is self._router.monitor:
                        self._drop_the_cut()
                self._router.flush()
        except Exception as error:
            self.stop(f"the hub has failed: {type(error).__name__}: {error}")
            raise
        finally:
            self._close()

    def stop(self, why: str) -> None:
        """End the loop; workers are told why. The first reason counts."""
        self._stopping = self._stopping or m.cut(why)  # no more: it may be called by a signal

    def watch(self, fd: Watched, on_readable: Callable[[], None], events: int = zmq.POLLIN) -> None:
        """Call back from the loop when `fd` becomes readable: a pidfd, a signal pipe, a socket."""
        self._watches[fd] = on_readable
        self._poller.register(fd, events)

    def unwatch(self, fd: Watched) -> None:
        """Undo `watch`."""
        self._poller.unregister(fd)
        del self._watches[fd]

    def _begin(self) -> None:
        """A new life: nothing from before has a meaning any more."""
        self._roster = Roster(self.settings)
        self._service: Service | None = None
        self._collectives = Collectives("publish", "barrier")
        self._awaiting_rank0: list[tuple[Peer, m.Declare, Sequence[Frame]]] = []
        self._entering: list[tuple[Peer, int]] = []  # (newcomer, its request)
        self._replace_by: dict[int, float] = {}  # dead rank -> until when the others wait for it
        self._knocked: set[int] = set()  # ranks whose bell has yet to be looked at

    def _run_express(self, express: Express) -> bool:
        """Let rounds go by that need no decision; whether it came to that."""
        if self._has_backlog or self._entering or self._knocked:
            return False
        due = express.due()
        if due is None:
            return False
        sockets = [self._router.socket, self._router.monitor]
        sockets += [fd for fd in self._watches if isinstance(fd, zmq.Socket)]
        # A descriptor of libzmq's tells of what is new, once all that is there has been taken.
        if any(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN for socket in sockets):
            return False
        elsewhere = [int(socket.getsockopt(zmq.FD)) for socket in sockets]
        elsewhere += [fd for fd in self._watches if isinstance(fd, int)]
        express.run(due, elsewhere, _BEAT_S)
        self._look_at_bells()  # the lane has taken the knocks; and what they rang comes first
        return True

    def _serve(self, messages: int) -> None:
        """Take what has come, at most so many messages; pushes that come together are applied
        together."""
        for _ in range(messages):
            frames = self._router.receive()
            if frames is None:
                break
            self._asked = None
            route = bytes(frames[0])
            self._guarded(route, partial(self._on_message, route, frames[1:]))
        self._knocked |= self._doorway.knocks()
        if self._knocked:
            self._answer_knocks()
        self._flush()

    def _look_at_bells(self) -> None:
        """Whether somebody has knocked or not."""
        self._knocked |= {peer.rank for peer in self._roster}
        self._answer_knocks()

    def _answer_knocks(self) -> None:
        knocked, self._knocked = self._knocked, set()
        for rank in knocked:
            peer = self._roster.of_rank(rank)
            if peer is not None:
                self._guarded(peer.route, partial(self._take_ring, peer))

    def _flush(self) -> None:
        service = self._service
        if service is None:
            return
        service.job.engine.flush()
        with self._tracer.span("reply"):
            service.courier.turn()
        for session in service.courier.unreachable():
            peer = self._roster.of_session(session)
            if peer is not None:
                self._lose(peer, "it does not take its messages")
        if self._service is not service:
            return  # that was the last one
        self._ask(service.job)
        if self._entering:
            self._let_in(service.job)

    @property
    def _has_backlog(self) -> bool:
        return self._router.backlog or (self._service is not None and self._service.courier.backlog)

    @property
    def _job(self) -> Job | None:
        return None if self._service is None else self._service.job

    def _beat(self, *, looked: bool) -> None:
        """Do what is due now and then. looked: no bell has rung unheard just now."""
        now = time.monotonic()
        if now - self._last_beat < _BEAT_S:
            return
        self._last_beat = now
        if self._job is not None:
            self._job.control.beat(time.monotonic_ns())
        if not looked:
            self._look_at_bells()  # a knock may have been lost
            self._flush()
        for rank, deadline in self._replace_by.items():
            if now > deadline:
                self.stop(f"no replacement for rank {rank} came in {self.settings.timeout_s:g} s")

    def _close(self) -> None:
        log.info("ending: %s", self._stopping)
        if self._job is not None:
            self._job.control.say_last(self._stopping)
        for peer in self._roster:
            self._deliver(peer, [m.encode(m.Closing(text=self._stopping))])
        if any(peer.slots is None for peer in self._roster):
            # They cannot read last words, and a DEALER with IMMEDIATE forgets what it has not read
            # once its connection ends.
            time.sleep(_PARTING_S)
        for peer in self._roster:
            peer.close()
        if self._job is not None:
            self._tracer.finish(self._number(self._job))
            self._job.close()
        self._router.close()
        self._doorway.close()
        self._service = None  # it holds the pool
        self._pool.close()

    def _number(self, job: Job) -> int:
        """Which of the job's hubs this is."""
        return job.declared.place[0]

    # --- messages -----------------------------------------------------------------------------

    def _guarded(self, route: bytes, handle: Callable[[], None]) -> None:
        """Whatever is wrong with a request is its sender's to hear; the hub goes on."""
        try:
            handle()
            return
        except Refused as refusal:
            code, text = refusal.code, str(refusal)
        except ZpsError as error:
            log.warning("refused a message: %s", error)
            code = "out_of_memory" if isinstance(error, OutOfMemory) else type(error).__name__
            text = str(error)
        # Only here, when the error has let go of what the request had begun to allocate.
        self._refuse(route, code, text)

    def _on_message(self, route: bytes, frames: Sequence[Frame]) -> None:
        if not frames:
            raise ProtocolError("a message without a header")
        with self._tracer.span("recv"):
            message = m.decode(frames[0])
        if isinstance(message, m.Hello):
            self._on_hello(route, message)
            return
        if isinstance(message, m.Probe):
            self._on_probe(route, message)
            return
        if not isinstance(message, m.Sessioned):
            raise ProtocolError(f"a {message.tag} message is for workers")
        peer = self._roster.sender(route, message)
        self._guarded(route, partial(self._take_ring, peer))  # what was rung for before comes first
        self._asked = message.seq
        peer.heard = max(peer.heard, message.seq)
        if message.seq <= peer.last_seq:
            self._repeat(peer, message)
            return
        self._dispatch(peer, message, frames[1:])
        peer.last_seq = message.seq

    def _repeat(self, peer: Peer, message: m.Sessioned) -> None:
        """A request that was already carried out: answer it again, do nothing again."""
        if isinstance(message, m.Push | m.Data | m.Pull):
            return  # it is, or will be, answered once
        if message.seq == peer.last_seq and peer.last_reply:
            self._deliver(peer, peer.last_reply)

    def _dispatch(self, peer: Peer, message: m.Sessioned, payload: Sequence[Frame]) -> None:
        if isinstance(message, m.Push):
            self._formed(peer).message(peer, message, payload)
            return
        if isinstance(message, m.Data):
            with self._tracer.span("decide"):
                self._remote(peer).data(peer, message, payload)
            return
        self._flush()  # whatever is asked for now comes after the pushes before it
        if isinstance(message, m.Verdict):
            findings = Findings(message.norm_sq, message.finite)
            self._declared(peer).job.engine.decide(peer.rank, message.round, findings)
        elif isinstance(message, m.Declare):
            self._on_declare(peer, message, payload)
        elif isinstance(message, m.Enter):
            self._on_enter(peer, message)
        elif isinstance(message, m.Publish):
            self._declared(peer)
            peer.at_work = True
            self._collect("publish", peer, message.seq)
        elif isinstance(message, m.Barrier):
            self._collect("barrier", peer, message.seq)
        elif isinstance(message, m.Pull):
            self._remote(peer).pull(peer, message)
            peer.at_work = True
        elif isinstance(message, m.Read):
            self._on_read(peer, message)
        elif isinstance(message, m.Write):
            self._on_write(peer, message, payload)
        elif isinstance(message, m.SetSteps):
            self._on_set_steps(peer, message, payload)
        elif isinstance(message, m.Stats):
            self._on_stats(peer, message)
        elif isinstance(message, m.Bye):
            self._on_bye(peer, message)

    def _on_probe(self, route: bytes, probe: m.Probe) -> None:
        """Let a stranger measure the way here; not while there is somebody to disturb."""
        self._asked = probe.seq
        if len(self._roster):
            ranks = sorted(peer.rank for peer in self._roster)
            raise Refused("busy", f"it would slow down those who work here, ranks {ranks}")
        answer: list[Frame] = [m.encode(m.Probed(seq=probe.seq, host=host_id()))]
        self._router.send(route, answer + [_PROBE_BYTES[: probe.back]] * bool(probe.back))

    # --- joining ------------------------------------------------------------------------------

    def _on_hello(self, route: bytes, hello: m.Hello) -> None:
        self._drop_the_cut()  # before a descriptor of theirs is taken for the newcomer's
        if self._job is None and not len(self._roster) and self.settings.world_size is None:
            self._roster = Roster(self.settings, hello.world_size)  # the first says how many
        self._roster.check(hello)
        old = self._roster.of_rank(hello.rank) if hello.rank is not None else None
        if old is not None and old.route != route and old.pidfd >= 0 and readable(old.pidfd):
            self._lose(old, "its process has ended")  # its successor was faster than the news
        peer, is_new = self._roster.admit(route, hello, self._router.connection())
        if is_new:
            if peer.pidfd >= 0:
                self.watch(peer.pidfd, partial(self._look_after, peer))
            log.info("rank %d joined (process %d)", peer.rank, peer.pid)
        self._deliver(peer, [m.encode(self._roster.welcome(peer))])

    def _on_declare(self, peer: Peer, message: m.Declare, payload: Sequence[Frame]) -> None:
        if len(payload) not in (2, 3):
            raise ProtocolError(f"a declaration has 2 payload frames or 3, not {len(payload)}")
        declared = Declaration.read(
            message.rule,
            packing.unpack(payload[0]),
            bytes(payload[1]),
            self._resolve_rule,
            place=(message.hub, message.hubs),
            whole_data=packing.unpack(payload[2]) if len(payload) == 3 else None,
        )
        if declared.layout.hash != message.layout_hash:
            raise ProtocolError("the layout does not match its hash")
        if self._job is None and peer.rank != self._roster.ranks[0]:
            self._stop_awaiting(peer)
            self._awaiting_rank0.append((peer, message, payload))  # rank 0's model is the model
            return
        if self._service is None:
            self._service = self._open(declared, f"rank {peer.rank}")
        service, job = self._service, self._service.job
        job.check_same(declared, f"rank {peer.rank}")
        if peer.declared:  # it asks again, because the answer came too late for it
            check_repeated(peer, declared, shared=message.shared)
        else:
            self._enlist(job, peer, declared)
        peer.shares = message.shared
        service.equip(peer, shared=message.shared)
        if message.hubs > 1 and self._roster.formed:
            # All hubs let it in at the same round: they hear which one when each has named its own.
            self._send_attach(peer, message.seq)
        else:
            self._await_entry(job, peer, message.seq)
        waiting, self._awaiting_rank0 = self._awaiting_rank0, []
        for other, declare, frames in waiting:
            self._asked = declare.seq
            self._guarded(other.route, partial(self._on_declare, other, declare, frames))

    def _open(self, declared: Declaration, who: str) -> Service:
        try:
            job = Job.open(
                declared,
                self.settings,
                epoch=self._roster.epoch,
                world_size=self._roster.world_size,
                who=who,
                make_engine=self._make_engine,
            )
        except ZpsError as error:
            # Whoever waits for rank 0's model waits in vain.
            for other, declare, _ in self._awaiting_rank0:
                text = f"what {who} declared cannot be served: {error}"
                refusal = m.Refuse(seq=declare.seq, code="rank_0", text=m.cut(text))
                self._deliver(other, [m.encode(refusal)])
            self._awaiting_rank0.clear()
            raise
        job.control.beat(time.monotonic_ns())
        return Service.open(
            *(job, self.settings, self._roster, self._router),
            pool=self._pool,
            tracer=self._tracer,
            doorway=self._doorway,
        )

    def _make_engine(self, declared: Declaration, control: Control, policy: Policy) -> Engine:
        rule = self._resolve_rule(declared.rule)
        store = Store(
            declared.layout,
            rule,
            declared.group_of,
            declared.hypers,
            pool=self._pool,
            control=control,
            plan=Plan.build(
                declared.layout, self.settings.push_codecs, self.settings.compression_min_bytes
            ),
        )
        several = declared.place[1] > 1
        return Engine(store, control, policy, self._tracer, one_of_several=several)

    def _enlist(self, job: Job, peer: Peer, declared: Declaration) -> None:
        job.store.ensure_state(declared.hypers)  # may refuse, before anything is changed
        peer.declared = True
        peer.hypers = peer.first_hypers = declared.hypers
        self._roster.members.declared(peer.rank)
        if self._replace_by.pop(peer.rank, None) is not None:
            job.engine.leave(peer.rank)  # the one before it, for whom the round was kept open
        peer.first_round = job.engine.join(peer.rank)

    def _on_enter(self, peer: Peer, enter: m.Enter) -> None:
        job = self._declared(peer).job
        if enter.round > peer.first_round:
            if job.declared.place[1] == 1 or enter.round > peer.first_round + MAX_AHEAD:
                raise ProtocolError(f"an entry at round {enter.round}, not {peer.first_round}")
            peer.first_round = job.engine.enter(peer.rank, enter.round)
            self._flush()
        self._await_entry(job, peer, enter.seq)

    def _await_entry(self, job: Job, peer: Peer, seq: int) -> None:
        self._entering = [entry for entry in self._entering if entry[0] is not peer]
        self._entering.append((peer, seq))
        self._let_in(job)

    def _let_in(self, job: Job) -> None:
        """Answer newcomers once the rounds they are not part of have closed.

        A worker that reads weights in place would otherwise compute on half a round.
        """
        waiting, self._entering = self._entering, []
        for peer, seq in waiting:
            if not self._roster.holds(peer):
                continue  # it died while it waited
            if self._roster.formed and not job.engine.closed_before(peer.first_round):
                self._entering.append((peer, seq))
                continue
            peer.entered = True
            self._send_attach(peer, seq)

    def _send_attach(self, peer: Peer, seq: int) -> None:
        assert self._service is not None
        self._service.job.control.mail[peer.rank] = 0  # counts from here, this answer first
        self._reply(peer, self._service.attachment(peer, seq, formed=self._roster.formed))

    # --- rounds -------------------------------------------------------------------------------

    def _take_ring(self, peer: Peer) -> None:
        """Take the push that lies in a worker's bell, if it is a new one and its turn has come."""
        bell = peer.bell
        if bell is None or bell.rung <= peer.last_seq:
            return
        peer.rings = False  # until it is known to be an ordinary one
        self._asked = None
        with self._tracer.span("recv"):
            ring, bases = bell.read()
        if ring.seq <= peer.last_seq:
            return  # it has changed under the reader
        if ring.after > peer.heard:
            self._knocked.add(peer.rank)  # a message that it sent before is still on its way
            return
        self._asked = peer.last_seq = peer.heard = ring.seq
        self._formed(peer).ring(peer, ring, bases)

    def _formed(self, peer: Peer) -> Pushes:
        """Where a peer's pushes go. Raises Refused before the job has begun."""
        service = self._declared(peer)
        peer.at_work = True
        if not self._roster.formed:
            raise Refused("not_formed", "a push before the initial weights were published")
        return service.pushes

    def _remote(self, peer: Peer) -> Courier:
        service = self._declared(peer)
        if peer.slots is not None:
            raise ProtocolError(f"rank {peer.rank} shares the hub's memory: it sends no payload")
        return service.courier

    def _ask(self, job: Job) -> None:
        """Tell the workers what is known here of rounds on hold: they see all hubs."""
        for question in job.engine.questions():
            norm_sq, finite = question.measured
            partial_ = m.Partial(round=question.key[0], norm_sq=norm_sq, finite=finite)
            peers = [p for p in self._roster if p.entered and question.concerns(p.rank)]
            job.engine.asked(question, [peer.rank for peer in peers])
            for peer in peers:
                self._deliver(peer, [m.encode(partial_)])

    def _collect(self, what: str, peer: Peer, seq: int) -> None:
        """A collective: answered to all once all have asked."""
        self._collectives.ask(what, peer.rank, seq)
        self._finish_collectives()

    def _finish_collectives(self) -> None:
        for what, asked in self._collectives.complete(self._roster.needed()):
            self._on_collective(what, asked)

    def _on_collective(self, what: str, asked: Mapping[int, int]) -> None:
        """Everyone has asked: `asked` are their requests by rank."""
        if what == "publish":
            assert self._service is not None
            self._service.job.store.adopt_published()
            self._service.courier.published()
            self._form()
        self._answer_all(asked)

    def _answer_all(self, asked: Mapping[int, int]) -> None:
        for rank, seq in asked.items():
            peer = self._roster.of_rank(rank)
            if peer is not None:
                self._reply(peer, m.Ok(seq=seq))

    def _form(self) -> None:
        if not self._roster.formed:
            self._roster.formed = True
            log.info("all %d workers have joined", self._roster.world_size)
            self._on_event("formed")

    # --- reading and writing state ------------------------------------------------------------

    def _on_read(self, peer: Peer, read: m.Read) -> None:
        data = state.read(self._declared(peer).job.store, read)
        step = self.settings.bucket_bytes  # no frame is larger than what a socket accepts
        chunks = [data[at : at + step] for at in range(0, len(data), step)]
        self._reply(peer, m.Ok(seq=read.seq), *chunks)

    def _on_write(self, peer: Peer, write: m.Write, payload: Sequence[Frame]) -> None:
        state.write(self._declared(peer).job.store, write, b"".join(payload))
        self._reply(peer, m.Ok(seq=write.seq))

    def _on_set_steps(self, peer: Peer, message: m.SetSteps, payload: Sequence[Frame]) -> None:
        self._declared(peer).job.store.set_steps(packing.array(_only(payload), np.int64))
        self._reply(peer, m.Ok(seq=message.seq))

    def _on_stats(self, peer: Peer, message: m.Stats) -> None:
        self._reply(peer, m.Ok(seq=message.seq), packing.pack(self.stats()))

    def stats(self) -> dict[str, Any]:
        """What a person would ask a hub: who is here, how far, what was dropped."""
        roster, job = self._roster, self._job
        return {
            "epoch": roster.epoch,
            "world_size": roster.world_size,
            "formed": roster.formed,
            "live": list(roster.members.live),
            "missing": [] if roster.formed else self._missing(),
            "waiting_for": sorted(self._awaited()),
            "versions": sum(job.engine.rounds.versions) if job else 0,
            "counters": dict(job.engine.counters) if job else {},
        }

    def _awaited(self) -> set[int]:
        """The ranks whose gradients an open round needs, or who have yet to come to a barrier."""
        ranks = set(self._job.engine.waiting_for()) if self._job else set()
        return ranks | self._collectives.awaited(self._roster.needed())

    def _missing(self) -> list[int]:
        """The ranks that formation waits for."""
        came = self._collectives.came("publish")
        return [rank for rank in self._roster.ranks if rank not in came]

    # --- leaving ------------------------------------------------------------------------------

    def _on_bye(self, peer: Peer, bye: m.Bye) -> None:
        self._router.forget(peer.route)  # it waits for this answer alone
        self._reply(peer, m.Ok(seq=bye.seq))
        if bye.failed:
            self._lose(peer, "it ends by an error")
            return
        log.info("rank %d has finished", peer.rank)
        self._roster.members.bye(peer.rank)
        self._forget(peer)

    def _drop_the_cut(self) -> None:
        """Workers on other hosts are known to be gone by their connections."""
        for connection in self._router.lost():
            peer = self._roster.of_connection(connection)
            if peer is not None:
                self._lose(peer, "its connection has ended")

    def _look_after(self, peer: Peer) -> None:
        if self._roster.holds(peer) and readable(peer.pidfd):  # it may be another's by now
            self._lose(peer, "its process has ended")

    def _lose(self, peer: Peer, why: str) -> None:
        """A worker died: decide by policy who goes on."""
        log.warning("rank %d (process %d) is lost: %s", peer.rank, peer.pid, why)
        self._guarded(peer.route, partial(self._take_ring, peer))  # what it rang for counts
        self._router.forget(peer.route)
        members, formed = self._roster.members, self._roster.formed
        verdict = members.die(peer.rank)
        if verdict is Verdict.ABORT:
            self.stop(f"rank {peer.rank} (process {peer.pid}) has died: {members.why}")
        self._forget(peer, keep_waiting=formed and verdict is Verdict.WAIT)

    def _forget(self, peer: Peer, *, keep_waiting: bool = False) -> None:
        if peer.pidfd >= 0:
            self.unwatch(peer.pidfd)
        if self._service is not None:
            self._service.courier.forget(peer)
        self._roster.remove(peer)
        self._collectives.leave(peer.rank)
        self._stop_awaiting(peer)
        if self._stopping:
            return  # nothing goes on: whoever waits will hear why
        if keep_waiting:
            self._replace_by[peer.rank] = time.monotonic() + self.settings.timeout_s
        elif self._job is not None and peer.declared:
            self._job.engine.leave(peer.rank)
            self._flush()
        if not len(self._roster) and not self._replace_by:
            self._end_job()
        else:
            self._finish_collectives()

    def _stop_awaiting(self, peer: Peer) -> None:
        self._awaiting_rank0 = [entry for entry in self._awaiting_rank0 if entry[0] is not peer]

    def _end_job(self) -> None:
        """Everyone has left: be ready for the next job."""
        log.info("every worker has left")
        formed = self._roster.formed
        if self._job is not None:
            self._tracer.finish(self._number(self._job))
            self._job.close()
        self._begin()
        if formed:
            self._on_event("finished")

    # --- sending ------------------------------------------------------------------------------

    def _declared(self, peer: Peer) -> Service:
        if self._service is None or not peer.declared:
            raise Refused("not_declared", f"rank {peer.rank} has not declared its parameters")
        return self._service

    def _reply(self, peer: Peer, message: m.Message, *payload: Frame) -> None:
        peer.last_reply = [m.encode(message), *payload]
        self._deliver(peer, peer.last_reply)

    def _deliver(self, peer: Peer, frames: list[Frame]) -> None:
        if not self._router.send(peer.route, frames):
            log.warning("rank %d does not take its messages", peer.rank)
        elif self._job is not None and peer.declared and peer.slots is not None:
            self._job.control.mail[peer.rank] += 1
            native.post_signal(self._job.control.signal_address)

    def _refuse(self, route: bytes, code: str, text: str) -> None:
        refusal: list[Frame] = [m.encode(m.Refuse(seq=self._asked, code=code, text=m.cut(text)))]
        peer = self._roster.of_route(route)
        if peer is not None:
            self._deliver(peer, refusal)
        else:
            self._router.send(route, refusal)


def _only(payload: Sequence[Frame]) -> Frame:
    if len(payload) != 1:
        raise ProtocolError(f"1 payload frame expected, {len(payload)} came")
    return payload[0]
