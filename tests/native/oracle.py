"""What the kernels should compute, in a few lines of NumPy each, and memory to run them on.

The oracles do the same float32 operations in the same order, so results are compared bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from zps import native
from zps.memory.cast import from_float32, to_float32

f32 = np.float32

# Around every edge: nothing, one element, one vector of 16 lanes, one tile, and enough for all
# threads and an odd tail.
SIZES = [0, 1, 15, 16, 17, native.TILE - 1, native.TILE, native.TILE + 1, 20 * native.TILE + 7]
ISAS = native.isas()
GUARD = 64


class Block:
    """An aligned array between two guard zones that nobody may touch."""

    def __init__(self, values: np.ndarray):
        self._whole = np.full(len(values) + 2 * GUARD, 77, values.dtype)
        self.values = self._whole[GUARD : GUARD + len(values)]
        self.values[:] = values

    @property
    def address(self) -> int:
        return self._whole.ctypes.data + GUARD * self._whole.itemsize

    def check_guards(self) -> None:
        assert (self._whole[:GUARD] == 77).all()
        assert (self._whole[len(self._whole) - GUARD :] == 77).all()


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as they lie in memory in this dtype."""
    raw = np.empty(len(values), np.float32 if dtype == "float32" else np.uint16)
    from_float32(values.astype(np.float32), dtype, raw.view(np.uint8))
    return raw


def loaded(raw: np.ndarray, dtype: str) -> np.ndarray:
    values = np.empty(len(raw), np.float32)
    to_float32(raw.view(np.uint8), dtype, values)
    return values


def average(slots, scales=(), divisor=1.0, coef=1.0, dc=None):
    """dc: (lambda, weights now, base), or None."""
    total = None
    for i, slot in enumerate(slots):
        term = slot * f32(scales[i]) if scales else slot
        total = term.copy() if total is None else total + term
    grad = total / f32(divisor) * f32(coef)
    if dc is not None:
        strength, now, base = dc
        grad = grad + f32(strength) * grad * grad * (now - base)
    return grad


def lerp(start, end, weight):
    weight = f32(weight)
    near = start + weight * (end - start)
    return near if weight < 0.5 else end - (end - start) * (f32(1) - weight)


def sgd(w, g, state, step, lr, momentum, dampening, weight_decay, nesterov, maximize):
    g = -g if maximize else g
    g = g + f32(weight_decay) * w if weight_decay else g
    if momentum:
        buffer = state["momentum_buffer"]
        buffer[:] = g if step == 1 else f32(momentum) * buffer + f32(1 - dampening) * g
        g = g + f32(momentum) * buffer if nesterov else buffer
    w -= f32(lr) * g


def adam(
    w, g, state, step, lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay
):
    g = -g if maximize else g
    if decoupled_weight_decay:
        w *= f32(1 - lr * weight_decay)
    elif weight_decay:
        g = g + f32(weight_decay) * w
    m, v = state["exp_avg"], state["exp_avg_sq"]
    m[:] = lerp(m, g, 1 - betas[0])
    v[:] = f32(betas[1]) * v + f32(1 - betas[1]) * g * g
    if amsgrad:
        v = np.maximum(state["max_exp_avg_sq"], v, out=state["max_exp_avg_sq"])
    denominator = np.sqrt(v) * f32(1 / (1 - betas[1] ** step) ** 0.5) + f32(eps)
    w -= f32(lr / (1 - betas[0] ** step)) * m / denominator


def adagrad(
    w, g, state, step, lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize
):
    g = -g if maximize else g
    g = g + f32(weight_decay) * w if weight_decay else g
    state["sum"] += g * g
    w -= f32(lr / (1 + (step - 1) * lr_decay)) * g / (np.sqrt(state["sum"]) + f32(eps))


def rmsprop(w, g, state, step, lr, alpha, eps, weight_decay, momentum, centered, maximize):
    g = -g if maximize else g
    g = g + f32(weight_decay) * w if weight_decay else g
    square = state["square_avg"]
    square[:] = f32(alpha) * square + f32(1 - alpha) * g * g
    if centered:
        mean = state["grad_avg"]
        mean[:] = lerp(mean, g, 1 - alpha)
        square = square - mean * mean
    denominator = np.sqrt(square) + f32(eps)
    if momentum:
        buffer = state["momentum_buffer"]
        buffer[:] = f32(momentum) * buffer + g / denominator
        w -= f32(lr) * buffer
    else:
        w -= f32(lr) * g / denominator


def lion(w, g, state, step, lr, betas, weight_decay, maximize):
    g = -g if maximize else g
    m = state["exp_avg"]
    direction = np.sign(f32(betas[0]) * m + f32(1 - betas[0]) * g)
    w *= f32(1 - lr * weight_decay)
    w -= f32(lr) * direction
    m[:] = f32(betas[1]) * m + f32(1 - betas[1]) * g


ORACLES = {"sgd": sgd, "adam": adam, "adagrad": adagrad, "rmsprop": rmsprop, "lion": lion}


@dataclass
class Bucket:
    """Guarded memory of one bucket, and the job over it."""

    kernel: str
    weights: np.ndarray  # float32 values; published in `dtype`
    slots: list[np.ndarray]
    dtype: str = "float32"
    states: list[np.ndarray | None] = field(default_factory=list)
    segments: list[tuple[int, int, int, int]] | None = None
    seq: int = 0

    def __post_init__(self) -> None:
        n = len(self.weights)
        narrow = self.dtype != "float32"
        self.published = Block(stored(self.weights, self.dtype))
        self.master = Block(self.weights.astype(np.float32)) if narrow else self.published
        self.slot_blocks = [Block(stored(slot, self.dtype)) for slot in self.slots]
        self.state_blocks = [None if s is None else Block(s) for s in self.states]
        self.seq_word = np.array([self.seq * 2], np.uint64)
        segments = [(0, n, 0, 0)] if self.segments is None else self.segments
        self.job = native.Job(
            rule=native.RULES[self.kernel].kernel,
            segments=np.array(segments, native.SEGMENT),
            grad_dtype=native.DTYPE[self.dtype],
            weights_ptr=self.published.address,
            master_ptr=self.master.address,
            state_ptrs=[0 if block is None else block.address for block in self.state_blocks],
            seq_ptr=self.seq_word.ctypes.data,
        )
        self.job.slots = [block.address for block in self.slot_blocks]
        self.job.steps = np.ones(1 + max((s[3] for s in segments), default=0), np.int64)

    def check_guards(self) -> None:
        for block in [self.published, self.master, *self.slot_blocks, *self.state_blocks]:
            if block is not None:
                block.check_guards()
