"""Hubs that a test may kill."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.workers import ROOT
from zps.config import Settings
from zps.hub.process import HubProcess


class Hubs:
    """Hubs of one test, in a directory of its own."""

    def __init__(self, runtime_dir: Path):
        self.runtime_dir = runtime_dir
        self._started: list[HubProcess] = []

    def start(self, **settings: Any) -> HubProcess:
        own = {"bucket_bytes": 4096, "timeout_s": 30, "runtime_dir": self.runtime_dir, **settings}
        self._started.append(HubProcess.start(Settings(**own)))
        return self._started[-1]

    def stop(self) -> None:
        for hub in self._started:
            hub.stop()


@pytest.fixture
def hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hubs]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    hubs = Hubs(tmp_path / "run")
    yield hubs
    hubs.stop()
