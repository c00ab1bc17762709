"""Deaths of workers and of hubs, where a model lies over two hubs."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from tests.chaos.lives import Driver, lives, until
from tests.chaos.test_lost_hub import SOON_S, kill

LIMIT = 0.5
LARGE = 2.0**20  # more than all small pushes together, and still exact in sums of float32
CLIPPED = {"lr": 1.0, "max_grad_norm": LIMIT}


def addresses(hubs, count=2, **settings):
    """Hubs, and their addresses as workers take them."""
    started = [hubs.start(hub_threads=1, **settings) for _ in range(count)]
    return started, ",".join(hub.address for hub in started)


@contextmanager
def clipping(address, world):
    """Processes whose rounds are all on hold, as their gradient is clipped."""
    drivers = [Driver(address, rank, world) for rank in range(world)]
    try:
        together(drivers, "declare", "sgd", **CLIPPED)
        yield drivers
    finally:
        for driver in drivers:
            driver.end()


def together(drivers, what, *args, **options):
    """Tell all the same; returns when all have answered."""
    for driver in drivers:
        driver.begin(what, *args, **options)
    return [driver.answer() for driver in drivers]


@pytest.mark.parametrize("hub", [{"quorum": 0.5}, {"mode": "ssp"}], ids=str)
def test_a_death_in_the_middle_of_rounds_stops_nobody(hubs, hub):
    with lives(addresses(hubs, **hub)[1], 3) as (first, *others):
        first.begin("train", 300)
        for driver in others:
            driver.begin("train", 1_000_000)
        for victim in others:
            victim.process.join(0.15)  # not a wait for anything: any moment
            victim.kill()
        first.answer()
        first.ask("train", 5)


def test_who_dies_before_pushing_is_not_waited_for_at_any_hub(hubs):
    with lives(addresses(hubs)[1], 3) as (first, second, third):
        first.ask("push")
        second.ask("push")
        first.begin("wait")
        third.kill()
        assert first.answer() == second.ask("wait") == {"a": 2, "b": 2}


def test_the_others_train_on_after_a_death(hubs):
    with lives(addresses(hubs)[1], 3) as (first, second, third):
        together((first, second, third), "train", 3)
        third.kill()
        together((first, second), "train", 50)
        assert first.ask("weights") == second.ask("weights")
        assert first.ask("last_weights")["a"] == 3 * 3 + 2 * 50


@pytest.mark.parametrize("hub", [{}, {"mode": "async"}, {"mode": "ssp"}], ids=str)
def test_a_death_in_the_middle_of_rounds_on_hold_stops_nobody(hubs, hub):
    """Whoever was to give a verdict may be gone before it has, or when one hub has got it."""
    with clipping(addresses(hubs, **hub)[1], 3) as (first, *others):
        first.begin("train", 150)
        for driver in others:
            driver.begin("train", 1_000_000)
        for victim in others:
            victim.process.join(0.15)  # not a wait for anything: any moment
            victim.kill()
        first.answer()
        first.ask("train", 5)
        accounts = first.ask("stats")["hubs"]
        assert [account["live"] for account in accounts] == [[0], [0]]
        assert [account["waiting_for"] for account in accounts] == [[], []]


def test_a_round_on_hold_is_decided_by_whoever_is_left(hubs):
    with clipping(addresses(hubs)[1], 2) as (first, second):
        together((first, second), "push")  # both hubs have asked both workers, and none answers
        until(lambda: second.ask("stats")["waiting_for"] == [0, 1], "both are asked")
        first.kill()
        second.ask("wait")
        assert second.ask("stats")["counters"]["updates"] == 3


@pytest.mark.parametrize("lost", [0, 1])
def test_any_hubs_death_is_hub_lost_for_all_and_names_it(hubs, lost):
    started, address = addresses(hubs)
    with lives(address, 3) as drivers:
        for driver in drivers[:2]:
            driver.ask("push")
            driver.begin("wait")
        until(lambda: drivers[2].ask("stats")["waiting_for"] == [2], "two have pushed")
        at_s = kill(started[lost])
        for driver in drivers[:2]:
            failure = driver.failure()
            assert failure.kind == "HubLost"
            assert f"the hub at {started[lost].address} (process" in failure.text
            assert failure.at_s - at_s < SOON_S
        drivers[2].begin("train", 10)
        assert drivers[2].failure().kind == "HubLost"


def test_workers_that_hold_rounds_hear_of_a_hubs_death(hubs):
    started, address = addresses(hubs)
    with clipping(address, 2) as drivers:
        together(drivers, "train", 3)
        for driver in drivers:
            driver.begin("train", 1_000_000)
        at_s = kill(started[1])
        for driver in drivers:
            failure = driver.failure()
            assert failure.kind == "HubLost"
            assert failure.at_s - at_s < SOON_S


def test_a_newcomer_enters_all_hubs_at_the_same_round(hubs):
    _, address = addresses(hubs)
    with lives(address, 3) as (first, second, third):
        together((first, second, third), "train", 2)
        third.kill()
        for number in range(1, 6):
            for driver in (first, second):
                driver.begin("train_up_to", 2 * number * LARGE)
            again = Driver(address, 2, 3)
            at = again.ask("declare")  # while the others are in the middle of rounds
            rounds = again.ask("first_rounds")
            assert rounds == [at, at], number
            again.ask("train", 2, LARGE)
            again.kill()
            for driver in (first, second):
                driver.answer()
        assert first.ask("weights") == second.ask("weights")
        assert first.ask("last_weights")["a"] == first.ask("last_weights")["b"]


def test_a_replacement_is_waited_for_at_all_hubs(hubs):
    _, address = addresses(hubs, on_death="wait")
    with lives(address, 2) as (first, second):
        first.ask("push")
        first.begin("wait")
        second.kill()
        again = Driver(address, 1, 2)
        assert again.ask("declare") == 1
        assert first.answer() == {"a": 1, "b": 1}
        together((first, again), "push")
        assert first.ask("wait") == again.ask("wait") == {"a": 3, "b": 3}
        again.end()
