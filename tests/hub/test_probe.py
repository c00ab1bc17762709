"""Probes: a stranger measures the way to a hub that nobody works with, and leaves it as it was."""

from __future__ import annotations

import pytest

from tests.hub.pair import Pair
from tests.hub.raw import Fields, Raw
from zps.wire import messages as m
from zps.wire.sockets import host_id


def probe(back: int = 0, seq: int = 7) -> Fields:
    return {"t": "probe", "seq": seq, "back": back}


@pytest.mark.parametrize("back", [0, 1, m.MAX_PROBE_BYTES])
def test_a_probe_is_answered_with_as_many_bytes_as_it_asks_for(raw: Raw, back: int) -> None:
    raw.send(probe(back), bytes(100_000))
    assert raw.expect(m.Probed) == m.Probed(seq=7, host=host_id())
    assert [len(frame) for frame in raw.payload] == [back] * (back > 0)


def test_a_hub_is_as_before_a_probe(hub: str, raw: Raw) -> None:
    with Raw(hub) as stranger:
        for seq in range(3):
            stranger.ask(probe(1000, seq), bytes(1000))
        raw.greet(rank=None, world_size=5)  # the first worker still says how many there are
        stats = raw.stats()
        assert (stats["live"], stats["world_size"], stats["formed"]) == ([0], 5, False)


def test_more_bytes_than_a_probe_may_ask_for_are_refused(raw: Raw) -> None:
    refusal = raw.refused(probe(m.MAX_PROBE_BYTES + 1))
    assert refusal.code == "ProtocolError"
    assert "back" in refusal.text


def test_a_stranger_that_does_not_read_its_answers_is_its_own_concern(hub: str, raw: Raw) -> None:
    with Raw(hub) as deaf:
        for seq in range(200):
            deaf.send(probe(m.MAX_PROBE_BYTES, seq))
        assert isinstance(raw.ask(probe()), m.Probed)
        raw.greet(rank=None)
        assert raw.stats()["live"] == [0]


def test_a_hub_with_workers_is_not_probed(hub: str, pair: Pair) -> None:
    with pair.unchanged(), Raw(hub) as stranger:
        refusal = stranger.refused(probe(1000), bytes(1000))
        assert (refusal.seq, refusal.code) == (7, "busy")
        assert "those who work here, ranks [0, 1]" in refusal.text
