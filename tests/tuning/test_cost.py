"""From figures to advice; every figure here is made up."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest

from zps.errors import ConfigError
from zps.tuning.cost import Link, advise, break_even, human_bandwidth, round_s
from zps.tuning.measure import Measurement

NONE = Measurement("none", 4_000_000, 1_000_000, 0.001, 0.001, 8, 0.0, 1.0, 0.0, 1.0)
INT8 = replace(NONE, compression="int8", nbytes=1_000_000, encode_s=0.002, total_error=0.002)
TOPK = replace(NONE, compression="topk:ratio=0.1", nbytes=600_000, total_error=0.6)
LINK = Link(125e6)  # 1 Gbit/s


def test_a_round_is_encode_and_for_each_worker_transfer_and_decode() -> None:
    assert round_s(NONE, Link()) == pytest.approx(0.002)
    assert round_s(NONE, LINK) == pytest.approx(0.001 + 0.032 + 0.001)
    assert round_s(NONE, LINK, workers=3) == pytest.approx(0.001 + 3 * (0.032 + 0.001))


def test_over_a_slow_link_the_smaller_wins() -> None:
    advice = advise([NONE, INT8], LINK)
    assert advice.compression == "int8"
    assert "11 ms with it and 34 ms without (3.1 × faster)" in advice.reason
    assert "0.20% off" in advice.reason
    assert str(advice) == "ZPS_COMPRESSION=int8"


def test_over_shared_memory_nothing_is_gained() -> None:
    advice = advise([NONE, INT8], Link())
    assert advice.compression == "none"
    assert "shared memory" in advice.reason


def test_what_loses_too_much_is_not_advised_but_named() -> None:
    advice = advise([TOPK, INT8, NONE], LINK, max_error=0.1)
    assert advice.compression == "int8"
    assert "Faster, but over the limit of 10%: topk:ratio=0.1 (60% off)" in advice.reason
    loose = advise([TOPK, INT8, NONE], LINK, max_error=0.6)
    assert str(loose) == "ZPS_COMPRESSION='topk:ratio=0.1'"
    assert advise([TOPK, NONE], LINK).compression == "none"


def test_a_small_gain_is_no_reason() -> None:
    barely = replace(INT8, nbytes=NONE.nbytes * 95 // 100, encode_s=0.001)
    advice = advise([NONE, barely], LINK)
    assert advice.compression == "none"
    assert "too little for a codec" in advice.reason


def test_without_none_there_is_nothing_to_compare_with() -> None:
    with pytest.raises(ConfigError, match="measure 'none'"):
        advise([INT8], LINK)


@pytest.mark.parametrize("workers", [1, 4])
def test_at_the_break_even_bandwidth_both_take_the_same_time(workers: int) -> None:
    bandwidth = break_even(INT8, NONE, workers)
    assert bandwidth == pytest.approx(workers * 3_000_000 / 0.001)
    link = Link(bandwidth)
    assert round_s(INT8, link, workers) == pytest.approx(round_s(NONE, link, workers))


def test_some_break_even_nowhere_or_everywhere() -> None:
    assert break_even(replace(INT8, nbytes=NONE.nbytes), NONE) is None
    assert break_even(replace(INT8, encode_s=0.0005), NONE) == inf
    assert break_even(replace(INT8, nbytes=NONE.nbytes, encode_s=0.0005), NONE) == inf


@pytest.mark.parametrize(
    ("text", "bandwidth"),
    [
        ("1Gbit/s", 125e6),
        ("10 Gbit", 1.25e9),
        ("2.5Gbps", 312.5e6),
        ("100Mb/s", 12.5e6),
        ("125MB/s", 125e6),
        ("800bit/s", 100),
        (" 1TB/s ", 1e12),
    ],
)
def test_bandwidths_are_written_as_people_write_them(text: str, bandwidth: float) -> None:
    assert Link.parse(text).bandwidth == pytest.approx(bandwidth)


@pytest.mark.parametrize("text", ["", "fast", "10", "10G", "-1Gbit", "0Gbit", "nanGbit", "1e9B/s"])
def test_what_is_no_bandwidth_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write it as 10Gbit/s or 125MB/s"):
        Link.parse(text)


def test_links_are_named() -> None:
    assert str(Link.parse(None)) == "shared memory"
    assert str(LINK) == "1 Gbit/s"
    assert human_bandwidth(12) == "96 bit/s"
    assert human_bandwidth(1e15) == "8e+03 Tbit/s"
