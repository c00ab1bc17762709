"""The control segment: every word where both sides look for it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zps import native
from zps.errors import ProtocolError
from zps.memory.control import (
    OUTCOME_BITS,
    Control,
    Outcome,
    done_target,
    done_word,
    outcomes_of,
)
from zps.memory.segment import Segment

SHAPE = {"world_size": 3, "buckets": 5, "pieces": 7}


def both_sides() -> tuple[Control, Control]:
    hub = Control.create(epoch=42, **SHAPE)
    worker = Control(Segment.attach(hub.segment.ref, writable=False), **SHAPE)
    return hub, worker


def test_each_word_has_a_place_of_its_own_and_both_sides_know_it():
    hub, worker = both_sides()
    parts = {"head": hub.head, "mail": hub.mail, "seq": hub.seq, "closed": hub.closed}
    parts |= {"steps": hub.steps, "done": hub.done.reshape(-1)}
    for number, words in enumerate(parts.values(), 1):
        words[:] = 1000 * number + np.arange(len(words)).astype(words.dtype)
    assert [len(words) for words in parts.values()] == [8, 3, 5, 5, 7, 15]
    for name, words in parts.items():
        assert getattr(worker, name).reshape(-1).tolist() == words.tolist()


def test_the_docstrings_offsets_are_true():
    hub, _ = both_sides()
    hub.head[:] = np.arange(8)
    words = hub.segment.bytes.view(np.uint64)
    assert hub.epoch == words[8 // 8] == 1
    assert hub.signal_address == hub.segment.address + 16
    hub.beat(7_500_000_000)
    assert words[24 // 8] == 7_500_000_000
    assert hub.beat_s == 7.5
    assert hub.mail_address(0) == hub.segment.address + 64


def test_addresses_are_those_of_the_words():
    hub, _ = both_sides()
    hub.mail[:] = [10, 11, 12]
    hub.seq[:] = range(20, 25)
    hub.done[:] = np.arange(30, 45).reshape(3, 5)
    assert [native.load_u64(hub.mail_address(rank)) for rank in range(3)] == [10, 11, 12]
    assert [native.load_u64(hub.seq_address(b)) for b in range(5)] == list(range(20, 25))
    assert [native.load_u64(hub.done_address(rank)) for rank in range(3)] == [30, 35, 40]


def test_a_worker_cannot_write_any_word():
    _, worker = both_sides()
    for words in (worker.head, worker.mail, worker.seq, worker.closed, worker.steps, worker.done):
        with pytest.raises(ValueError, match="read-only"):
            words.flat[0] = 1


def test_a_segment_that_is_too_small_for_the_layout_is_refused():
    segment = Segment.create("control", 100)
    with pytest.raises(ProtocolError, match="12 words, but needs 107"):
        Control(segment, **SHAPE)


def test_another_life_or_another_segment_is_refused():
    hub, worker = both_sides()
    worker.check(42)
    with pytest.raises(ProtocolError, match="does not belong"):
        worker.check(43)
    hub.head[0] = 0
    with pytest.raises(ProtocolError, match="does not belong"):
        worker.check(42)


@given(st.integers(0, (1 << 60) - 1), st.sampled_from(Outcome), st.integers(0, (1 << 60) - 1))
def test_a_push_is_done_once_its_number_is_reached_whatever_its_outcome(seq, outcome, other):
    word = np.uint64(done_word(seq, outcome))  # all of it fits
    target = done_target(np.array([other], np.uint64))[0]
    assert (word >= target) == (seq >= other)
    assert outcomes_of(np.array([word], np.uint64)).tolist() == [outcome]


def test_every_outcome_has_room():
    assert max(Outcome) < 1 << OUTCOME_BITS


def test_the_reason_for_the_end_outlives_the_hubs_messages():
    hub, worker = both_sides()
    assert worker.last_words == ""
    hub.say_last("rank 1 died")
    assert worker.last_words == "rank 1 died"
    hub.say_last("é" * 1000)
    assert worker.last_words.startswith("é" * 256)
