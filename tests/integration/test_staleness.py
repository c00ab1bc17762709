"""What stale gradients do to the weights: every policy against a replay of the accepted pushes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.workers import Crew, together
from zps.memory.control import Outcome
from zps.worker.worker import Worker

LINKS = ("shm", "message", "tcp")

Floats = NDArray[np.float32]

WORLD = 3
ALPHA, LAMBDA, BOUND = 0.5, 0.3, 2
LR, MOMENTUM, DECAY = np.float32(0.1), np.float32(0.5), np.float32(0.01)
TENSORS = {"small": torch.linspace(-1, 1, 7), "large": torch.linspace(-2, 3, 1500)}


@dataclass
class Replay:
    """The same rounds, one push at a time, in a few lines of NumPy: SGD with momentum."""

    policy: str
    weights: dict[str, Floats]
    versions: dict[str, int] = field(default_factory=dict)
    moments: dict[str, Floats] = field(default_factory=dict)
    held: dict[tuple[int, str], tuple[Floats, int]] = field(default_factory=dict)
    staleness: list[int] = field(default_factory=list)

    def pull(self, rank: int, name: str) -> None:
        self.held[rank, name] = (self.weights[name].copy(), self.versions.get(name, 0))

    def push(self, rank: int, name: str, gradient: Floats) -> bool:
        """Whether the push was accepted."""
        base, version = self.held[rank, name]
        stale = self.versions.get(name, 0) - version
        self.staleness.append(stale)
        if self.policy == "drop" and stale > BOUND:
            return False
        now, g = self.weights[name], gradient
        if self.policy == "dc" and stale > 0:
            g = g + np.float32(LAMBDA) * g * g * (now - base)
        lr = LR if self.policy != "inverse" else np.float32(0.1 / (1 + ALPHA * stale))
        g = g + DECAY * now
        self.moments[name] = MOMENTUM * self.moments[name] + g if name in self.moments else g
        self.weights[name] = now - lr * self.moments[name]
        self.versions[name] = self.versions.get(name, 0) + 1
        return True


def schedule(mode: str, events: int) -> Iterator[tuple[int, str, list[str]]]:
    """(rank, "pull" or "push", tensors): in ssp, only pushes that need not wait."""
    rng = random.Random(7)
    rounds = [0] * WORLD
    for _ in range(events):
        rank = rng.randrange(WORLD)
        if rng.random() < 0.4:
            yield rank, "pull", rng.choice([["small"], ["large"], ["small", "large"]])
            continue
        if mode == "ssp":
            rank = rng.choice([r for r in range(WORLD) if rounds[r] - min(rounds) < BOUND])
        rounds[rank] += 1
        yield rank, "push", ["small", "large"]


@pytest.mark.parametrize(
    ("mode", "policy", "rule"),
    [
        *product(["async", "ssp"], ["none", "inverse", "drop", "dc"], ["sgd"]),
        ("async", "inverse", "torch.optim.SGD"),
        ("ssp", "dc", "torch.optim.SGD"),
    ],
)
def test_the_weights_equal_a_replay_of_the_accepted_pushes(crew: Crew, mode, policy, rule):
    hub = crew.hub(
        mode=mode,
        staleness=BOUND,
        staleness_policy=policy,
        staleness_alpha=ALPHA,
        dc_lambda=LAMBDA,
    )
    replay = Replay(policy, {name: value.numpy().copy() for name, value in TENSORS.items()})
    hypers = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01}
    rng = np.random.default_rng(3)
    with together(hub.address, TENSORS, rule, world=WORLD, hypers=hypers) as workers:
        for rank in range(WORLD):
            for name in TENSORS:
                replay.pull(rank, name)
        dropped = 0
        for rank, what, names in schedule(mode, 120):
            worker = workers[rank]
            if what == "pull":
                worker.pull(names)
                for name in names:
                    replay.pull(rank, name)
                    assert_close(worker.weights(name), replay.weights[name])
                continue
            grads = {name: rng.standard_normal(len(TENSORS[name])).astype("f4") for name in names}
            outcomes = worker.push({n: torch.from_numpy(g) for n, g in grads.items()}).wait()
            accepted = [replay.push(rank, name, grads[name]) for name in names]
            buckets = [1, len(outcomes.outcomes) - 1]
            expected = [
                Outcome.APPLIED if ok else Outcome.STALE
                for ok, count in zip(accepted, buckets, strict=True)
                for _ in range(count)
            ]
            assert list(outcomes.outcomes) == expected
            dropped += expected.count(Outcome.STALE)
        for name in TENSORS:
            workers[0].pull(name)
            assert_close(workers[0].weights(name), replay.weights[name])
        check_counts(workers[0], replay, dropped)


def assert_close(mine: torch.Tensor, theirs: Floats) -> None:
    assert np.abs(mine.numpy() - theirs).max() <= 1e-6 * np.abs(theirs).max()


def check_counts(worker: Worker, replay: Replay, dropped: int) -> None:
    counters = worker.stats()["counters"]
    assert counters.get("dropped_stale", 0) == dropped
    assert bool(dropped) == (replay.policy == "drop")
    assert max(replay.staleness) > BOUND  # or this test would say little
    if not dropped:
        assert counters["staleness_max"] == max(replay.staleness)


def test_a_round_that_is_stale_in_part_does_not_wait_for_the_rest(crew: Crew):
    hub = crew.hub(mode="async", staleness_policy="drop", staleness=0)
    tensors = {"a": torch.zeros(3), "b": torch.zeros(3)}
    hypers = {"lr": 1.0, "max_grad_norm": 1.0}
    with together(hub.address, tensors, "sgd", hypers=hypers) as (first, second):
        ones = {name: torch.ones(3) for name in tensors}
        for _ in range(10):
            first.push(ones).wait()
            first.pull()
        second.pull("a")
        work = second.push(ones).wait(10)
        assert work.outcomes == (Outcome.APPLIED, Outcome.STALE)
        second.pull()
        counters = second.stats()["counters"]
        assert counters["dropped_stale"] == 1
        assert counters["updates"] == 21
