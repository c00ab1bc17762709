"""Spans, as they are recorded and as they are read."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from zps import trace
from zps.errors import ConfigError, ZpsError
from zps.trace import Tracer


def events(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["traceEvents"]


def complete(path: Path) -> list[dict[str, Any]]:
    return [event for event in events(path) if event["ph"] == "X"]


def test_spans_are_written_with_their_times_and_their_thread(tmp_path):
    tracer = Tracer(tmp_path / "run.json", "hub")
    with tracer.span("outer"):
        thread = threading.Thread(target=lambda: tracer.span("inner").__exit__())
        thread.start()
        thread.join()
    tracer.write(3)
    inner, outer = complete(tmp_path / "run.hub3.json")
    assert (inner["name"], outer["name"]) == ("inner", "outer")
    assert outer["ts"] <= inner["ts"] <= inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
    assert inner["tid"] != outer["tid"] == threading.get_native_id()
    assert events(tmp_path / "run.hub3.json")[0]["args"] == {"name": "hub 3"}


def test_a_span_ends_by_an_error_too(tmp_path):
    tracer = Tracer(tmp_path / "run.json", "worker")
    with pytest.raises(KeyError), tracer.span("apply"):
        raise KeyError
    tracer.write(0)
    assert [event["name"] for event in complete(tmp_path / "run.worker0.json")] == ["apply"]


def test_without_a_path_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracer = Tracer(None, "hub")
    with tracer.span("apply"):
        pass
    tracer.write(0)
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_is_not_written_again(tmp_path):
    tracer = Tracer(tmp_path / "run.json", "hub")
    with tracer.span("first"):
        pass
    tracer.write(0)
    (tmp_path / "run.hub0.json").unlink()
    tracer.write(0)
    assert list(tmp_path.iterdir()) == []


def test_of_a_long_run_the_last_spans_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(trace, "_KEEP", 2)
    tracer = Tracer(tmp_path / "run.json", "hub")
    for name in ("a", "b", "c"):
        with tracer.span(name):
            pass
    tracer.write(0)
    assert [event["name"] for event in complete(tmp_path / "run.hub0.json")] == ["b", "c"]


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    tracer = Tracer(folder / "run.json", "hub")
    with tracer.span("apply"):
        pass
    folder.rmdir()
    with pytest.raises(ZpsError, match="the trace cannot be written"):
        tracer.write(0)


def test_at_the_end_of_a_job_it_is_only_a_warning(tmp_path, caplog):
    folder = tmp_path / "folder"
    folder.mkdir()
    tracer = Tracer(folder / "run.json", "hub")
    with tracer.span("apply"):
        pass
    folder.rmdir()
    tracer.finish(0)
    assert "the trace cannot be written" in caplog.text


def test_a_folder_that_is_not_there_is_an_error_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"ZPS_TRACE=.*nowhere is no folder that can be written"):
        Tracer(tmp_path / "nowhere" / "run.json", "hub")


def test_the_processes_of_a_run_are_put_together(tmp_path):
    for role, number in (("hub", 0), ("worker", 0), ("worker", 12)):
        tracer = Tracer(tmp_path / "run.json", role)
        with tracer.span(f"{role}{number}"):
            pass
        tracer.write(number)
    assert trace.join(tmp_path / "run.json") == 3
    assert trace.join(tmp_path / "run.json") == 3  # and again: not itself
    names = {event["name"] for event in complete(tmp_path / "run.json")}
    assert names == {"hub0", "worker0", "worker12"}


def test_no_trace_and_a_broken_one_are_named(tmp_path):
    with pytest.raises(ZpsError, match="no process has written a trace"):
        trace.join(tmp_path / "run.json")
    (tmp_path / "run.hub0.json").write_text("[]")
    with pytest.raises(ZpsError, match=r"run\.hub0\.json is no trace"):
        trace.join(tmp_path / "run.json")
