"""The training comparison, with a model that takes no time."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from bench import harness, train
from bench.harness import Plan
from bench.peers.training import parameters


def test_the_default_model_has_25_million_parameters() -> None:
    assert 25_000_000 < parameters(4096) < 25_500_000


def test_all_ways_of_training_are_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    for peer in train.PEERS:
        if reason := peer.available():
            pytest.skip(f"{peer.name}: {reason}")
    monkeypatch.setattr(harness, "QUICK", Plan(cycles=2, block_s=0.01))
    result = CliRunner().invoke(train.app, ["--width", "16", "--quick"])
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert (record["what"], list(record["peers"])) == ("zps", ["ddp", "local"])
    assert record["size"] == parameters(16)
