"""The benchmark of the codecs checks its results, and tells what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bench import codecs
from bench.codecs import STOCHASTIC, SUBJECTS, Bucket, Floats, Memory, results, table
from bench.peers.base import BenchError


def test_every_case_is_checked_measured_and_told() -> None:
    pytest.importorskip("torch")
    done = list(results(n=4096 * 3, repeats=1, threads=2))
    records = [json.loads(json.dumps(result.record())) for result in done]
    assert len(records) == len(SUBJECTS) + len(STOCHASTIC) + 2 + 6 * len(SUBJECTS)
    assert all(r["ratio"] > 0 and r["gbps"] > 0 and r["p50_us"] > 0 for r in records)
    assert all(r["cpu_us"]["total"] > 0 for r in records)
    topk = [result for result in done if result.peer_name == "torch.topk"]
    assert all(len(result.turns.ours) >= 6 for result in topk)  # or there is no interval
    by_case = {(r["what"], r["codec"], r["contributors"], r["peer"]): r for r in records}
    int8 = by_case["encode", "int8", 1, "stream"]
    assert int8["coded_bytes_per_parameter"] == round(1 + 4 / 256, 4)
    # gradient, residual in and out, codes
    assert int8["bytes"] == 4096 * 3 * 13 + 4 * 48
    assert by_case["encode", "topk 1 %", 1, "torch.topk"]["goal"] == codecs.TOPK_GOAL
    assert table(done, 0.0).row_count == len(done)


def test_a_wrong_result_is_an_error_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(bucket: Bucket) -> Floats:
        decoded = right(bucket)
        decoded[17] += 1.0
        return decoded

    right = Bucket.decoded
    monkeypatch.setattr(Bucket, "decoded", wrong)
    bucket = Bucket(SUBJECTS[3], Memory(4096))
    with pytest.raises(BenchError, match="encode int8 is wrong: 1 of 4096 .* at 17 "):
        bucket.run_encode(1)
    with pytest.raises(BenchError, match="reduce int8 is wrong: 1 of 4096 .* at 17 "):
        bucket.run_decode("reduce", 1, 1, 1)


def test_the_command_prints_and_keeps_one_line_for_each_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codecs, "SUBJECTS", SUBJECTS[3:4])
    monkeypatch.setattr(codecs, "STOCHASTIC", ())
    first = next(results(n=4096, repeats=1, threads=1))
    monkeypatch.setattr(codecs, "run_topk", lambda memory, exact, repeats: first)
    app = typer.Typer()
    app.command()(codecs.main)
    kept = tmp_path / "lines.json"
    result = CliRunner().invoke(app, ["--elements", "8K", "--quick", "--json", str(kept)])
    assert result.exit_code == 0, result.output
    assert result.stdout == kept.read_text()
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(record["other_cpu"] >= 0 for record in records)
    assert len(records) == 1 + 2 + 6  # encode, topk, reduce and apply
