"""What zps means to reach, and how a run's records are held against it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_BIG = (25_000_000,)
_SMALL = (1_000,)
_MODEL = (25_175_040,)  # bench.train's default model


COLOURS = {"met": "green", "missed": "red", "open": "yellow"}  # of a verdict


def verdict(
    value: float,
    interval: tuple[float, float] | None,
    bound: float,
    *,
    at_most: bool = False,
    starts: int = 2,
) -> str:
    """`met` or `missed` if the whole interval, where it is known, says so; otherwise `open`.

    starts  how often the processes were started: a single one leaves every goal open
    """
    if starts < 2 or (interval is not None and interval[0] < bound < interval[1]):
        return "open"
    return "met" if (value <= bound if at_most else value >= bound) else "missed"


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on a figure of the records that `bench` writes about `what`.

    peer     the figure is this participant's ratio to `what`, from "peers"; None: it is `field`,
             with its interval in "FIELD_ci95" where there is one
    bound    the least ratio peer ÷ what; with `at_most`, the largest what ÷ peer, or `field`
    sizes    the parameters, and `workers` the workers, that it is for; empty: all
    """

    text: str
    bench: str
    what: str
    bound: float
    peer: str | None = None
    field: str | None = None
    at_most: bool = False
    sizes: tuple[int, ...] = ()
    workers: tuple[int, ...] = ()

    def covers(self, bench: str, what: str, size: int | None, workers: int | None) -> bool:
        return (
            (bench, what) == (self.bench, self.what)
            and (not self.sizes or size in self.sizes)
            and (not self.workers or workers in self.workers)
        )

    @property
    def least(self) -> float:
        """The bound as a ratio peer ÷ what."""
        return 1 / self.bound if self.at_most else self.bound


@dataclass(frozen=True, slots=True)
class Judged:
    """A goal beside what was measured, in the goal's own direction; interval None: not known."""

    goal: Goal
    value: float
    interval: tuple[float, float] | None
    starts: int = 2

    @property
    def verdict(self) -> str:
        goal = self.goal
        return verdict(
            self.value, self.interval, goal.bound, at_most=goal.at_most, starts=self.starts
        )


def _step(peer: str, bound: float, workers: int, *, what: str = "zps", how: str = "") -> Goal:
    name = how or f"round in place vs {peer}"
    text = f"{name}, 25 M, n = {workers}"
    return Goal(text, "step", what, bound, peer, sizes=_BIG, workers=(workers,))


GOALS: tuple[Goal, ...] = (
    _step("gloo", 6.0, 2),
    _step("gloo", 8.0, 4),
    _step("mpi", 3.0, 2),
    _step("mpi", 5.0, 4),
    _step("gloo", 3.0, 2, what="zps-grad", how="round from p.grad vs gloo"),
    _step("mpi", 1.8, 2, what="zps-grad", how="round from p.grad vs mpi"),
    _step("ray", 10.0, 2),
    _step("rpc", 20.0, 2),
    Goal(
        *("round ÷ fused kernel alone, 25 M, n = 2", "step", "zps", 1.25, "kernel"),
        at_most=True,
        sizes=_BIG,
        workers=(2,),
    ),
    Goal(
        *("1 K round, n = 2 ÷ raw pyzmq ipc round trip", "rtt", "zps", 1.2, "echo"),
        at_most=True,
        workers=(2,),
    ),
    Goal(
        *(
            "hub's processor time, 1 K round, n = 2 ÷ bare ROUTER",
            "rtt",
            "zps-cpu",
            3.0,
            "echo",
        ),
        at_most=True,
        workers=(2,),
    ),
    Goal(
        *("training step, zps ÷ DDP", "train", "zps", 0.65, "ddp"),
        at_most=True,
        sizes=_MODEL,
        workers=(2,),
    ),
    Goal(
        *("training step, zps ÷ local", "train", "zps", 1.15, "local"),
        at_most=True,
        sizes=_MODEL,
        workers=(2,),
    ),
    Goal(
        *("round from p.grad, traced ÷ not, 1 M", "breakdown", "zps-traced", 1.01, "zps-grad"),
        at_most=True,
        sizes=(1_000_000,),
        workers=(2,),
    ),
    Goal(
        *("growth with parameters, off linear", "scale", "parameters", 0.15),
        field="off_linear",
        at_most=True,
    ),
    Goal(
        *("growth with workers, off linear", "scale", "workers", 0.15),
        field="off_linear",
        at_most=True,
    ),
    Goal("wire: int8 both ways vs none", "wire", "zps-int8", 3.5, "none", sizes=_BIG),
    Goal("wire: onebit, int8 back, vs none", "wire", "zps-onebit-int8", 5.0, "none", sizes=_BIG),
    Goal(
        *("soak: growth of memory, of what is allowed", "soak", "zps", 1.0),
        field="memory_of_allowed",
        at_most=True,
    ),
)


def ratio_goal(bench: str, what: str, peer: str, size: int, workers: int) -> Goal | None:
    """The goal for the time of `peer` over that of `what`, if there is one."""
    found = (g for g in GOALS if g.peer == peer and g.covers(bench, what, size, workers))
    return next(found, None)


def judge(
    records: Sequence[dict[str, Any]], goals: Iterable[Goal] = GOALS
) -> list[tuple[Goal, Judged | None]]:
    """Each goal with the last record that has its figure; None: nobody measured it."""
    return [(goal, _latest(goal, records)) for goal in goals]


def _latest(goal: Goal, records: Sequence[dict[str, Any]]) -> Judged | None:
    for record in reversed(records):
        size, workers = record.get("size"), record.get("workers")
        if goal.covers(record["bench"], record["what"], size, workers):
            judged = _judged(goal, record)
            if judged is not None:
                return judged
    return None


def _judged(goal: Goal, record: dict[str, Any]) -> Judged | None:
    starts = record.get("restarts", 2)  # what is not started anew says nothing of starts
    if goal.peer is None:
        value = record.get(goal.field or "")
        low_high = record.get(f"{goal.field}_ci95")
        interval = None if low_high is None else (float(low_high[0]), float(low_high[1]))
        return None if value is None else Judged(goal, float(value), interval, starts)
    peer = record.get("peers", {}).get(goal.peer)
    if peer is None:
        return None
    value, (low, high) = float(peer["ratio"]), peer["ratio_ci95"]
    if goal.at_most:
        return Judged(goal, 1 / value, (1 / high, 1 / low), starts)
    return Judged(goal, value, (low, high), starts)
