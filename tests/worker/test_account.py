"""What several hubs say of themselves, as one account."""

from __future__ import annotations

from typing import Any

from zps.worker.account import merge


def account(**changes: Any) -> dict[str, Any]:
    return {
        "epoch": 7,
        "world_size": 3,
        "formed": True,
        "live": [0, 1, 2],
        "missing": [],
        "waiting_for": [],
        "versions": 10,
        "counters": {"updates": 10},
        **changes,
    }


def test_one_hubs_account_stays_its_own() -> None:
    assert merge([account()]) == account()


def test_of_several_each_ones_own_is_there_in_order() -> None:
    accounts = [account(), account(epoch=8, versions=5)]
    assert merge(accounts)["hubs"] == accounts
    assert merge(accounts)["versions"] == 15


def test_a_rank_is_live_at_all_hubs_and_awaited_by_any() -> None:
    merged = merge(
        [account(live=[0, 1], waiting_for=[2]), account(formed=False, waiting_for=[1], missing=[2])]
    )
    assert merged["live"] == [0, 1]
    assert merged["waiting_for"] == [1, 2]
    assert merged["missing"] == [2]
    assert merged["formed"] is False


def test_updates_add_up_and_what_all_hubs_count_alike_does_not() -> None:
    merged = merge(
        [
            account(counters={"updates": 4, "rounds_skipped": 2, "staleness_max": 1}),
            account(counters={"updates": 3, "rounds_skipped": 2, "staleness_max": 5}),
        ]
    )
    assert merged["counters"] == {"updates": 7, "rounds_skipped": 2, "staleness_max": 5}
