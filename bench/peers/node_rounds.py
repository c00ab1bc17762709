"""What each worker of bench.wire's `node` runs: SIZE SEED ROUNDS; fails if the result is wrong."""

from __future__ import annotations

import sys

import numpy as np
import torch

import zps

from . import problem


def main(size: int, seed: int, rounds: int) -> None:
    with zps.Worker() as worker:
        worker.declare(
            {"w": torch.from_numpy(problem.initial_weights(size, seed))},
            rule="sgd",
            lr=problem.LR,
            momentum=problem.MOMENTUM,
        )
        base = torch.from_numpy(problem.gradient(worker.rank, size, seed))
        for number in range(rounds):
            torch.mul(base, problem.factor(number), out=worker.slot("w"))
            worker.push("w").wait()
        expected = problem.reference(worker.world_size, size, seed, rounds)
        np.testing.assert_allclose(worker.weights("w").numpy(), expected, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:4]))
