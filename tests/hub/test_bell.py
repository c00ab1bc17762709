"""Pushes by the bell at a real hub: in their order among messages, and whatever they say."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.hub.pair import LR, SHAPES, Pair
from tests.hub.raw import Raw
from zps import native
from zps.errors import WaitTimeout
from zps.memory.bell import Bell, Knocker, Ring
from zps.memory.segment import Segment, SegmentRef
from zps.wire import messages as m

BUCKETS = 3


class Ringer:
    """The raw peer's bell."""

    def __init__(self, raw: Raw, attach: m.Attach, rank: int = 1):
        assert attach.bell is not None
        assert attach.doorway is not None
        at = attach.bell
        self.raw = raw
        self.bell = Bell(
            Segment.attach(SegmentRef(at.pid, at.fd, at.nbytes), writable=True), BUCKETS
        )
        self.knocker = Knocker(at.pid, attach.doorway, rank)

    def write(self, bases: list[int], **changes: Any) -> None:
        """Lay a push, an honest one but for `changes`."""
        self.raw.seq += 1
        ring = Ring(self.raw.seq, self.raw.seq - 1, bases[0], 1.0, 1.0, finite=True, hold=False)
        self.bell.write(ring._replace(**changes), np.array(bases, np.uint64))

    def ring(self, bases: list[int], **changes: Any) -> None:
        self.write(bases, **changes)
        self.knocker.knock()


@pytest.fixture
def ringer(pair: Pair) -> Iterator[Ringer]:
    ringer = Ringer(pair.raw, pair.attach)
    yield ringer
    ringer.knocker.close()


def updates(raw: Raw) -> int:
    """How many buckets the hub has updated, as the raw peer hears."""
    updates: int = raw.stats()["counters"]["updates"]
    return updates


def test_a_ring_is_a_push_of_every_bucket(pair: Pair, ringer: Ringer) -> None:
    pair.finish_round(lambda: ringer.ring([pair.round] * BUCKETS))
    pair.finish_round(lambda: ringer.ring([pair.round] * BUCKETS))


def test_a_knock_that_is_lost_delays_and_no_more(pair: Pair, ringer: Ringer) -> None:
    pair.finish_round(lambda: ringer.write([pair.round] * BUCKETS))


def test_a_ring_waits_for_the_messages_that_were_sent_before_it(pair: Pair, ringer: Ringer) -> None:
    raw = pair.raw
    done = updates(raw)
    work = pair.worker.push({name: torch.ones(shape) for name, shape in SHAPES.items()})
    raw.slots.bytes.view(np.float32)[:] = 1
    before = pair.weights()
    ringer.ring([pair.round] * BUCKETS, seq=raw.seq + 10, after=raw.seq + 3)
    raw.seq -= 1
    assert [updates(raw), updates(raw)] == [done, done]
    assert updates(raw) == done  # the message it waits for is answered first
    work.wait()
    raw.seq += 10
    assert updates(raw) == done + BUCKETS
    assert torch.equal(pair.weights(), before - LR)


def test_a_ring_is_taken_before_the_message_that_was_sent_after_it(
    pair: Pair, ringer: Ringer
) -> None:
    done = updates(pair.raw)
    pair.raw.slots.bytes.view(np.float32)[:] = 1
    work = pair.worker.push({name: torch.ones(shape) for name, shape in SHAPES.items()})
    assert updates(pair.raw) == done
    ringer.write([pair.round] * BUCKETS)  # and nobody knocks
    assert updates(pair.raw) == done + BUCKETS
    work.wait()


