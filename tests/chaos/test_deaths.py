"""Workers that are killed in the middle of a job: who goes on, and with what."""

from __future__ import annotations

import random

import pytest

from tests.chaos.lives import Driver, lives, until


def wait_until_live(driver: Driver, ranks: list[int]) -> None:
    until(lambda: driver.ask("stats")["live"] == ranks, f"only {ranks} are live")


def wait_until_awaited(driver: Driver, ranks: list[int]) -> None:
    until(lambda: driver.ask("stats")["waiting_for"] == ranks, f"the hub waits for {ranks}")


def test_who_is_waited_for_is_known_at_once(hubs):
    with lives(hubs.start().address, 3) as drivers:
        for driver in drivers:
            driver.begin("train", 20)
        for driver in drivers:
            driver.answer()
        for driver in drivers[:2]:
            driver.ask("push")
        assert drivers[0].ask("stats")["waiting_for"] == [2]
        drivers[2].ask("push")


# --- shrink -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "expected"), [("add", 2.0), ("mean", 1.0), ("sum", 2.0)])
def test_who_dies_before_pushing_is_not_waited_for_and_not_counted(hubs, rule, expected):
    with lives(hubs.start().address, 3, rule) as (first, second, third):
        for driver in (first, second):
            driver.ask("push")
            driver.begin("wait")
        third.kill()
        for driver in (first, second):
            assert driver.answer() == {"a": expected, "b": expected}


def test_who_dies_after_pushing_is_counted(hubs):
    with lives(hubs.start().address, 3) as (first, second, third):
        third.ask("push")
        wait_until_awaited(first, [0, 1])
        third.kill()
        wait_until_live(first, [0, 1])
        for driver in (first, second):
            driver.ask("push")
        assert [driver.ask("wait") for driver in (first, second)] == [{"a": 3, "b": 3}] * 2


def test_who_dies_half_way_counts_with_the_buckets_that_were_complete(hubs):
    with lives(hubs.start().address, 3, "mean") as (first, second, third):
        third.ask("push", ["a"], 7.0)
        third.ask("stats")  # answered behind the push
        third.kill()
        wait_until_live(first, [0, 1])
        for driver in (first, second):
            driver.ask("push")
        # The divisor is what was really added: three of `a`, two of `b`.
        assert [driver.ask("wait") for driver in (first, second)] == [{"a": 3, "b": 1}] * 2


def test_the_slots_of_the_dead_outlive_it(hubs):
    """What it pushed is read after its death, from memory that it alone had mapped."""
    with lives(hubs.start().address, 2) as (first, second):
        second.ask("push", ["b"], 5.0)
        second.ask("stats")  # answered behind the push
        second.kill()
        wait_until_live(first, [0])
        first.ask("push")
        assert first.ask("wait") == {"a": 1, "b": 6}


def test_the_last_one_goes_on_alone(hubs):
    with lives(hubs.start().address, 3) as drivers:
        assert all(driver.ask("push") is None for driver in drivers)
        assert [driver.ask("wait")["a"] for driver in drivers] == [3.0] * 3
        drivers[1].kill()
        drivers[0].kill()
        drivers[2].ask("train", 5)
        assert drivers[2].ask("weights") == {"a": 8, "b": 8}


def test_a_death_in_a_barrier_lets_the_others_pass(hubs):
    with lives(hubs.start().address, 3) as (first, second, third):
        for driver in (first, second):
            driver.begin("barrier")
        third.kill()
        for driver in (first, second):
            driver.answer()


def test_fewer_than_the_least_end_the_job(hubs):
    hub = hubs.start(min_workers=2)
    with lives(hub.address, 3) as (first, second, third):
        third.kill()
        for driver in (first, second):
            driver.ask("push")
        assert [driver.ask("wait")["a"] for driver in (first, second)] == [2, 2]
        first.ask("push")
        first.begin("wait")
        second.kill()
        failure = first.failure()
        assert failure.kind == "HubLost"
        assert "rank 1 died: 1 of 3 workers left, fewer than min_workers=2" in failure.text


def test_a_worker_that_says_it_has_failed_is_as_good_as_dead(hubs):
    with lives(hubs.start(on_death="abort").address, 2) as (first, second):
        first.ask("push")
        first.begin("wait")
        second.ask("close", goodbye=False)
        assert "rank 1 died, and on_death is abort" in first.failure().text


