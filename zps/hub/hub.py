"""The event loop: poll, decode, decide, apply, reply.

One thread owns the ROUTER. A handler either answers or changes the engine; nothing else does I/O.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zmq

from zps import native
from zps.config import Settings
from zps.core.layout import Layout
from zps.core.membership import Admitted, Membership, Verdict
from zps.core.rounds import Mode
from zps.core.staleness import StalenessPolicy
from zps.errors import OutOfMemory, ProtocolError, ZpsError
from zps.hub.engine import Engine, Policy
from zps.hub.store import Contribution, ForeignFactory, Hypers, Store, make_hypers
from zps.memory.control import Control
from zps.memory.segment import Segment
from zps.optim.base import Rule
from zps.wire import messages as m
from zps.wire.sockets import Frame, Router, host_id

log = logging.getLogger("zps.hub")

_BEAT_S = 0.5

ResolveRule = Callable[[str], Rule | ForeignFactory]


@dataclass(slots=True)
class Peer:
    """One session: one life of one worker."""

    route: bytes
    session: int
    rank: int
    pid: int
    pidfd: int
    declared: bool = False
    slots: Segment | None = None
    hypers: Hypers | None = None
    last_seq: int = 0
    last_reply: list[Frame] = field(default_factory=list)


@dataclass(slots=True)
class Job:
    """What exists from the first declaration until the last worker has left."""

    layout: Layout
    rule: str
    engine: Engine
    control: Control
    group_of: tuple[int, ...]

    def close(self) -> None:
        self.engine.store.close()
        self.control.segment.close()


class Refused(Exception):
    """A request that is answered with Refuse(code, text) and changes nothing."""

    def __init__(self, code: str, text: str):
        super().__init__(text)
        self.code = code


class Hub:
    """One shard of one job at a time. `run` returns when it is stopped."""

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
        self._host = host_id()
        self._pool = native.Pool(settings.hub_threads or len(os.sched_getaffinity(0)))
        self._poller = zmq.Poller()
        self._poller.register(router.socket, zmq.POLLIN)
        self._watches: dict[int, Callable[[], None]] = {}
        self._stopping = ""
        self._reset(settings.world_size or 1)

    # --- life ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `stop`. Leaves no peer without a word and no memory behind."""
        try:
            while not self._stopping:
                timeout = 10 if self._router.backlog else int(_BEAT_S * 1000)
                for fd, _ in self._poller.poll(timeout):
                    if fd in self._watches:
                        self._watches[fd]()
                self._serve()
                self._router.flush()
                self._beat()
        finally:
            self._close()

    def stop(self, why: str) -> None:
        """End the loop; workers are told why."""
        self._stopping = self._stopping or why

    def watch(self, fd: int, on_readable: Callable[[], None]) -> None:
        """Call back from the loop when `fd` becomes readable: a pidfd, a signal pipe."""
        self._watches[fd] = on_readable
        self._poller.register(fd, zmq.POLLIN)

    def _serve(self) -> None:
        """Take everything that has come; pushes that come together are applied together."""
        while (frames := self._router.receive()) is not None:
            self._on_message(frames)
        if self._job is not None:
            self._flush()

    def _flush(self) -> None:
        assert self._job is not None
        self._job.engine.flush()

    def _beat(self) -> None:
        now = time.monotonic()
        if self._job is not None and now - self._last_beat >= _BEAT_S:
            self._last_beat = now
            self._job.control.beat(int(now * 1e9))
        for rank, deadline in self._replace_by.items():
            if now > deadline:
                self.stop(f"no replacement for rank {rank} came in {self.settings.timeout_s:g} s")

    def _reset(self, world_size: int) -> None:
        """A new life: nothing from before has a meaning any more."""
        self.epoch = secrets.randbits(62)
        self.world_size = world_size
        self._members = Membership(
            world_size,
            min_workers=min(self.settings.min_workers, world_size),
            on_death=self.settings.on_death,
        )
        self._peers: dict[bytes, Peer] = {}
        self._by_rank: dict[int, Peer] = {}
        self._job: Job | None = None
        self._formed = False
        self._last_beat = 0.0
        self._collective: dict[str, dict[int, int]] = {"publish": {}, "barrier": {}}
        self._awaiting_rank0: list[tuple[Peer, m.Declare, Sequence[bytes]]] = []
        self._replace_by: dict[int, float] = {}  # dead rank -> until when the others wait for it

    def _close(self) -> None:
        text = self._stopping or "the hub has failed; its log says why"
        for peer in list(self._peers.values()):
            self._send(peer, m.Closing(text=text))
            os.close(peer.pidfd)
            if peer.slots is not None:
                peer.slots.close()
        if self._job is not None:
            self._job.control.close_for_all()
            native.post_signal(self._job.control.signal_address)
            self._job.close()
        self._router.close()
        self._pool.close()

    # --- messages -----------------------------------------------------------------------------

    def _on_message(self, frames: list[bytes]) -> None:
        route, seq = frames[0], None
        try:
            if len(frames) < 2:
                raise ProtocolError("a message without a header")
            message = m.decode(frames[1])
            if isinstance(message, m.Hello):
                self._on_hello(route, message)
                return
            if not isinstance(message, m.Sessioned):
                raise ProtocolError(f"a {message.tag} message is for workers")
            seq = message.seq
            peer = self._peer(route, message)
            if message.seq <= peer.last_seq:
                self._repeat(peer, message)
                return
            self._dispatch(peer, message, frames[2:])
            peer.last_seq = message.seq
        except Refused as refusal:
            self._refuse(route, seq, refusal.code, str(refusal))
        except ZpsError as error:
            log.warning("refused a message: %s", error)
            self._refuse(route, seq, _code(error), str(error))

    def _dispatch(self, peer: Peer, message: m.Sessioned, payload: Sequence[bytes]) -> None:
        if isinstance(message, m.Push):
            self._on_push(peer, message, payload)
            return
        if self._job is not None:
            self._flush()  # whatever is asked for now comes after the pushes before it
        if isinstance(message, m.Declare):
            self._on_declare(peer, message, payload)
        elif isinstance(message, m.Publish):
            self._declared(peer)
            self._collect("publish", peer, message.seq)
        elif isinstance(message, m.Barrier):
            self._collect("barrier", peer, message.seq)
        elif isinstance(message, m.Read):
            self._on_read(peer, message)
        elif isinstance(message, m.Write):
            self._on_write(peer, message, payload)
        elif isinstance(message, m.SetSteps):
            job = self._declared(peer)
            steps = np.frombuffer(_only(payload), np.int64)
            job.engine.store.set_steps(steps)
            self._reply(peer, m.Ok(seq=message.seq))
        elif isinstance(message, m.Stats):
            self._reply(peer, m.Ok(seq=message.seq), m.pack(self.stats()))
        elif isinstance(message, m.Bye):
            self._on_bye(peer, message)

    def _peer(self, route: bytes, message: m.Sessioned) -> Peer:
        peer = self._peers.get(route)
        if peer is None:
            raise Refused("no_session", "this hub does not know you: say hello first, or rejoin")
        if message.epoch != self.epoch or message.session != peer.session:
            raise Refused("old_session", "the message belongs to an earlier life; rejoin")
        return peer

    def _repeat(self, peer: Peer, message: m.Sessioned) -> None:
        """A request that was already carried out: answer it again, do nothing again."""
        if isinstance(message, m.Push):
            return  # its outcome stands in the control segment
        if message.seq == peer.last_seq and peer.last_reply:
            self._router.send(peer.route, peer.last_reply)

    # --- joining ------------------------------------------------------------------------------

    def _on_hello(self, route: bytes, hello: m.Hello) -> None:
        if hello.protocol != m.PROTOCOL:
            raise Refused(
                "protocol",
                f"the hub speaks protocol {m.PROTOCOL}, the worker {hello.protocol}; "
                "install the same version of zps on both sides",
            )
        if hello.job != self.settings.job:
            raise Refused("job", f"this hub serves job {self.settings.job!r}, not {hello.job!r}")
        if hello.host != self._host:
            raise Refused(
                "other_host",
                "the worker does not share the hub's host and PID namespace, "
                "and this version exchanges gradients through shared memory only",
            )
        self._check_settings(hello)
        if hello.world_size is not None and self.settings.world_size is None and not self._peers:
            self._reset(hello.world_size)  # the first worker says how many there are
        rank = self._free_rank() if hello.rank is None else hello.rank
        answer = self._members.hello(rank, hello.incarnation)
        if not isinstance(answer, Admitted):
            raise Refused(answer.code, answer.text)
        if not answer.repeat:
            self._admit(route, rank, answer.session, hello.pid)
        self._send(
            self._peers[route],
            m.Welcome(
                protocol=m.PROTOCOL,
                epoch=self.epoch,
                session=answer.session,
                rank=rank,
                world_size=self.world_size,
                pid=os.getpid(),
                host=self._host,
                settings={name: getattr(self.settings, name) for name in m.SHARED_SETTINGS},
            ),
        )

    def _free_rank(self) -> int:
        live = set(self._members.live)
        return next((rank for rank in range(self.world_size) if rank not in live), self.world_size)

    def _check_settings(self, hello: m.Hello) -> None:
        ours = {name: getattr(self.settings, name) for name in m.SHARED_SETTINGS}
        ours["world_size"] = self.settings.world_size or (self._peers and self.world_size) or None
        theirs = {**hello.settings, "world_size": hello.world_size}
        for name, value in theirs.items():
            if value is not None and ours.get(name) not in (None, value):
                raise Refused(
                    "settings",
                    f"{name} is {value!r} on the worker but {ours[name]!r} on the hub; "
                    "set it alike on both, or on the hub alone",
                )

    def _admit(self, route: bytes, rank: int, session: int, pid: int) -> None:
        old = self._by_rank.get(rank)
        if old is not None:
            self._lose(old, "was replaced")
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise Refused("gone", f"the hub cannot watch process {pid}: {error}") from error
        peer = Peer(route, session, rank, pid, pidfd)
        self._peers[route] = self._by_rank[rank] = peer
        self.watch(pidfd, lambda: self._lose(peer, f"process {pid} died"))
        log.info("rank %d joined (process %d)", rank, pid)

    def _on_declare(self, peer: Peer, message: m.Declare, payload: Sequence[bytes]) -> None:
        if peer.declared:
            raise Refused("declared", f"rank {peer.rank} has declared its parameters already")
        if self._job is None and peer.rank != 0:
            self._awaiting_rank0.append((peer, message, payload))  # rank 0's model is the model
            return
        if len(payload) != 2:
            raise ProtocolError(f"a declaration has 2 payload frames, not {len(payload)}")
        layout = Layout.from_wire(m.unpack(payload[0]))
        hypers, group_of = self._read_groups(message.rule, payload[1], len(layout.params))
        if self._job is None:
            self._job = self._open_job(message.rule, layout, hypers, group_of)
        self._check_same(peer, message, layout, group_of)
        self._attach(peer, message.seq, hypers)
        waiting, self._awaiting_rank0 = self._awaiting_rank0, []
        for other, declare, frames in waiting:
            try:
                self._on_declare(other, declare, frames)
            except (Refused, ZpsError) as error:
                code = error.code if isinstance(error, Refused) else _code(error)
                self._refuse(other.route, declare.seq, code, str(error))

    def _read_groups(
        self, rule_name: str, data: bytes, params: int
    ) -> tuple[Hypers, tuple[int, ...]]:
        """Hyperparameters, and the group of every parameter."""
        rule = self._resolve_rule(rule_name)
        groups, norm = _unpack_groups(data)
        group_of = [-1] * params
        for index, group in enumerate(groups):
            for param in group.pop("params", ()):
                if not isinstance(param, int) or not 0 <= param < params or group_of[param] >= 0:
                    raise ProtocolError(f"group {index} lists parameter {param!r} wrongly")
                group_of[param] = index
        if -1 in group_of:
            raise ProtocolError(f"parameter {group_of.index(-1)} is in no group")
        own = rule if isinstance(rule, Rule) else None
        return make_hypers(own, groups, norm), tuple(group_of)

    def _open_job(
        self, rule: str, layout: Layout, hypers: Hypers, group_of: tuple[int, ...]
    ) -> Job:
        settings = self.settings
        control = Control.create(
            epoch=self.epoch,
            world_size=self.world_size,
            buckets=len(layout.buckets),
            pieces=len(layout.pieces),
        )
        store = Store(
            layout, self._resolve_rule(rule), group_of, hypers, pool=self._pool, control=control
        )
        policy = Policy(
            mode=Mode(settings.mode),
            staleness=settings.staleness,
            quorum=settings.quorum,
            staleness_policy=StalenessPolicy(settings.staleness_policy),
            alpha=settings.staleness_alpha,
            dc_lambda=settings.dc_lambda,
        )
        log.info(
            "%d parameters in %d buckets, rule %s, mode %s",
            *(len(layout.params), len(layout.buckets), rule, settings.mode),
        )
        return Job(layout, rule, Engine(store, control, policy), control, group_of)

    def _check_same(
        self, peer: Peer, message: m.Declare, layout: Layout, group_of: tuple[int, ...]
    ) -> None:
        job = self._job
        assert job is not None
        who = f"rank {peer.rank}"
        if layout.hash != job.layout.hash:
            raise Refused("layout", layout.explain_mismatch(job.layout, who, "rank 0"))
        if message.layout_hash != layout.hash:
            raise ProtocolError("the layout does not match its hash")
        if message.rule != job.rule:
            raise Refused("rule", f"the rule is {message.rule!r} on {who} but {job.rule!r} on rank 0")
        if group_of != job.group_of:
            raise Refused("groups", f"{who} puts its parameters in other groups than rank 0")

    def _attach(self, peer: Peer, seq: int, hypers: Hypers) -> None:
        job = self._job
        assert job is not None
        keeps_base = self.settings.staleness_policy == "dc"
        nbytes = job.layout.arena_bytes * (2 if keeps_base else 1)
        peer.slots = Segment.create(f"slots-{peer.rank}", nbytes)
        peer.hypers = hypers
        peer.declared = True
        self._members.declared(peer.rank)
        job.control.mail[peer.rank] = 0  # counts the messages of this session, the next one first
        if self._replace_by.pop(peer.rank, None) is not None:
            job.engine.leave(peer.rank)  # the one before it, for whom the round was kept open
        self._reply(
            peer,
            m.Attach(
                seq=seq,
                control=_at(job.control.segment),
                weights=_at(job.engine.store.weights),
                slots=_at(peer.slots),
                first_round=job.engine.join(peer.rank),
                formed=self._formed,
            ),
        )

    # --- rounds -------------------------------------------------------------------------------

    def _on_push(self, peer: Peer, push: m.Push, payload: Sequence[bytes]) -> None:
        job = self._declared(peer)
        if not self._formed:
            raise Refused("not_formed", "a push before the initial weights were published")
        rest = list(payload)
        hypers = peer.hypers
        if push.hypers:
            hypers = self._new_hypers(job, rest.pop(0) if rest else b"")
        absent = frozenset[int]()
        if push.absent:
            absent = frozenset(np.frombuffer(rest.pop(0) if rest else b"", np.uint32).tolist())
        if rest or len(push.buckets) != len(push.bases):
            raise ProtocolError("a push whose frames do not match its header")
        buckets = job.layout.buckets
        for bucket in push.buckets:
            if bucket >= len(buckets):
                raise ProtocolError(f"no bucket {bucket}; there are {len(buckets)}")
            if job.engine.slot_busy(peer.session, bucket):
                raise Refused("slot_busy", f"bucket {bucket} was pushed again before it was taken")
        if len(set(push.buckets)) != len(push.buckets):
            raise ProtocolError("a push names a bucket twice")
        if not (0 <= push.samples < float("inf") and 0 < push.grad_scale < float("inf")):
            raise ProtocolError(f"samples={push.samples}, grad_scale={push.grad_scale}")
        assert peer.slots is not None and hypers is not None
        peer.hypers = hypers
        keeps_base = self.settings.staleness_policy == "dc"
        for bucket, base_version in zip(push.buckets, push.bases, strict=True):
            slot = peer.slots.address + buckets[bucket].byte
            job.engine.push(
                Contribution(
                    rank=peer.rank,
                    session=peer.session,
                    bucket=bucket,
                    round=push.round,
                    seq=push.seq,
                    slots=peer.slots.bytes,
                    slot=slot,
                    base=slot + job.layout.arena_bytes if keeps_base else 0,
                    samples=push.samples,
                    grad_scale=push.grad_scale,
                    finite=push.finite,
                    hold=push.hold,
                    absent=absent,
                    hypers=hypers,
                ),
                base_version,
            )

    def _new_hypers(self, job: Job, data: bytes) -> Hypers:
        groups, norm = _unpack_groups(data)
        store = job.engine.store
        if len(groups) != 1 + max(job.group_of, default=-1):
            raise ProtocolError("the number of parameter groups has changed")
        hypers = make_hypers(store.rule, groups, norm)
        store.ensure_state(hypers)
        return hypers

    def _collect(self, what: str, peer: Peer, seq: int) -> None:
        """A collective: answered to all once all have asked."""
        self._collective[what][peer.rank] = seq
        self._finish_collectives()

    def _finish_collectives(self) -> None:
        for what, asked in self._collective.items():
            forming = what == "publish" and not self._formed
            needed = range(self.world_size) if forming else self._members.live
            if not asked or not set(needed) <= set(asked):
                continue
            if what == "publish":
                assert self._job is not None
                self._job.engine.store.adopt_published()
            if forming:
                self._formed = True
                log.info("all %d workers have joined", self.world_size)
                self._on_event("formed")
            done = dict(asked)
            asked.clear()
            for rank, seq in done.items():
                if rank in self._by_rank:
                    self._reply(self._by_rank[rank], m.Ok(seq=seq))

    # --- reading and writing state ------------------------------------------------------------

    def _on_read(self, peer: Peer, read: m.Read) -> None:
        store = self._declared(peer).engine.store
        if read.what == "state":
            data = store.read_state(read.field, read.index)
        elif read.what == "weights":
            data = store.read_master(read.index)
        else:
            data = store.read_foreign(read.index)
        step = self.settings.bucket_bytes  # no frame is larger than what a socket accepts
        chunks = [data[at : at + step] for at in range(0, len(data), step)]
        self._reply(peer, m.Ok(seq=read.seq), *chunks)

    def _on_write(self, peer: Peer, write: m.Write, payload: Sequence[bytes]) -> None:
        store = self._declared(peer).engine.store
        data = b"".join(payload)
        if write.what == "state":
            store.write_state(write.field, write.index, data)
        else:
            store.write_foreign(write.index, data)
        self._reply(peer, m.Ok(seq=write.seq))

    def stats(self) -> dict[str, Any]:
        """What a person would ask a hub: who is here, how far, what was dropped."""
        job = self._job
        return {
            "epoch": self.epoch,
            "world_size": self.world_size,
            "formed": self._formed,
            "live": list(self._members.live),
            "missing": [] if self._formed else list(self._members.missing()),
            "waiting_for": list(job.engine.waiting_for()) if job else [],
            "versions": sum(job.engine.rounds.versions) if job else 0,
            "counters": dict(job.engine.counters) if job else {},
        }

    # --- leaving ------------------------------------------------------------------------------

    def _on_bye(self, peer: Peer, bye: m.Bye) -> None:
        self._reply(peer, m.Ok(seq=bye.seq))
        log.info("rank %d has finished", peer.rank)
        self._members.bye(peer.rank)
        self._forget(peer)

    def _lose(self, peer: Peer, why: str) -> None:
        """A worker died: decide by policy who goes on."""
        if self._by_rank.get(peer.rank) is not peer:
            return
        log.warning("rank %d is lost: %s", peer.rank, why)
        members = self._members
        verdict = members.die(peer.rank)
        self._forget(peer, keep_waiting=verdict is Verdict.WAIT and self._formed)
        if verdict is Verdict.ABORT:
            self.stop(f"rank {peer.rank} is lost ({why}): {members.why}")

    def _forget(self, peer: Peer, *, keep_waiting: bool = False) -> None:
        self._poller.unregister(peer.pidfd)
        del self._watches[peer.pidfd]
        os.close(peer.pidfd)
        self._router.forget(peer.route)
        del self._peers[peer.route], self._by_rank[peer.rank]
        for asked in self._collective.values():
            asked.pop(peer.rank, None)
        if self._job is not None and peer.declared:
            if keep_waiting:
                self._replace_by[peer.rank] = time.monotonic() + self.settings.timeout_s
            else:
                self._job.engine.leave(peer.rank)
                self._flush()
        if peer.slots is not None:
            peer.slots.close()
        self._awaiting_rank0 = [waiting for waiting in self._awaiting_rank0 if waiting[0] is not peer]
        if not self._peers and not self._replace_by:
            self._end_job()
        else:
            self._finish_collectives()

    def _end_job(self) -> None:
        """Everyone has left: be ready for the next job."""
        log.info("every worker has left")
        if self._job is not None:
            self._job.close()
        formed = self._formed
        self._reset(self.settings.world_size or 1)
        if formed:
            self._on_event("finished")

    # --- sending ------------------------------------------------------------------------------

    def _declared(self, peer: Peer) -> Job:
        if self._job is None or not peer.declared:
            raise Refused("not_declared", f"rank {peer.rank} has not declared its parameters")
        return self._job

    def _reply(self, peer: Peer, message: m.Message, *payload: bytes) -> None:
        peer.last_reply = [m.encode(message), *payload]
        self._deliver(peer, peer.last_reply)

    def _send(self, peer: Peer, message: m.Message) -> None:
        self._deliver(peer, [m.encode(message)])

    def _deliver(self, peer: Peer, frames: list[Frame]) -> None:
        if not self._router.send(peer.route, frames):
            log.warning("rank %d does not take its messages", peer.rank)
        elif self._job is not None and peer.declared:
            self._job.control.mail[peer.rank] += 1
            native.post_signal(self._job.control.signal_address)

    def _refuse(self, route: bytes, seq: int | None, code: str, text: str) -> None:
        refusal = m.Refuse(seq=seq, code=code, text=text[:2900])
        peer = self._peers.get(route)
        if peer is not None:
            self._send(peer, refusal)
        else:
            self._router.send(route, [m.encode(refusal)])


def _code(error: ZpsError) -> str:
    return "out_of_memory" if isinstance(error, OutOfMemory) else type(error).__name__


def _only(payload: Sequence[bytes]) -> bytes:
    if len(payload) != 1:
        raise ProtocolError(f"1 payload frame expected, {len(payload)} came")
    return payload[0]


def _at(segment: Segment) -> m.SegmentAt:
    ref = segment.ref
    return m.SegmentAt(pid=ref.pid, fd=ref.fd, nbytes=ref.nbytes)


def _unpack_groups(data: bytes) -> tuple[list[dict[str, Any]], object]:
    fields = m.unpack(data)
    if not isinstance(fields, dict) or set(fields) != {"groups", "max_grad_norm"}:
        raise ProtocolError("hyperparameters are a map of groups and max_grad_norm")
    groups = fields["groups"]
    if not isinstance(groups, list) or not all(isinstance(g, Mapping) for g in groups):
        raise ProtocolError("parameter groups are a list of maps")
    return [dict(group) for group in groups], fields["max_grad_norm"]
