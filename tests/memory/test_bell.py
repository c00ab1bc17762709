"""The bell and the doorway: what one side writes, the other reads, whatever else lies there."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zps import native
from zps.errors import ProtocolError
from zps.memory.bell import Bell, Doorway, Knocker, Ring, bell_bytes
from zps.memory.segment import Segment

BUCKETS = 3
RING = Ring(seq=7, after=5, round=2, samples=16.0, grad_scale=1024.0, finite=True, hold=False)


def both_sides() -> tuple[Bell, Bell]:
    hub = Bell.create(rank=0, buckets=BUCKETS)
    return hub, Bell(Segment.attach(hub.segment.ref, writable=True), BUCKETS)


@given(
    seq=st.integers(1, (1 << 60) - 1),
    after=st.integers(0, (1 << 60) - 1),
    round_=st.integers(0, (1 << 48) - 1),
    weight=st.floats(allow_nan=False),
    flags=st.tuples(st.booleans(), st.booleans()),
    bases=st.lists(st.integers(0, (1 << 64) - 1), min_size=BUCKETS, max_size=BUCKETS),
)
def test_a_push_is_read_as_it_was_written(seq, after, round_, weight, flags, bases):
    hub, worker = both_sides()
    ring = Ring(seq, after, round_, weight, -weight, *flags)
    worker.write(ring, np.array(bases, np.uint64))
    assert hub.rung == seq
    assert hub.read() == (ring, bases)


def test_nothing_has_been_rung_at_first():
    hub, _ = both_sides()
    assert hub.rung == 0


def test_what_was_read_is_a_copy():
    hub, worker = both_sides()
    worker.write(RING, np.arange(BUCKETS, dtype=np.uint64))
    ring, bases = hub.read()
    worker.segment.bytes[:] = 255
    assert (ring, bases) == (RING, [0, 1, 2])


@pytest.mark.parametrize(("word", "value"), [(0, 1 << 60), (2, 1 << 48)])
def test_numbers_that_no_message_could_hold_are_refused(word, value):
    hub, worker = both_sides()
    worker.write(RING, np.zeros(BUCKETS, np.uint64))
    native.store_u64(worker.segment.address + 8 * word, value)
    with pytest.raises(ProtocolError, match=str(value)):
        hub.read()


def test_a_page_that_is_too_small_is_refused():
    segment = Segment.create("bell", bell_bytes(BUCKETS) - 8)
    with pytest.raises(ProtocolError, match="a bell of 80 bytes, not 88"):
        Bell(segment, BUCKETS)


def test_knocks_tell_who_has_knocked_and_only_once():
    doorway = Doorway()
    for rank in (3, 70_000, 3):
        knocker = Knocker(os.getpid(), doorway.outer, rank)
        knocker.knock()
        knocker.close()
    assert doorway.knocks() == {3, 70_000}
    assert doorway.knocks() == set()
    doorway.close()


def test_a_full_doorway_and_one_that_is_gone_stop_nobody():
    doorway = Doorway()
    knocker = Knocker(os.getpid(), doorway.outer, 1)
    for _ in range(70_000 // 4):
        knocker.knock()
    assert doorway.knocks() == {1}
    doorway.close()
    knocker.knock()
    knocker.close()


def test_half_a_word_is_no_rank():
    doorway = Doorway()
    os.write(doorway.outer, b"\1\0\0\0\2")
    assert doorway.knocks() == {1}
    doorway.close()


def test_what_is_no_pipe_is_no_doorway(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    fd = os.open(tmp_path / "file", os.O_WRONLY)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ProtocolError, match="is no doorway of a hub"):
        Knocker(os.getpid(), fd, 0)
    os.close(fd)
    with pytest.raises(ProtocolError, match="cannot open the hub's doorway"):
        Knocker(os.getpid(), fd, 0)
    assert set(os.listdir("/proc/self/fd")) <= before
