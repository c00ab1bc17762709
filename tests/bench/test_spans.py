"""A round's parts, read from traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import spans
from bench.peers.base import BenchError


def write(path: Path, *events: tuple[str, float], **more: Any) -> None:
    complete = [
        {"ph": "X", "name": name, "cat": "zps", "ts": 1.0, "dur": us, "pid": 1, "tid": 1}
        for name, us in events
    ]
    instant = {"ph": "i", "name": "encode", "ts": 0.0}
    path.write_text(json.dumps({"traceEvents": [instant, *complete], **more}))


def test_the_hubs_work_is_taken_from_the_workers_wait(tmp_path: Path) -> None:
    worker = [("encode", 10.0), ("signal", 2.0), ("wait", 60.0), ("copy", 4.0)] * 2
    write(tmp_path / "t.worker0.json", *worker)
    write(tmp_path / "t.worker1.json", *worker)
    write(tmp_path / "t.hub0.json", *[("recv", 5.0), ("apply", 30.0), ("reply", 5.0)] * 2)
    write(tmp_path / "other.worker0.json", ("encode", 1e9))
    assert spans.breakdown(tmp_path / "t.json", rounds=2) == {
        "encode": 10.0,
        "signal": 2.0,
        "recv": 5.0,
        "apply": 30.0,
        "reply": 5.0,
        "wake": 20.0,
        "copy": 4.0,
    }


def test_what_began_before_the_rounds_that_count_is_left_out(tmp_path: Path) -> None:
    def event(ts: float, us: float) -> dict[str, Any]:
        return {"ph": "X", "name": "encode", "ts": ts, "dur": us}

    file = tmp_path / "t.worker0.json"
    file.write_text(json.dumps({"traceEvents": [event(10.0, 500.0), event(20.0, 3.0)]}))
    assert spans.breakdown(tmp_path / "t.json", rounds=1, since_us=20.0) == {"encode": 3.0}


def test_a_name_that_is_missing_has_no_part(tmp_path: Path) -> None:
    write(tmp_path / "t.worker0.json", ("encode", 3.0), ("something new", 9.0))
    assert spans.breakdown(tmp_path / "t.json", rounds=1) == {"encode": 3.0}
    write(tmp_path / "t.hub0.json", ("apply", 7.0))
    assert spans.breakdown(tmp_path / "t.json", rounds=1) == {"encode": 3.0, "apply": 7.0}


def test_parts_are_means_over_the_processes_of_a_role(tmp_path: Path) -> None:
    write(tmp_path / "t.worker0.json", ("wait", 10.0))
    write(tmp_path / "t.worker1.json", ("wait", 30.0))
    assert spans.breakdown(tmp_path / "t.json", rounds=1) == {"wake": 20.0}


def test_a_hub_that_works_longer_than_a_worker_waits_leaves_no_rest(tmp_path: Path) -> None:
    write(tmp_path / "t.worker0.json", ("wait", 10.0))
    write(tmp_path / "t.hub0.json", ("apply", 15.0))
    assert spans.breakdown(tmp_path / "t.json", rounds=1) == {"apply": 15.0, "wake": 0.0}


@pytest.mark.parametrize("text", ["", "[]", '{"events": []}', '{"traceEvents": [{"ph": "X"}]}'])
def test_what_is_no_trace_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.hub0.json").write_text(text)
    with pytest.raises(BenchError, match="t.hub0.json is not a trace"):
        spans.breakdown(tmp_path / "t.json", rounds=1)


def test_without_any_file_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no process has written a trace"):
        spans.breakdown(tmp_path / "t.json", rounds=1)
