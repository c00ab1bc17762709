"""What several hubs say of themselves, as one account."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

_LARGEST = ("staleness_max", "rounds_skipped")  # every hub counts the same rounds


def merge(accounts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One account for all hubs, with their own under "hubs", in order; of one hub, its own.

    A rank is live when it is at every hub, and awaited when any hub waits for it. Updates and
    versions are added up.
    """
    if len(accounts) == 1:
        return accounts[0]
    counters: Counter[str] = Counter()
    for account in accounts:
        counters.update(account["counters"])
    for name in _LARGEST:
        if name in counters:
            counters[name] = max(account["counters"].get(name, 0) for account in accounts)
    return {
        **accounts[0],
        "formed": all(account["formed"] for account in accounts),
        "live": sorted(set.intersection(*(set(account["live"]) for account in accounts))),
        "missing": _any(accounts, "missing"),
        "waiting_for": _any(accounts, "waiting_for"),
        "versions": sum(account["versions"] for account in accounts),
        "counters": dict(counters),
        "hubs": list(accounts),
    }


def _any(accounts: Sequence[dict[str, Any]], what: str) -> list[int]:
    return sorted(set().union(*(account[what] for account in accounts)))