def test_a_worker_that_says_goodbye_is_not_dead(hubs):
    with lives(hubs.start(on_death="abort").address, 2) as (first, second):
        first.ask("push")
        first.begin("wait")
        second.ask("close")
        assert first.answer() == {"a": 1, "b": 1}
        second.kill()
        first.ask("train", 3)
        assert first.ask("weights") == {"a": 4, "b": 4}


@pytest.mark.parametrize("mode", ["ssp", "async"])
def test_nobody_waits_for_the_dead_in_other_modes(hubs, mode):
    with lives(hubs.start(mode=mode, staleness=1).address, 2) as (first, second):
        first.ask("push")
        first.ask("push")
        if mode == "ssp":
            wait_until_awaited(first, [1])
        first.begin("wait")
        second.kill()
        assert first.answer() == {"a": 2, "b": 2}
        first.ask("train", 5)
        assert first.ask("weights") == {"a": 7, "b": 7}


def test_with_a_quorum_the_dead_do_not_count_for_it(hubs):
    with lives(hubs.start(quorum=0.6).address, 3) as (first, second, third):
        third.kill()
        wait_until_live(first, [0, 1])
        first.ask("push")
        assert first.ask("done") is False  # 0.6 of two are two
        second.ask("push")
        assert [driver.ask("wait") for driver in (first, second)] == [{"a": 2, "b": 2}] * 2


# --- abort --------------------------------------------------------------------------------------


def test_abort_ends_everybody_and_says_who_died(hubs):
    hub = hubs.start(on_death="abort")
    with lives(hub.address, 3) as (first, second, third):
        first.ask("push")
        first.begin("wait")
        second.begin("barrier")
        third.kill()
        for driver in (first, second):
            failure = driver.failure()
            assert failure.kind == "HubLost"
            assert f"rank 2 (process {third.pid}) has died" in failure.text
            assert "rank 2 died, and on_death is abort" in failure.text
        until(lambda: hub.poll() is not None, "the hub has ended")
        assert hub.poll() == 0
        assert list(hubs.runtime_dir.iterdir()) == []


def test_abort_counts_before_all_have_joined(hubs):
    hub = hubs.start(on_death="abort")
    drivers = [Driver(hub.address, rank, 3) for rank in range(3)]
    for driver in drivers[1:]:
        driver.begin("declare")  # they wait for rank 0, and share no memory with the hub yet
    drivers[0].kill()
    for driver in drivers[1:]:
        assert "rank 0 died, and on_death is abort" in driver.failure().text
        driver.end()


# --- wait ---------------------------------------------------------------------------------------


def test_wait_holds_the_round_until_a_replacement_has_come(hubs):
    hub = hubs.start(on_death="wait")
    with lives(hub.address, 2) as (first, second):
        for driver in (first, second):
            driver.ask("push")
        assert [driver.ask("wait")["a"] for driver in (first, second)] == [2, 2]
        first.ask("push")
        second.kill()
        wait_until_live(first, [0])
        assert first.ask("done") is False
        assert first.ask("stats")["waiting_for"] == [1]
        second = Driver(hub.address, 1, 2)
        try:
            assert second.ask("declare") == 2
            assert first.ask("wait") == {"a": 3, "b": 3}  # round 1, without the dead one
            assert second.ask("weights") == {"a": 3, "b": 3}
            for driver in (first, second):
                driver.ask("push")
            for driver in (first, second):
                assert driver.ask("wait") == {"a": 5, "b": 5}
        finally:
            second.end()


def test_wait_for_the_only_worker_keeps_its_weights(hubs):
    hub = hubs.start(on_death="wait")
    with lives(hub.address, 1) as (first,):
        first.ask("train", 3)
        first.kill()
        second = Driver(hub.address, 0, 1)
        try:
            second.ask("declare")
            assert second.ask("weights") == {"a": 3, "b": 3}
            second.ask("train", 2)
            assert second.ask("weights") == {"a": 5, "b": 5}
        finally:
            second.end()


def test_wait_ends_when_no_replacement_comes(hubs):
    hub = hubs.start(on_death="wait", timeout_s=1)
    with lives(hub.address, 2) as (first, second):
        first.ask("push")
        first.begin("wait")
        at_s = second.kill()
        failure = first.failure()
        assert failure.kind == "HubLost"
        assert "no replacement for rank 1 came in 1 s" in failure.text
        assert failure.at_s - at_s > 0.9
        until(lambda: hub.poll() is not None, "the hub has ended")


