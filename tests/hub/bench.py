"""A hub without sockets and processes: pushes go in, words and weights are looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zps import native
from zps.core.layout import Layout, Param
from zps.core.rounds import Mode
from zps.core.staleness import StalenessPolicy
from zps.hub.engine import Engine, HandOver, Policy
from zps.hub.store import ForeignFactory, Pushed, Store, make_hypers
from zps.memory.cast import from_float32, to_float32
from zps.memory.control import Control, Outcome, outcomes_of
from zps.optim.registry import rule as rule_of

#: Elements of each tensor; with 4096 bytes a bucket, `c` has two.
SIZES = {"a": 8, "b": 5, "c": 1500}
WORLD = 3


class Bench:
    """An engine, its store, and the slots of three ranks that have joined."""

    def __init__(
        self,
        rule: str | ForeignFactory = "sum",
        groups: Sequence[Mapping[str, Any]] = ({},),
        *,
        dtype: str = "float32",
        fuse: bool = False,
        max_grad_norm: float | None = None,
        members: Sequence[int] = range(WORLD),
        keeps_base: bool = False,
        one_of_several: bool = False,
        hand_over: HandOver | None = None,
        **policy: Any,
    ):
        self.layout = Layout.build(
            [Param(name, (size,), dtype) for name, size in SIZES.items()],
            bucket_bytes=4096,
            split=isinstance(rule, str),  # a foreign rule sees whole tensors
            fuse=fuse,
        )
        self.buckets = range(len(self.layout.buckets))
        self.control = Control.create(
            epoch=1,
            world_size=WORLD,
            buckets=len(self.buckets),
            pieces=len(self.layout.pieces),
        )
        self.rule = rule_of(rule) if isinstance(rule, str) else None
        self.hypers = make_hypers(self.rule, [dict(g) for g in groups], max_grad_norm)
        self.pool = native.Pool(2)
        self.store = Store(
            self.layout,
            rule if self.rule is None else self.rule,
            [i % len(groups) for i in range(len(SIZES))],
            self.hypers,
            pool=self.pool,
            control=self.control,
        )
        policy = {"mode": "bsp", "staleness_policy": "none", **policy}
        self.engine = Engine(
            self.store,
            self.control,
            Policy(
                **{
                    **policy,
                    "mode": Mode(policy["mode"]),
                    "staleness_policy": StalenessPolicy(policy["staleness_policy"]),
                }
            ),
            one_of_several=one_of_several,
            hand_over=hand_over,
        )
        self._base_offset = self.layout.arena_bytes if keeps_base else 0
        self.slots = [np.zeros(2 * self.layout.arena_bytes, np.uint8) for _ in range(WORLD)]
        self._seq = 0
        for rank in members:
            self.engine.join(rank)

    # --- in -----------------------------------------------------------------------------------

    def push(
        self,
        rank: int,
        value: float | Mapping[str, Any] = 1.0,
        *,
        round: int = 0,
        buckets: Sequence[int] | None = None,
        base: int | Sequence[int] | None = None,
        seq: int | None = None,
        flush: bool = True,
        **fields: Any,
    ) -> Pushed:
        """Fill the rank's slots, one value or one per name, and push."""
        values = value if isinstance(value, Mapping) else dict.fromkeys(SIZES, value)
        for name, given in values.items():
            self.fill(self.slots[rank], name, given)
        self._seq = self._seq + 1 if seq is None else seq
        fields = {
            "samples": 1.0,
            "grad_scale": 1.0,
            "finite": True,
            "hold": False,
            "absent": frozenset(),
            "hypers": self.hypers,
            **fields,
        }
        pushed = Pushed(
            rank=rank,
            session=rank + 1,
            round=round,
            seq=self._seq,
            slots=self.slots[rank],
            slots_address=self.slots[rank].ctypes.data,
            base_address=self._base_offset and self.slots[rank].ctypes.data + self._base_offset,
            **fields,
        )
        chosen = self.buckets if buckets is None else buckets
        versions = self.engine.rounds.versions
        bases = [versions[bucket] if base is None else base for bucket in chosen]
        self.engine.push(pushed, chosen, bases)
        if flush:
            self.engine.flush()
        return pushed

    def fill(self, arena: np.ndarray, name: str, value: Any) -> None:
        index = self.layout.index[name]
        param, byte = self.layout.params[index], self.layout.param_byte(index)
        floats = np.broadcast_to(np.asarray(value, np.float32), param.shape).copy()
        from_float32(floats, param.dtype, arena[byte : byte + param.nbytes])

    def hypers_of(self, *groups: Mapping[str, Any], max_grad_norm: float | None = None) -> Any:
        return make_hypers(self.rule, [dict(group) for group in groups], max_grad_norm)

    # --- out ----------------------------------------------------------------------------------

    def weights(self, name: str) -> np.ndarray:
        """The published values of a tensor, as float32."""
        index = self.layout.index[name]
        param, byte = self.layout.params[index], self.layout.param_byte(index)
        out = np.empty(param.shape, np.float32)
        to_float32(self.store.weights.bytes[byte : byte + param.nbytes], param.dtype, out)
        return out

    def values(self) -> dict[str, float]:
        """The one value that all elements of each tensor have."""
        found = {name: self.weights(name) for name in SIZES}
        assert all((array == array[0]).all() for array in found.values()), found
        return {name: float(array[0]) for name, array in found.items()}

    def versions(self) -> list[int]:
        """As readers see them: an even word is twice the version."""
        words = self.control.seq.tolist()
        assert all(word % 2 == 0 for word in words)
        return [word // 2 for word in words]

    def steps(self) -> dict[str, int]:
        """How often each tensor has been stepped; its pieces agree."""
        found: dict[str, set[int]] = {name: set() for name in SIZES}
        for piece, count in zip(self.layout.pieces, self.control.steps.tolist(), strict=True):
            found[self.layout.params[piece.param].name].add(count)
        assert all(len(counts) == 1 for counts in found.values()), found
        return {name: counts.pop() for name, counts in found.items()}

    def outcomes(self, pushed: Pushed) -> list[Outcome | None]:
        """What became of a push, by bucket; None where it has not been consumed."""
        words = self.control.done[pushed.rank].tolist()
        outcomes = outcomes_of(np.array(words, np.uint64))
        pairs = zip(words, outcomes, strict=True)
        return [outcome if word >> 3 == pushed.seq else None for word, outcome in pairs]

    def signal(self) -> int:
        return native.load_u32(self.control.signal_address)
