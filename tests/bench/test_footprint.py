"""A hub's memory stays within what it was given, whoever pushes and whoever is late."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from bench import footprint
from bench.footprint import Footprint
from bench.peers import zps_round
from bench.peers.base import BenchError, Server

MODEL = 8 << 20
BUCKET = 256 << 10


@pytest.fixture(autouse=True)
def built() -> None:
    if reason := zps_round.Zps.available():
        pytest.skip(reason)


def test_a_hub_holds_no_more_gradients_than_it_was_given_room_for() -> None:
    found = footprint.measure(8, MODEL, buffer_bytes=1 << 20, bucket_bytes=BUCKET)
    assert found.needed == 3 * MODEL + (1 << 20)
    assert 2 * MODEL < found.held <= found.peak  # weights and momentum
    assert found.bounded, f"{found.peak / found.needed:.2f} of what is needed"


def test_a_hub_that_asks_for_everything_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    start = zps_round.start_hub

    @contextmanager
    def without_bounds(world: int, bind: str, **settings: Any) -> Iterator[Server]:
        settings["hub_buffer_bytes"] = 1 << 30
        with start(world, bind, **settings) as server:
            yield server

    monkeypatch.setattr(footprint, "start_hub", without_bounds)
    found = footprint.measure(8, MODEL, buffer_bytes=1 << 20, bucket_bytes=BUCKET, rounds=1)
    assert found.held > (2 + 7) * MODEL
    assert not found.bounded


def test_wrong_weights_are_told_instead_of_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "_expected", lambda rounds: 7.0)
    with pytest.raises(BenchError, match="worker 0 has wrong weights after 1 rounds"):
        footprint.measure(2, 2 * BUCKET, buffer_bytes=1 << 20, bucket_bytes=BUCKET)


def test_memory_of_a_process_is_what_it_has_touched() -> None:
    with mmap.mmap(-1, 32 << 20) as memory:
        before = footprint.resident_bytes(os.getpid())
        memory.write(bytes(len(memory)))
        after = footprint.resident_bytes(os.getpid())
    assert after - before >= 24 << 20  # what was freed meanwhile may have gone
    with pytest.raises(FileNotFoundError):
        footprint.resident_bytes(2**22 + 1)


def test_a_footprint_is_bounded_up_to_its_limit() -> None:
    assert Footprint(held=0, peak=130, needed=100).bounded
    assert not Footprint(held=0, peak=131, needed=100).bounded
