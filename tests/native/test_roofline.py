"""The benchmark of the kernels checks its results, and tells what it measured."""

from __future__ import annotations

import json

from bench.kernels import RULES, results, table


def test_every_case_is_checked_measured_and_told():
    done = list(results(n=128 * 40, repeats=1, threads=2))
    records = [json.loads(json.dumps(result.record())) for result in done]
    assert len(records) == 2 * (3 * len(RULES) + 1)
    assert all(r["ratio"] > 0 and r["stream_gbps"] > 0 and r["p50_us"] > 0 for r in records)
    by_case = {(r["memory"], r["what"], r["contributors"]): r["bytes"] for r in records}
    # 4 bytes a contributor and parameter; weights and each state are read and written
    assert by_case["engine", "sgd", 2] == 128 * 40 * (2 * 4 + 16)
    assert by_case["huge", "adam", 4] == 128 * 40 * (4 * 4 + 24)
    assert table(done).row_count == len(done)
