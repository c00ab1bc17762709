"""The problem every participant solves: averaged gradients, one SGD step with momentum.

Each rank draws one gradient and scales it afresh every round, so that a participant which repeats
an old gradient, loses one or counts one twice is caught by comparing weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

LR = 0.1
MOMENTUM = 0.9

# They sum to zero, which keeps weights bounded over any number of rounds, and are exact in float32.
_FACTORS = (1.0, -0.5, 0.75, -1.25)
CYCLE = len(_FACTORS)  # rounds


def initial_weights(numel: int, seed: int) -> Array:
    """The weights before round 0, equal on every rank: (numel,) float32."""
    return _draw(numel, seed, 0)


def gradient(rank: int, numel: int, seed: int) -> Array:
    """What `rank` pushes in a round, before `factor`: (numel,) float32."""
    return _draw(numel, seed, 1 + rank)


def factor(round_number: int) -> float:
    """The number that scales every rank's gradient in this round."""
    return _FACTORS[round_number % len(_FACTORS)]


def reference(world: int, numel: int, seed: int, rounds: int) -> Array:
    """The weights after `rounds` rounds, in plain NumPy float32: the oracle for everyone."""
    weights = initial_weights(numel, seed)
    buffer = np.zeros_like(weights)
    mean = gradient(0, numel, seed)
    for rank in range(1, world):
        mean += gradient(rank, numel, seed)
    mean /= np.float32(world)
    for number in range(rounds):
        buffer *= np.float32(MOMENTUM)
        buffer += mean * np.float32(factor(number))
        weights -= np.float32(LR) * buffer
    return weights


def _draw(numel: int, *seed: int) -> Array:
    generator: Any = np.random.default_rng(seed)
    drawn: Array = generator.standard_normal(numel, dtype=np.float32)
    return drawn
