"""Who is here: sessions of one life of the hub, without a socket."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from typing import Any

import pytest

from zps.config import Settings
from zps.hub.job import Peer, Refused
from zps.hub.roster import Roster
from zps.memory.segment import Segment
from zps.wire import messages as m
from zps.wire.sockets import host_id


def hello(**changes: Any) -> m.Hello:
    fields = {
        "protocol": m.PROTOCOL,
        "job": "default",
        "rank": 0,
        "world_size": None,
        "incarnation": secrets.token_hex(8),
        "host": host_id(),
        "pid": os.getpid(),
        "settings": {},
    }
    return m.Hello(**{**fields, **changes})


def refusal(roster: Roster, route: bytes, message: m.Hello) -> str:
    try:
        roster.check(message)
        roster.admit(route, message)
    except Refused as refused:
        return refused.code
    pytest.fail("it was admitted")


def admit(roster: Roster, route: bytes, **changes: Any) -> Peer:
    peer, is_new = roster.admit(route, hello(**changes))
    assert is_new
    return peer


def test_a_worker_gets_its_rank_and_a_session():
    roster = Roster(Settings(), 2)
    peer = admit(roster, b"x", rank=1)
    assert roster.of_rank(1) is roster.of_route(b"x") is peer
    assert roster.holds(peer)
    assert list(roster) == [peer]
    welcome = roster.welcome(peer)
    assert (welcome.rank, welcome.world_size, welcome.session) == (1, 2, peer.session)
    assert welcome.pid == os.getpid()
    assert welcome.settings["mode"] == "bsp"


def test_ranks_are_given_out_from_the_lowest():
    roster = Roster(Settings(), 3)
    admit(roster, b"x", rank=1)
    assert [admit(roster, route, rank=None).rank for route in (b"y", b"z")] == [0, 2]
    assert refusal(roster, b"!", hello(rank=None)) == "rank_out_of_range"


def test_the_same_hello_again_is_the_same_peer():
    roster = Roster(Settings(), 2)
    for rank in (0, None):
        message = hello(rank=rank)
        peer, _ = roster.admit(b"%r" % rank, message)
        assert roster.admit(b"%r" % rank, message) == (peer, False)
    assert len(roster) == 2


@pytest.mark.parametrize("changes", [{"rank": 1}, {"pid": 1}, {"host": "elsewhere"}])
def test_a_session_has_one_hello(changes: dict[str, Any]):
    roster = Roster(Settings(), 2)
    first = hello(rank=0)
    roster.admit(b"x", first)
    assert refusal(roster, b"x", first.model_copy(update=changes)) == "duplicate_hello"


def test_sessions_are_never_the_same_twice():
    roster = Roster(Settings(), 1)
    sessions = []
    for _ in range(5):
        peer = admit(roster, b"x")
        sessions.append(peer.session)
        roster.members.die(0)
        roster.remove(peer)
    assert sessions == sorted(set(sessions))


def test_lives_have_different_epochs():
    assert len({Roster(Settings()).epoch for _ in range(20)}) == 20


def test_messages_of_another_life_are_refused():
    roster = Roster(Settings(), 1)
    peer = admit(roster, b"x")
    good = {"epoch": roster.epoch, "session": peer.session, "seq": 1}
    assert roster.sender(b"x", m.Stats(**good)) is peer
    for route, changes, code in (
        (b"y", {}, "no_session"),
        (b"x", {"epoch": roster.epoch ^ 1}, "old_session"),
        (b"x", {"session": peer.session + 1}, "old_session"),
    ):
        with pytest.raises(Refused) as caught:
            roster.sender(route, m.Stats(**{**good, **changes}))
        assert caught.value.code == code


def test_a_refused_hello_leaves_no_trace():
    roster = Roster(Settings(), 2)
    admit(roster, b"x")
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    before = os.listdir("/proc/self/fd")
    for message, code in (
        (hello(rank=0), "duplicate_rank"),
        (hello(rank=2), "rank_out_of_range"),
        (hello(rank=1, pid=process.pid), "gone"),
        (hello(rank=1, protocol=9), "protocol"),
        (hello(rank=1, job="other"), "job"),
        (hello(rank=1, world_size=3), "settings"),
        (hello(rank=1, settings={"staleness": 7}), "settings"),
    ):
        assert refusal(roster, b"y", message) == code
    assert os.listdir("/proc/self/fd") == before
    assert roster.members.live == (0,)
    assert roster.members.dead == ()
    admit(roster, b"y", rank=1)


def test_the_first_worker_says_how_many_there_are_unless_the_hub_knows():
    assert Roster(Settings(world_size=4)).world_size == 4
    assert Roster(Settings(), 3).world_size == 3
    roster = Roster(Settings())
    assert roster.world_size == 1
    roster.check(hello(world_size=7))  # nobody has said anything yet
    admit(roster, b"x")
    assert refusal(roster, b"y", hello(rank=1, world_size=7)) == "settings"


def test_a_setting_that_the_worker_did_not_choose_is_no_disagreement():
    roster = Roster(Settings(mode="ssp", staleness=3), 1)
    roster.check(hello(settings={"mode": "ssp", "staleness": None, "colour": "red"}))
    assert refusal(roster, b"x", hello(settings={"staleness": 2})) == "settings"


def test_collectives_wait_for_all_until_the_job_has_formed_then_for_those_who_declared():
    roster = Roster(Settings(), 3)
    peers = [admit(roster, b"%d" % rank, rank=rank) for rank in (0, 2)]
    assert roster.needed() == (0, 1, 2)
    roster.formed = True
    assert roster.needed() == ()
    for peer in peers:
        peer.declared = True
    assert roster.needed() == (0, 2)


def test_a_peer_that_is_removed_leaves_no_descriptor():
    roster = Roster(Settings(), 1)
    before = os.listdir("/proc/self/fd")
    peer = admit(roster, b"x")
    peer.slots = Segment.create("slots", 64)
    roster.remove(peer)
    assert not roster.holds(peer)
    assert len(roster) == 0
    del peer
    assert os.listdir("/proc/self/fd") == before
