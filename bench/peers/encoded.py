"""What codecs make of a gradient, in NumPy: how long it is, and what the hub reads from it.

Only those that bench.wire uses. Blocks are of 256 elements, from the beginning of each piece.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from . import problem
from .problem import Array

BLOCK = 256
_PIECE = 1 << 20  # elements that are worked on at a time: a multiple of a block

# Root of the mean square error of weights that were encoded once or twice, over that of the weights
# themselves (normally distributed), with room to spare: half a step of 1/127 of the largest of 256.
PULL_LOSS = {"none": 1e-6, "fp16": 1e-3, "int8": 2e-2}
# Scales that differ in their last bit give a few elements the next code, or the other sign, until
# feedback has made up for it. A lost round is 50 times as much.
_EQUAL = 1e-3


def encoded_bytes(codec: str, count: int) -> int:
    """Bytes of `count` float32 elements, one piece. Raises KeyError for another codec."""
    scales = 4 * -(-count // BLOCK)
    lengths = {
        "none": 4 * count,
        "fp16": 2 * count,
        "int8": scales + count,
        "onebit": scales + -(-count // 8),
    }
    return lengths[codec]


def decoded(codec: str, values: Array) -> Array:
    """(n,) float32: what is left of `values` (n,), which begin a block, after a journey."""
    if codec == "none":
        return values
    if codec == "fp16":
        return values.astype(np.float16).astype(np.float32)
    padded = np.zeros((-(-len(values) // BLOCK), BLOCK), np.float32)
    padded.reshape(-1)[: len(values)] = values
    if codec == "int8":
        scale = np.abs(padded).max(axis=1, keepdims=True) / np.float32(127)
        divisor = np.where(scale > 0, scale, np.float32(1))
        found = np.clip(np.rint(padded / divisor), -127, 127) * scale
    elif codec == "onebit":
        counts = np.full((len(padded), 1), BLOCK, np.float32)
        counts[-1] = len(values) - BLOCK * (len(padded) - 1)
        scale = np.abs(padded).sum(axis=1, keepdims=True) / counts
        found = np.where(np.signbit(padded), -scale, scale)
    else:
        raise KeyError(codec)
    flat: Array = found.astype(np.float32).reshape(-1)[: len(values)]
    return flat


def reference(codec: str, size: int, seed: int, rounds: int) -> Array:
    """The hub's weights after rounds of one worker: (size,) float32; lossy codecs feed back."""
    weights = problem.initial_weights(size, seed)
    gradient = problem.gradient(0, size, seed)
    for part in _parts(size):
        momentum, residual = np.zeros_like(weights[part]), np.zeros_like(weights[part])
        for number in range(rounds):
            value = gradient[part] * np.float32(problem.factor(number)) + residual
            sent = decoded(codec, value)
            if codec not in ("none", "fp16"):
                residual = value - sent
            momentum = np.float32(problem.MOMENTUM) * momentum + sent
            weights[part] -= np.float32(problem.LR) * momentum
    return weights


def error_of(seen: Array, expected: Array) -> float:
    """Root of the mean square difference, over that of what was expected."""
    difference = square = 0.0
    for part in _parts(len(expected)):
        difference += float(np.square(seen[part] - expected[part], dtype=np.float64).sum())
        square += float(np.square(expected[part], dtype=np.float64).sum())
    return float(np.sqrt(difference / square)) if square else float(np.sqrt(difference))


def allowed_error(pull: str) -> float:
    """The largest `error_of` that the codec of the weights excuses."""
    return PULL_LOSS[pull] + _EQUAL


def _parts(size: int) -> Iterator[slice]:
    return (slice(at, min(at + _PIECE, size)) for at in range(0, size, _PIECE))
