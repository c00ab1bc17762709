"""Who takes part: admissions, formation, goodbyes and deaths of one job's workers.

A rank is held by one incarnation (one process) at a time. Each time a rank is admitted it gets a
new session number, and messages of older sessions are void.

The job is *formed* once every rank has declared its model; from then on it stays formed. After
that, `on_death` says what a death means:

shrink  go on with those that are left, but abort when fewer than `min_workers` are live
wait    wait for a replacement; how long is for the caller to say
abort   end the job

Before the job is formed a death means waiting for a replacement, except with `abort`: a job that
has not begun has nothing to shrink. A goodbye never ends a job.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from zps.errors import ConfigError

__all__ = ["Admitted", "Membership", "Refused", "Verdict"]


@dataclass(frozen=True, slots=True)
class Admitted:
    """The worker takes part under this session number.

    rejoined  the rank was held before: by a worker that died or finished
    repeat    this hello was answered before; nothing has changed
    """

    session: int
    rejoined: bool
    repeat: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """The worker does not take part.

    code  "rank_out_of_range"  the rank is not below the world size
          "duplicate_rank"     a live worker holds the rank
          "finished"           this incarnation has said goodbye
          "session_lost"       this incarnation was taken for dead
    text  for the person who started it: what was expected, what came, what to do
    """

    code: str
    text: str


class Verdict(Enum):
    """How the job stands."""

    CONTINUE = "continue"
    WAIT = "wait"
    """What needs gradients of a dead rank waits for a replacement; `Membership.why` names it."""
    ABORT = "abort"
    """End the job; `Membership.why` says why. It stays so."""


class Membership:
    """The workers of one job at one hub.

    world_size   ranks are 0 to world_size - 1
    ranks        those that are to come to this hub; None: all of them
    min_workers  shrink: abort when a death leaves fewer live workers than this
    """

    def __init__(
        self,
        world_size: int,
        min_workers: int = 1,
        on_death: Literal["shrink", "wait", "abort"] = "shrink",
        ranks: range | None = None,
    ) -> None:
        if world_size < 1:
            raise ConfigError(f"world_size is {world_size}, not 1 or more")
        self.ranks = range(world_size) if ranks is None else ranks
        if not 0 <= min_workers <= len(self.ranks):
            raise ConfigError(
                f"min_workers is {min_workers}, not 0 to world_size={len(self.ranks)}"
            )
        if on_death not in ("shrink", "wait", "abort"):
            raise ConfigError(f"on_death is {on_death!r}, not shrink, wait or abort")
        self.world_size = world_size
        self._min_workers = min_workers
        self._on_death = on_death
        self._last_session = 0
        self._sessions: dict[int, int] = {}  # live rank -> session
        self._incarnations: dict[int, str] = {}  # rank -> the last one admitted
        self._returned: set[int] = set()  # live ranks that were held before
        self._dead: set[int] = set()  # died, and not replaced
        self._declared: set[int] = set()
        self._abort = ""

    @property
    def live(self) -> tuple[int, ...]:
        """Ranks with a session, ascending."""
        return tuple(sorted(self._sessions))

    @property
    def dead(self) -> tuple[int, ...]:
        """Ranks that died and have not been replaced, ascending."""
        return tuple(sorted(self._dead))

    @property
    def formed(self) -> bool:
        """Every rank has declared its model; true ever after."""
        return len(self._declared) == len(self.ranks)

    @property
    def verdict(self) -> Verdict:
        """How the job stands now."""
        if self._abort:
            return Verdict.ABORT
        if self._dead and (self._on_death == "wait" or not self.formed):
            return Verdict.WAIT
        return Verdict.CONTINUE

    @property
    def why(self) -> str:
        """What stands in the way, for a message; "" while the verdict is CONTINUE."""
        if self._abort:
            return self._abort
        if self.verdict is Verdict.WAIT:
            return f"{_ranks(self.dead)} died; waiting for a replacement"
        return ""

    def hello(self, rank: int, incarnation: str) -> Admitted | Refused:
        """A worker asks to take part.

        incarnation  made up by each worker process, different for each
        """
        if rank not in self.ranks:
            return Refused("rank_out_of_range", self._explain_range(rank))
        known = self._incarnations.get(rank)
        if rank in self._sessions:
            if incarnation != known:
                return Refused(
                    "duplicate_rank",
                    f"rank {rank} is held by a live worker. Give every worker its own ZPS_RANK; "
                    "if that one has crashed, try again once the hub has noticed.",
                )
            return Admitted(self._sessions[rank], rank in self._returned, repeat=True)
        if incarnation == known:
            return self._refuse_ended(rank)
        self._last_session += 1
        self._sessions[rank] = self._last_session
        self._incarnations[rank] = incarnation
        self._dead.discard(rank)
        if known is not None:
            self._returned.add(rank)
        return Admitted(self._last_session, known is not None, repeat=False)

    def declared(self, rank: int) -> None:
        """A live rank has declared its model, and it is the model of the job."""
        assert rank in self._sessions, f"rank {rank} declared a model without a session"
        self._declared.add(rank)

    def missing(self) -> tuple[int, ...]:
        """Ranks that have yet to declare, ascending; () once the job is formed."""
        return tuple(r for r in self.ranks if r not in self._declared)

    def session_of(self, rank: int) -> int | None:
        """The session of a live rank; None for any other number."""
        return self._sessions.get(rank)

    def bye(self, rank: int) -> Verdict:
        """A rank has finished. Nothing happens if it is not live. Returns `verdict`."""
        self._sessions.pop(rank, None)
        return self.verdict

    def die(self, rank: int) -> Verdict:
        """A rank was found dead. Nothing happens if it is not live. Returns `verdict`."""
        if self._sessions.pop(rank, None) is None:
            return self.verdict
        self._dead.add(rank)
        if not self.formed:
            self._declared.discard(rank)  # its replacement has to declare again
        left = len(self._sessions)
        if self._on_death == "abort":
            self._abort = self._abort or f"rank {rank} died, and on_death is abort"
        elif self._on_death == "shrink" and self.formed and left < self._min_workers:
            self._abort = self._abort or (
                f"rank {rank} died: {left} of {len(self.ranks)} workers left, "
                f"fewer than min_workers={self._min_workers}"
            )
        return self.verdict

    def _explain_range(self, rank: int) -> str:
        if 0 <= rank < self.world_size:
            return (
                f"rank {rank} is not {self.ranks[0]} to {self.ranks[-1]}, the ranks of this node's "
                "hub. ZPS_NODE_RANK must be another on every node."
            )
        return (
            f"rank {rank} is not 0 to {self.world_size - 1}: the job has "
            f"{self.world_size} workers. ZPS_WORLD_SIZE must agree everywhere."
        )

    def _refuse_ended(self, rank: int) -> Refused:
        if rank in self._dead:
            return Refused(
                "session_lost",
                f"this worker of rank {rank} was taken for dead: start a new one, or raise "
                "ZPS_TIMEOUT_S if it was only slow.",
            )
        return Refused("finished", f"this worker of rank {rank} has said goodbye: start a new one.")


def _ranks(ranks: tuple[int, ...]) -> str:
    names = ", ".join(map(str, ranks))
    return f"rank {names}" if len(ranks) == 1 else f"ranks {names}"
