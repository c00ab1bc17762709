"""How a worker joins its hubs: hello to each, a declaration to each, one first round for all."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from zps.config import Settings
from zps.core.layout import Layout
from zps.core.shards import Shard
from zps.errors import ConfigError, ProtocolError, ZpsError
from zps.wire import messages as m
from zps.wire import packing
from zps.worker.link import Link
from zps.worker.session import Session
from zps.worker.shm_link import reachable

log = logging.getLogger("zps")

_GOODBYE_S = 2.0
_SLICE_S = 0.1  # how long one hub waits while another is served
_ENDING_S = 0.5


def greet(
    addresses: Sequence[str], settings: Settings, rank: int | None, world_size: int | None
) -> list[Session]:
    """A session at every hub, in order; the first one gives the rank where there is none.

    Raises what `Session` does, and ConfigError for hubs that differ in a setting, or
    have one that this version does not know.
    """
    sessions: list[Session] = []
    try:
        for address in addresses:
            sessions.append(Session(address, settings, rank, world_size))
            rank, world_size = sessions[-1].rank, sessions[-1].world_size
            _check_alike(sessions[0], sessions[-1])
        sessions[0].agree()  # now, while whoever cannot take them can still leave
    except BaseException:
        leave(sessions, failed=False)  # the rank is free again
        raise
    return sessions


def declare(
    sessions: Sequence[Session],
    settings: Settings,
    shards: Sequence[Shard],
    whole: Layout,
    *,
    rule: str,
    hypers: Sequence[bytes],
) -> list[m.Attach]:
    """Declare each hub's shard to it; returns once every hub lets this worker in.

    Raises LayoutMismatch, ConfigError, OutOfMemory, WaitTimeout.
    """
    answers = []
    for hub, (session, shard) in enumerate(zip(sessions, shards, strict=True)):
        payload = [packing.pack(shard.layout.to_wire()), hypers[hub]]
        if hub == 0 and len(sessions) > 1:
            payload.append(packing.pack(whole.to_wire()))  # it can say what differs, and how
        declaration = {
            "layout_hash": shard.layout.hash,
            "rule": rule,
            "hub": hub,
            "hubs": len(sessions),
        }
        answers.append(_connect(session, settings, declaration, payload))
    return answers if len(sessions) == 1 else _enter(sessions, answers)


def hand_over(links: Sequence[Link], rank: int, timeout_s: float) -> bool:
    """Serve the hubs until each has what was pushed to it; whether there was anything to do.

    Only warns of what is lost, because a hub has ended, or has asked for nothing in `timeout_s`.
    """
    owing = [link for link in links if link.owes]
    why = f"no hub has asked for them in {timeout_s:g} s"
    left = before = sum(link.owes for link in owing)
    deadline = time.monotonic() + timeout_s
    try:
        while left and time.monotonic() < deadline:
            for link in owing:
                if link.owes:
                    link.listen(_SLICE_S)
            left, before = sum(link.owes for link in owing), left
            if left < before:
                deadline = time.monotonic() + timeout_s  # it moves on
    except ZpsError as error:
        why = str(error)
    if left:
        log.warning("rank %d leaves, and gradients that it pushed are lost: %s", rank, why)
    return bool(owing)


def leave(sessions: Sequence[Session], *, failed: bool, timeout_s: float = _GOODBYE_S) -> None:
    """Say goodbye to every hub, and close. A hub may have gone first: that is no concern here.

    timeout_s  how long to wait for an answer, which comes after all that was sent has arrived
    """
    for session in sessions:
        session.neighbours = []  # their sockets close one after the other
    for session in sessions:
        with contextlib.suppress(ZpsError):
            session.request(m.Bye, timeout_s=timeout_s, failed=failed)
        session.close()
        session.last_words = str


def _connect(
    session: Session,
    settings: Settings,
    declaration: Mapping[str, Any],
    payload: Sequence[bytes],
) -> m.Attach:
    """Declare: with memory to share where both sides can and may, for messages otherwise."""

    def attach(*, shared: bool) -> m.Attach:
        return _attach(session.request(m.Declare, *payload, shared=shared, **declaration)[0])

    if settings.link == "shm" and not session.same_host:
        raise ConfigError(
            f"ZPS_LINK=shm, but the hub at {session.address} is on another host, or in another "
            "PID namespace; set ZPS_LINK=auto"
        )
    if settings.link == "message" or not session.same_host:
        return attach(shared=False)
    answer = attach(shared=True)
    try:
        reachable(answer)
    except ProtocolError as error:
        session.check_alive(_ENDING_S)  # the hub may be ending since it answered
        if settings.link == "shm":
            raise
        log.warning("rank %d uses messages instead of shared memory: %s", session.rank, error)
        return attach(shared=False)
    return answer


def _enter(sessions: Sequence[Session], answers: list[m.Attach]) -> list[m.Attach]:
    """Come to a running job at the same round everywhere.

    Each hub has named the first round that it can have this worker in, and waits with it. The
    latest of them is right for all; with a quorum hubs go at a pace of their own, and each has its
    own. They are told at once: one may wait for another.
    """
    latest = max(answer.first_round for answer in answers)
    in_step = sessions[0].welcome.settings.get("quorum") == 1
    told: dict[int, m.Sessioned] = {}
    for hub, (session, answer) in enumerate(zip(sessions, answers, strict=True)):
        if answer.formed:
            first = latest if in_step else answer.first_round
            told[hub] = session.post(m.Enter, round=first)
    for hub, enter in told.items():
        answers[hub] = _attach(sessions[hub].answer(enter)[0])
    return answers


def _attach(answer: m.Message) -> m.Attach:
    assert isinstance(answer, m.Attach)
    return answer


def _check_alike(first: Session, other: Session) -> None:
    for name, value in first.welcome.settings.items():
        theirs = other.welcome.settings.get(name)
        if value != theirs and name != "world_size":
            raise ConfigError(
                f"{name} is {value!r} at the hub {first.address} but {theirs!r} at the hub "
                f"{other.address}; start all hubs of a job with the same settings"
            )
