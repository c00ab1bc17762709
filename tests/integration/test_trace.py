"""The spans of a job, in files and in torch's own profiler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workers import Context
from zps.config import Settings
from zps.hub.process import HubProcess
from zps.worker.worker import Worker

HUB = {"recv", "decide", "apply", "reply"}
WORKER = {"encode", "signal", "wait", "copy"}


def spans(path: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for event in json.loads(path.read_text())["traceEvents"]:
        if event["ph"] == "X":
            found.setdefault(event["name"], []).append(event)
    return found


@pytest.mark.parametrize("link", ["shm", "message"])
def test_every_process_writes_what_it_spent_its_time_on(tmp_path, link):
    settings = Settings.load(trace=tmp_path / "run.json", world_size=1)
    with (
        HubProcess.start(settings) as hub,
        Worker(hub.address, settings=settings.replace(link=link)) as worker,
    ):
        worker.declare({"w": torch.zeros(10)}, "add")
        for _ in range(3):
            worker.push({"w": torch.ones(10)}).wait()
    worker_spans = spans(tmp_path / "run.worker0.json")
    hub_spans = spans(tmp_path / "run.hub0.json")
    assert set(worker_spans) == WORKER
    assert set(hub_spans) == HUB
    assert len(hub_spans["apply"]) == len(worker_spans["wait"]) == 3
    for apply, wait in zip(hub_spans["apply"], worker_spans["wait"], strict=True):
        assert apply["ts"] + apply["dur"] <= wait["ts"] + wait["dur"]  # by one clock


def profiled(ctx: Context) -> set[str]:
    worker = ctx.worker()
    worker.declare({"w": torch.zeros(10)}, "add")
    with torch.profiler.profile() as profile:
        worker.push({"w": torch.ones(10)}).wait()
        worker.pull()
    return {event.key for event in profile.key_averages()}


def test_a_profile_of_torch_shows_them(run: Any) -> None:
    assert run(profiled, world=1)[0] >= {f"zps.{name}" for name in WORKER}
