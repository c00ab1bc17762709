"""The benchmark of the kernels checks its results, and tells what it measured."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench import kernels
from bench.kernels import RULES, results, table
from bench.peers.base import BenchError


def test_every_case_is_checked_measured_and_told():
    done = list(results(n=128 * 40, repeats=1, threads=2))
    records = [json.loads(json.dumps(result.record())) for result in done]
    assert len(records) == 2 * (3 * len(RULES) + 1)
    assert all(r["ratio"] > 0 and r["stream_gbps"] > 0 and r["p50_us"] > 0 for r in records)
    by_case = {(r["memory"], r["what"], r["contributors"]): r["bytes"] for r in records}
    # 4 bytes a contributor and parameter; weights and each state are read and written
    assert by_case["engine", "sgd", 2] == 128 * 40 * (2 * 4 + 16)
    assert by_case["huge", "adam", 4] == 128 * 40 * (4 * 4 + 24)
    assert table(done, 0.0).row_count == len(done)


def test_a_wrong_result_is_an_error_with_its_place():
    expected = np.arange(5.0)
    kernels.require_close("sgd", expected + 1e-7, expected, rtol=1e-6, atol=1e-6)
    for wrong in (3.1, np.nan):
        found = expected.copy()
        found[3] = wrong
        with pytest.raises(BenchError, match="sgd is wrong: 1 of 5 elements differ; at 3 "):
            kernels.require_close("sgd", found, expected, rtol=1e-6, atol=1e-6)