# --- coming back --------------------------------------------------------------------------------


def test_a_dead_rank_comes_back_with_the_current_weights_in_the_next_round(hubs):
    hub = hubs.start()
    with lives(hub.address, 2) as (first, second):
        for driver in (first, second):
            driver.ask("push")
        for driver in (first, second):
            driver.ask("wait")
        second.kill()
        first.ask("train", 3)
        assert first.ask("weights") == {"a": 5, "b": 5}
        second = Driver(hub.address, 1, 2)
        try:
            assert second.ask("declare") == 4
            assert second.ask("weights") == {"a": 5, "b": 5}
            first.ask("push")
            assert first.ask("done") is False  # it counts again
            second.ask("push")
            assert [driver.ask("wait") for driver in (first, second)] == [{"a": 7, "b": 7}] * 2
        finally:
            second.end()


def test_a_rank_can_be_taken_before_the_hub_has_heard_of_the_death(hubs):
    hub = hubs.start()
    with lives(hub.address, 2) as (first, second):
        for _ in range(5):
            second.kill()
            second = Driver(hub.address, 1, 2)
            second.ask("declare")
        for driver in (first, second):
            driver.ask("push")
        assert [driver.ask("wait") for driver in (first, second)] == [{"a": 2, "b": 2}] * 2
        second.end()


def test_a_death_before_all_have_joined_is_mended_by_a_replacement(hubs):
    hub = hubs.start()
    first, second = Driver(hub.address, 0, 2), Driver(hub.address, 1, 2)
    first.begin("declare")
    second.kill()
    second = Driver(hub.address, 1, 2)
    second.begin("declare")
    for driver in (first, second):
        assert driver.answer() == 0
        driver.ask("push")
    assert [driver.ask("wait")["a"] for driver in (first, second)] == [2, 2]
    for driver in (first, second):
        driver.end()


def test_when_all_are_dead_the_hub_ends_too(hubs):
    hub = hubs.start()
    with lives(hub.address, 2) as drivers:
        for driver in drivers:
            driver.ask("push")
        for driver in drivers:
            driver.kill()
        until(lambda: hub.poll() is not None, "the hub has ended")
    assert hub.poll() == 0
    assert list(hubs.runtime_dir.iterdir()) == []


def test_when_all_have_left_the_hub_is_ready_for_another_job(hubs):
    hub = hubs.start()
    for world in (2, 3, 1):
        with lives(hub.address, world) as drivers:
            for driver in drivers:
                driver.ask("push")
            assert [driver.ask("wait")["a"] for driver in drivers] == [world] * world
            for driver in drivers[1:]:
                driver.kill()
            wait_until_live(drivers[0], [0])
    assert hub.poll() is None


# --- at any moment ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bsp", "ssp", "async"])
def test_deaths_at_any_moment_leave_the_others_in_agreement(hubs, mode):
    """Rank 2 dies in the middle of its training and comes back, again and again."""
    rounds, moments = 1000, random.Random(0)
    hub = hubs.start(mode=mode, staleness=2)
    with lives(hub.address, 3) as (first, second, third):
        for driver in (first, second):
            driver.begin("train", rounds)
        deaths = 0
        while not deaths or not (first.answered and second.answered):
            third.begin("train", 1_000_000)
            third.process.join(moments.uniform(0, 0.05))  # not a wait for anything: any moment
            third.kill()
            deaths += 1
            third = Driver(hub.address, 2, 3)
            third.ask("declare")
        third.end()
        for driver in (first, second):
            driver.answer()
        wait_until_live(first, [0, 1])
        weights = first.ask("weights")
        assert weights == second.ask("weights")
        assert weights["a"] >= 2 * rounds
        assert weights["b"] >= 2 * rounds
        assert hub.poll() is None
        before = first.ask("stats")["versions"]
        for driver in (first, second):
            driver.ask("push")
        for driver in (first, second):
            driver.ask("wait")
        grown = {name: value - weights[name] for name, value in first.ask("weights").items()}
        # The last of the dead may have pushed for this round, and then that counts.
        assert grown in ({"a": 2, "b": 2}, {"a": 3, "b": 3})
        applied = 3 if mode == "bsp" else 3 * int(grown["a"])
        assert first.ask("stats")["versions"] == before + applied
