"""The training comparison, with a model that takes no time."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from bench import harness, train
from bench.peers.base import Seat
from bench.peers.training import TrainLocal, parameters, reference


def test_the_default_model_has_25_million_parameters() -> None:
    assert 25_000_000 < parameters(4096) < 25_500_000


def test_ways_to_share_gradients_are_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    for peer in train.PEERS:
        if reason := peer.available():
            pytest.skip(f"{peer.name}: {reason}")
    monkeypatch.setitem(harness.PLANS, harness.Level.QUICK, harness.Plan(cycles=2, block_s=0.01))
    arguments = ["--width", "16", "--quick"]
    result = CliRunner().invoke(train.app, arguments)
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert (record["what"], list(record["peers"])) == ("zps", ["ddp", "local"])
    assert record["size"] == parameters(16)


def test_the_reference_is_what_torch_computes() -> None:
    pytest.importorskip("torch")
    local = TrainLocal()
    local.setup(Seat(1, 2, 16, 3, "nowhere"))
    for _ in range(3):
        local.round()
    np.testing.assert_allclose(local.weights(), reference([1], 16, 3, 3), rtol=1e-4, atol=1e-6)
    other = reference([0, 1], 16, 3, 3)
    assert np.abs(local.weights() - other).max() > 1e-4
    local.close()


def test_a_local_step_changes_the_weights_and_needs_nobody() -> None:
    pytest.importorskip("torch")
    local = TrainLocal()
    local.setup(Seat(0, 2, 16, 3, "nowhere"))
    before = local.weights()
    local.round()
    assert before.size == parameters(16)
    assert not np.array_equal(local.weights(), before)
    local.close()
