"""A worker that adds up what its hubs say of a round on hold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from zps.errors import HubLost
from zps.wire import messages as m
from zps.worker.verdicts import Verdicts


class FakeSession:
    def __init__(self) -> None:
        self.sent: list[m.Verdict] = []
        self.alive = True
        self.heed: Any = None
        self.attend: Any = None

    @contextmanager
    def sequenced(self) -> Iterator[int]:
        yield len(self.sent) + 1

    def header(self, seq: int) -> dict[str, int]:
        return {"epoch": 1, "session": 1, "seq": seq}

    def send(self, message: m.Verdict) -> None:
        self.sent.append(message)

    def check_alive(self) -> None:
        if not self.alive:
            raise HubLost("gone")


class FakeLink:
    """`says` comes with the next look at the mail that may wait, or at once."""

    def __init__(self, session: FakeSession) -> None:
        self._session = session
        self.private = False
        self.closed_rounds = np.zeros(2, np.int64)
        self.later: list[m.Partial] = []
        self.now: list[m.Partial] = []
        self.waits = 0

    def listen(self, timeout_s: float) -> None:
        self.waits += timeout_s > 0
        come = self.now + (self.later if timeout_s > 0 else [])
        self.now, self.later = [], [] if timeout_s > 0 else self.later
        for told in come:
            self._session.heed(told)


class Hub:
    def __init__(self) -> None:
        self.session = FakeSession()
        self.link = FakeLink(self.session)


def told(norm_sq: float = 0.0, *, round: int = 0, finite: bool = True) -> m.Partial:
    return m.Partial(round=round, norm_sq=norm_sq, finite=finite)


@pytest.fixture
def hubs() -> list[Hub]:
    return [Hub(), Hub(), Hub()]


def verdicts_of(hubs: list[Hub]) -> list[list[tuple[int, float, bool]]]:
    return [[(v.round, v.norm_sq, v.finite) for v in hub.session.sent] for hub in hubs]


def test_nothing_is_looked_at_as_long_as_nothing_is_on_hold(hubs: list[Hub]) -> None:
    verdicts = Verdicts(hubs, bsp=True)
    hubs[1].link.now = [told()]
    assert verdicts.attend() is False
    assert hubs[1].link.now


def test_what_all_hubs_say_is_added_up_and_sent_to_all(hubs: list[Hub]) -> None:
    verdicts = Verdicts(hubs, bsp=True)
    for hub, norm_sq in zip(hubs, (1.0, 2.5, 4.0), strict=True):
        hub.session.heed(told(norm_sq, round=7))
    assert verdicts.attend() is False
    assert verdicts_of(hubs) == [[(7, 7.5, True)]] * 3
    assert verdicts.attend() is False
    assert verdicts_of(hubs) == [[(7, 7.5, True)]] * 3


def test_the_hub_that_has_not_spoken_yet_is_waited_for(hubs: list[Hub]) -> None:
    verdicts = Verdicts(hubs, bsp=True)
    hubs[0].session.heed(told(1.0))
    hubs[1].link.now = [told(1.0)]
    assert verdicts.attend() is True
    assert [hub.link.waits for hub in hubs] == [0, 0, 1]
    hubs[2].link.later = [told(1.0)]
    assert verdicts.attend() is False
    assert verdicts_of(hubs) == [[(0, 3.0, True)]] * 3


@pytest.mark.parametrize("bad", [told(finite=False), told(1.7e308)], ids=["not finite", "too long"])
def test_one_part_that_is_not_finite_decides_for_all(hubs: list[Hub], bad: m.Partial) -> None:
    verdicts = Verdicts(hubs, bsp=True)
    for hub, part in zip(hubs, (told(1.7e308), bad, told(1.0)), strict=True):
        hub.session.heed(part)
    assert math.isinf(1.7e308 + 1.7e308)
    verdicts.attend()
    assert verdicts_of(hubs) == [[(0, 0.0, False)]] * 3


def test_in_bsp_a_hub_that_has_closed_a_round_without_asking_has_no_say(hubs: list[Hub]) -> None:
    verdicts = Verdicts(hubs, bsp=True)
    hubs[0].session.heed(told(1.0, round=3))
    hubs[2].session.heed(told(2.0, round=3))
    hubs[1].link.closed_rounds[:] = (4, 3)  # one of its buckets is still open
    assert verdicts.attend() is True
    hubs[1].link.closed_rounds[:] = 4
    assert verdicts.attend() is False
    assert verdicts_of(hubs) == [[(3, 3.0, True)]] * 3


def test_out_of_step_what_others_have_closed_says_nothing(hubs: list[Hub]) -> None:
    verdicts = Verdicts(hubs, bsp=False)
    hubs[0].session.heed(told())
    for hub in hubs:
        hub.link.closed_rounds[:] = 9
    assert verdicts.attend() is True
    assert verdicts_of(hubs) == [[], [], []]


def test_any_hubs_end_ends_every_wait(hubs: list[Hub]) -> None:
    verdicts = Verdicts(hubs, bsp=True)
    hubs[2].session.alive = False
    with pytest.raises(HubLost):
        verdicts.attend()


def test_who_does_not_wait_decides_what_can_be_decided(hubs: list[Hub]) -> None:
    verdicts = Verdicts(hubs, bsp=True)
    hubs[0].link.now, hubs[1].link.now = [told(1.0)], [told(1.0)]
    hubs[2].link.later = [told(1.0)]
    verdicts.poll()
    assert verdicts_of(hubs) == [[], [], []]
    assert hubs[2].link.waits == 0
    hubs[2].link.now = [told(1.0)]
    verdicts.poll()
    assert verdicts_of(hubs) == [[(0, 3.0, True)]] * 3


def test_what_was_decided_without_us_is_forgotten_in_time(hubs: list[Hub]) -> None:
    verdicts = Verdicts(hubs, bsp=True)
    for round_ in range(1000):
        hubs[0].session.heed(told(round=round_))
    assert len(verdicts._heard) < 100