BAD: dict[str, tuple[Callable[[int], dict[str, Any]], str]] = {
    "a version to come": (lambda r: {"bases": [r, r, r + 1]}, "computed on version"),
    "an endless version": (lambda r: {"bases": [r, r, 2**64 - 1]}, "computed on version"),
    "a round that runs away": (lambda r: {"round": r + 500}, "must wait"),
    "an endless round": (lambda r: {"round": 2**48}, "a bell that was rung"),
    "samples that are no number": (lambda r: {"samples": float("nan")}, "samples=nan"),
    "endless samples": (lambda r: {"samples": float("inf")}, "samples=inf"),
    "negative samples": (lambda r: {"samples": -1.0}, "samples=-1.0"),
    "a scale of zero": (lambda r: {"grad_scale": 0.0}, "grad_scale=0.0"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_ring_is_refused_and_changes_nothing(pair: Pair, ringer: Ringer, what: str) -> None:
    make, text = BAD[what]
    with pair.unchanged():
        changes = make(pair.round)
        ringer.ring(changes.pop("bases", [pair.round] * BUCKETS), **changes)
        assert text in pair.raw.expect(m.Refuse).text


def test_an_endless_number_is_refused_and_changes_nothing(pair: Pair, ringer: Ringer) -> None:
    with pair.unchanged():
        ringer.write([pair.round] * BUCKETS)
        native.store_u64(ringer.bell.segment.address, 2**60)
        ringer.knocker.knock()
        assert "a bell that was rung for push" in pair.raw.expect(m.Refuse).text
        native.store_u64(ringer.bell.segment.address, 0)


def test_a_ring_that_was_taken_is_not_taken_again(pair: Pair, ringer: Ringer) -> None:
    pair.finish_round(lambda: ringer.ring([pair.round] * BUCKETS))
    with pair.unchanged():
        for _ in range(5):
            ringer.knocker.knock()
        updates(pair.raw)


def test_a_bucket_whose_slot_is_taken_is_refused(pair: Pair, ringer: Ringer) -> None:
    raw = pair.raw
    raw.send(raw.push(round=pair.round, buckets=[1], bases=[pair.round]))
    ringer.ring([pair.round] * BUCKETS)
    assert "bucket 1 was pushed again" in raw.expect(m.Refuse).text
    raw.send(raw.push(round=pair.round, buckets=[0, 2], bases=[pair.round] * 2))
    pair.worker.push({name: torch.ones(shape) for name, shape in SHAPES.items()}).wait()


def test_whatever_is_written_to_the_doorway_does_no_harm(pair: Pair, ringer: Ringer) -> None:
    with pair.unchanged():
        rubbish = os.open(
            f"/proc/{pair.attach.bell.pid}/fd/{pair.attach.doorway}", os.O_WRONLY | os.O_NONBLOCK
        )
        os.write(rubbish, struct.pack("<III", 0, 2**32 - 1, 77) + b"\0")
        os.close(rubbish)
        updates(pair.raw)


def test_a_ring_before_the_job_has_begun_is_refused_each_time(hub: str) -> None:
    with Raw(hub) as raw:
        raw.greet(rank=0, world_size=2)
        raw.send(*raw.declaration(SHAPES, "sgd", {"lr": LR}))
        early = Ringer(raw, raw.expect(m.Attach), rank=0)
        for _ in range(3):
            early.ring([0] * BUCKETS)
            assert raw.expect(m.Refuse).code == "not_formed"
        assert raw.stats()["versions"] == 0
        early.knocker.close()


def test_a_bell_that_stays_bad_does_not_keep_the_hub_busy(pair: Pair, ringer: Ringer) -> None:
    for _ in range(3):  # it has been an ordinary one before
        pair.finish_round(lambda: ringer.ring([pair.round] * BUCKETS))
    ringer.ring([pair.round] * BUCKETS, round=2**48)
    work = pair.worker.push({name: torch.ones(shape) for name, shape in SHAPES.items()})
    with pytest.raises(WaitTimeout):
        work.wait(1.0)
    refusals = 0
    while pair.raw.socket.poll(0):
        pair.raw.expect(m.Refuse)
        refusals += 1
    assert 1 <= refusals < 20  # one every half second, and one for each message
    native.store_u64(ringer.bell.address, 0)
    buckets = list(range(BUCKETS))
    pair.raw.send(pair.raw.push(round=pair.round, buckets=buckets, bases=[pair.round] * BUCKETS))
    work.wait()
