"""Who is here: the handshake, and the sessions of one job in one life of the hub."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

from zps.codec.spec import Compression
from zps.config import Settings
from zps.core.membership import Admitted, Membership
from zps.errors import CompressionSyntaxError
from zps.hub.job import Peer, Refused
from zps.wire import messages as m
from zps.wire.sockets import host_id

_CODECS = ("compression", "pull_compression")


class Roster:
    """Peers by route and by rank. Its epoch names this life: messages of others are refused."""

    def __init__(self, settings: Settings, world_size: int | None = None):
        self.settings = settings
        self.epoch = secrets.randbits(62)
        self.world_size = world_size or settings.world_size or 1
        self.ranks = settings.ranks_here or range(self.world_size)
        self.formed = False
        self._world_is_known = bool(world_size or settings.world_size)
        self._by_route: dict[bytes, Peer] = {}
        self._by_rank: dict[int, Peer] = {}
        self.members = Membership(
            self.world_size,
            min_workers=min(settings.min_workers, len(self.ranks)),
            on_death=settings.on_death,
            ranks=self.ranks,
        )

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._by_route.values()))

    def __len__(self) -> int:
        return len(self._by_route)

    def holds(self, peer: Peer) -> bool:
        """Whether `peer` is the present holder of its rank."""
        return self._by_rank.get(peer.rank) is peer

    def of_rank(self, rank: int) -> Peer | None:
        return self._by_rank.get(rank)

    def of_route(self, route: bytes) -> Peer | None:
        return self._by_route.get(route)

    def of_session(self, session: int) -> Peer | None:
        return next((peer for peer in self if peer.session == session), None)

    def of_connection(self, connection: int) -> Peer | None:
        """The remote peer behind a connection; the elder if its number was given away since."""
        peers = (p for p in self if p.pidfd < 0 and p.connection == connection)
        return min(peers, key=lambda peer: peer.session, default=None)

    def sender(self, route: bytes, message: m.Sessioned) -> Peer:
        """Whose message this is; raises Refused for strangers and for earlier lives."""
        peer = self._by_route.get(route)
        if peer is None:
            raise Refused("no_session", "this hub does not know you: say hello first, or rejoin")
        if message.epoch != self.epoch or message.session != peer.session:
            raise Refused("old_session", "the message belongs to an earlier life; rejoin")
        return peer

    def check(self, hello: m.Hello) -> None:
        """Raise Refused unless this worker can work with this hub, whatever its rank."""
        if hello.protocol != m.PROTOCOL:
            raise Refused(
                "protocol",
                f"the hub speaks protocol {m.PROTOCOL}, the worker {hello.protocol}; "
                "install the same version of zps on both sides",
            )
        if hello.job != self.settings.job:
            raise Refused("job", f"this hub serves job {self.settings.job!r}, not {hello.job!r}")
        ours = {name: getattr(self.settings, name) for name in m.SHARED_SETTINGS}
        ours["world_size"] = self.world_size if self._world_is_known else None
        for name, theirs in {**hello.settings, "world_size": hello.world_size}.items():
            if theirs is not None and ours.get(name) not in (None, theirs):
                raise Refused("settings", _unlike(name, theirs, ours[name]))

    def admit(self, route: bytes, hello: m.Hello, connection: int = -1) -> tuple[Peer, bool]:
        """The worker's peer, and whether it is new; a repeated hello gets the same again.

        connection  over which it came

        Raises Refused, without effect, for a rank that is taken or out of range, for a process that
        is not there, and for a socket that has a worker already.
        """
        known = self._by_route.get(route)
        if known is not None:
            if known.hello != hello:
                raise Refused(
                    "duplicate_hello", f"this socket belongs to rank {known.rank} already"
                )
            return known, False
        pidfd = _watch(hello)
        rank = self._free_rank() if hello.rank is None else hello.rank
        answer = self.members.hello(rank, hello.incarnation)
        if not isinstance(answer, Admitted) or answer.repeat:
            if pidfd >= 0:
                os.close(pidfd)
            if isinstance(answer, Admitted):
                raise Refused("duplicate_hello", f"rank {rank} said this hello over another socket")
            raise Refused(answer.code, answer.text)
        peer = Peer(route, answer.session, rank, hello, pidfd, connection)
        self._by_route[route] = self._by_rank[rank] = peer
        self._world_is_known = True
        return peer, True

    def welcome(self, peer: Peer) -> m.Welcome:
        return m.Welcome(
            protocol=m.PROTOCOL,
            epoch=self.epoch,
            session=peer.session,
            rank=peer.rank,
            world_size=self.world_size,
            pid=os.getpid(),
            host=host_id(),
            settings={name: getattr(self.settings, name) for name in m.SHARED_SETTINGS},
        )

    def remove(self, peer: Peer) -> None:
        """Forget a peer that has left; its descriptors are closed."""
        del self._by_route[peer.route], self._by_rank[peer.rank]
        peer.close()

    def needed(self) -> tuple[int, ...]:
        """The ranks that a collective waits for: all of them until the job has formed."""
        if not self.formed:
            return tuple(self.ranks)
        return tuple(sorted(peer.rank for peer in self if peer.declared))

    def _free_rank(self) -> int:
        return next((r for r in self.ranks if r not in self._by_rank), self.ranks.stop)


def _unlike(name: str, theirs: m.Setting, ours: object) -> str:
    """Why a worker with this value of a shared setting is refused, and what it can do."""
    if name in _CODECS and isinstance(theirs, str):
        try:
            Compression.parse(theirs, weights=name == "pull_compression")
        except CompressionSyntaxError as error:  # alike on both would not help here
            return (
                f"this hub cannot read the worker's {name}: {error.what}; expected "
                f"{error.expected}. Install the same version of zps on both sides, or choose what "
                "both know"
            )
    return (
        f"{name} is {theirs!r} on the worker but {ours!r} on the hub; "
        "set it alike on both, or on the hub alone"
    )


def _watch(hello: m.Hello) -> int:
    """A descriptor that tells when the worker's process ends; -1 for one on another host."""
    if hello.host != host_id():
        return -1
    try:
        return os.pidfd_open(hello.pid)
    except OSError as error:
        raise Refused("gone", f"the hub cannot watch process {hello.pid}: {error}") from error
