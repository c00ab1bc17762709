"""A hub without its sockets: pushes go in, updates are applied, words in shared memory come out.

`core.rounds` decides what follows a push; this module carries it out. Updates collect until
`flush`, so that whatever arrived together is applied by one native call and wakes everyone once.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from zps import native
from zps.core.rounds import Apply, Drop, Mode, Rounds
from zps.core.staleness import StalenessPolicy, lr_factor
from zps.hub.docket import SKIP, Docket, Due, Findings, Question
from zps.hub.store import Hypers, Pushed, Store, Update
from zps.memory.control import Control, Outcome, done_word
from zps.trace import NO_TRACE, Tracer

HandOver = Callable[[list[Update]], None]
"""Takes updates, no two of one bucket, whose gradients lie in their slots until `finish`."""

_OUTCOMES = {"late": Outcome.LATE, "stale": Outcome.STALE, "duplicate": Outcome.DUPLICATE}


@dataclass(frozen=True, slots=True)
class Policy:
    """How rounds close and what staleness does: see docs/semantics.md."""

    mode: Mode
    staleness: int = 1
    quorum: float = 1.0
    staleness_policy: StalenessPolicy = StalenessPolicy.NONE
    alpha: float = 1.0
    dc_lambda: float = 0.0

    def rounds(self, buckets: int) -> Rounds:
        drops = self.staleness_policy is StalenessPolicy.DROP
        return Rounds(
            buckets,
            self.mode,
            staleness=self.staleness,
            quorum=self.quorum,
            drop_over=self.staleness if drops else None,
        )


class Engine:
    """Rounds, the store, and the pushes between the two."""

    def __init__(
        self,
        store: Store,
        control: Control,
        policy: Policy,
        tracer: Tracer = NO_TRACE,
        *,
        one_of_several: bool = False,
        hand_over: HandOver | None = None,
    ):
        """
        one_of_several  other hubs have the rest of the model: no round on hold is judged here alone
        hand_over       carries updates out elsewhere, where whole rounds are judged too; whoever
                        gets them calls `finish`, now or later. None: the store does, at once
        """
        self.store = store
        self.counters: Counter[str] = Counter()
        self.applied = 0  # how often the store's jobs have been loaded here
        self._control = control
        self._done_address = control.done_address(0)
        self._policy = policy
        self._tracer = tracer
        self._hand_over = hand_over
        self.rounds = policy.rounds(len(store.layout.buckets))
        self._waiting: dict[tuple[int, int, int], Pushed] = {}  # by (rank, round, bucket)
        self._busy: set[tuple[int, int]] = set()  # (session, bucket) whose slot is not consumed
        self._ready: list[Update] = []
        self._held: defaultdict[tuple[int, ...], list[Update | None]] = defaultdict(list)
        self._posts: list[tuple[int, int]] = []  # (index into done, word)
        self.consumed: list[tuple[Pushed, int, Outcome]] = []
        """Remote pushes and their buckets that are done with, for whoever answers them."""
        self.released: list[tuple[Pushed, int]] = []
        """Remote pushes and their buckets whose bytes are not held any more."""
        self._docket = Docket() if one_of_several else None

    # --- members ------------------------------------------------------------------------------

    def join(self, rank: int) -> int:
        """Make `rank` a member; returns its first round."""
        return self.rounds.join(rank)

    def enter(self, rank: int, at_least: int) -> int:
        """Make `rank`, which has just joined, take part from `at_least` on; returns that round."""
        self.leave(rank)
        return self.rounds.join(rank, at_least)

    def leave(self, rank: int) -> None:
        """Wait for `rank` no more. What it pushed counts; what it held back is dropped."""
        self._carry_out(self.rounds.leave(rank))
        if self._policy.mode is not Mode.BSP:
            for key in [key for key in self._held if key[1:] == (rank,)]:
                for update in filter(None, self._held.pop(key)):
                    self.store.touch(update.bucket)  # its version was counted when it was decided
        if self._docket is not None:
            self._conclude(self._docket.leave(rank))

    def closed_before(self, round_: int) -> bool:
        """bsp: whether no bucket will change any more before `round_`.

        Buckets that are pushed one by one promise nothing together, so none is waited for.
        """
        if self._policy.mode is not Mode.BSP or not self.store.layout.fuse:
            return True
        if self._docket is not None and self._docket.holds_before(round_):
            return False
        return self.rounds.min_round() >= round_

    def expect_remote(self, hypers: Hypers, *, hold: bool = False) -> bool:
        """A worker is remote: whether its gradients lie here until all of their round have come.

        In step the average of what is on hold takes their place, for which memory is got now.
        hold  it asks for that. Raises OutOfMemory.
        """
        whole = hold or hypers.max_grad_norm is not None or self.store.steps_whole_rounds
        if not whole or self._hand_over is not None:
            return False
        if self._policy.mode is Mode.BSP:
            self.store.ensure_accumulator()
            return False
        return True

    # --- pushes -------------------------------------------------------------------------------

    def slot_busy(self, session: int, bucket: int) -> bool:
        """Whether a push of this bucket still lies in the slot, unconsumed."""
        return (session, bucket) in self._busy

    def push(self, pushed: Pushed, buckets: Sequence[int], bases: Sequence[int]) -> None:
        """Take a push into slots that are not busy; what it completes is applied at the next flush.

        bases  the versions of the buckets that the gradient was computed on
        Raises ProtocolError, without effect, for a push that no honest worker sends.
        """
        rank, session, round_, rounds = pushed.rank, pushed.session, pushed.round, self.rounds
        for bucket, base in zip(buckets, bases, strict=True):
            rounds.check(rank, round_, bucket, base)
        for bucket, base in zip(buckets, bases, strict=True):
            self._waiting[rank, round_, bucket] = pushed
            self._busy.add((session, bucket))
            if actions := rounds.take(rank, round_, bucket, base):
                self._carry_out(actions)

    def waiting_for(self) -> tuple[int, ...]:
        """The ranks whose gradients the open rounds still need, for messages."""
        ranks: set[int] = set()
        for bucket in range(len(self.store.layout.buckets)):
            ranks.update(self.rounds.waiting_for(bucket))
        if self._docket is not None:
            ranks |= self._docket.waiting_for()
        return tuple(sorted(ranks))

    def at_rest(self) -> int | None:
        """The next round of all members and buckets, where it will need no decision.

        None while anything is under way, in other modes than bsp, with a quorum, where updates are
        handed over, and for a rule that is no kernel.
        """
        policy = self._policy
        if policy.mode is not Mode.BSP or policy.quorum < 1 or self._hand_over is not None:
            return None
        if self.store.rule is None or self._waiting or self._ready or self._held or self._posts:
            return None
        if self._docket is not None and not self._docket.is_empty:
            return None
        return self.rounds.at_rest()

    def advance(self, rounds: int) -> None:
        """So many rounds have been carried out by the jobs of `Store.whole_round`."""
        if not rounds:
            return
        self.rounds.advance(rounds)
        self.counters["updates"] += rounds * len(self.store.layout.buckets)
        self.counters["express_rounds"] += rounds

    # --- verdicts -----------------------------------------------------------------------------

    def questions(self) -> list[Question]:
        """What is to be asked about rounds on hold, each once; `asked` says who was."""
        return [] if self._docket is None else self._docket.questions()

    def asked(self, question: Question, ranks: Iterable[int]) -> None:
        """These workers have been asked; nobody: the round is skipped."""
        assert self._docket is not None
        self._conclude(self._docket.asked(question.key, ranks))

    def decide(self, rank: int, round_: int, verdict: Findings) -> None:
        """A worker has decided about a round on hold; nothing happens if there is none."""
        if self._docket is not None:
            in_step = self._policy.mode is Mode.BSP
            key = (round_,) if in_step else (round_, rank)
            self._conclude(self._docket.decide(key, verdict))

    def flush(self) -> None:
        """Apply what is ready and wake the workers it concerns."""
        while self._ready:
            updates, self._ready = _one_a_bucket(self._ready)
            if self._hand_over is not None:
                self._hand_over(updates)
            else:
                self._apply(updates)
        if self._posts:
            index, words = zip(*self._posts, strict=True)
            self._posts.clear()
            with self._tracer.span("reply"):
                native.post(
                    self._control.signal_address,
                    self._done_address,
                    np.array(index, np.uint32),
                    np.array(words, np.uint64),
                )

    def finish(self, updates: Iterable[Update], outcome: Outcome) -> None:
        """Updates are done: their rounds close, and the next flush tells whoever pushed them."""
        for update in updates:
            # Ordered before the words by the release in native.post.
            self._control.closed[update.bucket] = update.round + 1
            self.store.vacate(update)
            for pushed in update.contributions:
                self._post(pushed, update.bucket, outcome)

    # --- parts --------------------------------------------------------------------------------

    def _carry_out(self, actions: Iterable[Apply | Drop]) -> None:
        for action in actions:
            if isinstance(action, Drop):
                self._drop(action)
            else:
                self._decide(self._update(action))
        if self._held and self._policy.mode is Mode.BSP:
            over = [key for key in self._held if key[0] < self.rounds.min_round()]
            for key in sorted(over):  # the rest of these rounds has gone its own way, or never came
                self._judge_held(key)

    def _drop(self, drop: Drop) -> None:
        self.counters[f"dropped_{drop.reason}"] += 1
        pushed = self._waiting.pop((drop.rank, drop.round, drop.bucket), None)
        if pushed is not None:
            self._post(pushed, drop.bucket, _OUTCOMES.get(drop.reason, Outcome.LATE))
            if drop.reason == "stale" and self._goes_as_a_whole((pushed,)):
                self._hold((drop.round, drop.rank), None)

    def _update(self, action: Apply) -> Update:
        key = (action.round, action.bucket)
        contributions = tuple(self._waiting.pop((rank, *key)) for rank in action.ranks)
        policy = self._policy
        factor, compensation = 1.0, 0.0
        if policy.mode is not Mode.BSP:
            staleness = action.staleness[0]
            self.counters["staleness_sum"] += staleness
            self.counters["staleness_max"] = max(self.counters["staleness_max"], staleness)
            factor = lr_factor(policy.staleness_policy, staleness, policy.alpha)
            if policy.staleness_policy is StalenessPolicy.DC and staleness > 0:
                compensation = policy.dc_lambda
        return Update(action.bucket, action.round, contributions, factor, compensation)

    def _decide(self, update: Update) -> None:
        """Straight to the kernels, unless the verdict on the whole round comes first."""
        in_step = self._policy.mode is Mode.BSP
        key = (update.round,) if in_step else (update.round, update.contributions[0].rank)
        # With a quorum, or after a death, those who asked for it may not be in every bucket.
        whole = key in self._held or self._goes_as_a_whole(update.contributions)
        if whole and self._hand_over is None:
            self._hold(key, update)
        else:
            self._ready.append(update)

    def _goes_as_a_whole(self, contributions: Sequence[Pushed]) -> bool:
        """Whether the buckets of a round wait for one another.

        They do when its norm or the infinities in it decide about all, and for a class that is to
        step once a round, over all of its parameters.
        """
        clipped = contributions[0].hypers.max_grad_norm is not None
        return clipped or self.store.steps_whole_rounds or any(c.hold for c in contributions)

    def _hold(self, key: tuple[int, ...], update: Update | None) -> None:
        """Keep an update until all of its round are here; None for a bucket that has none."""
        held = self._held[key]
        held.append(update)
        if update is not None:
            self._let_go(update)
        if len(held) == len(self.store.layout.buckets):
            self._judge_held(key)

    def _let_go(self, update: Update) -> None:
        """In step, hold the average instead of what came in messages, which would be all of it."""
        remote = [c for c in update.contributions if c.remote]
        if not remote or self._policy.mode is not Mode.BSP:
            return
        if self.store.accumulate(update):
            update.contributions = tuple(replace(c, slots=None) for c in update.contributions)
        self.released += [(c, update.bucket) for c in remote]

    def _judge_held(self, key: tuple[int, ...]) -> None:
        updates = [update for update in self._held.pop(key) if update is not None]
        updates.sort(key=lambda update: update.bucket)
        if self._docket is not None:
            # It waits for other hubs, which may wait for room that this one's next round takes.
            self.released += [(c, u.bucket) for u in updates for c in u.contributions if c.remote]
        self.flush()  # keeps updates in the order they were decided in
        measured = self._measure(updates)
        if self._docket is not None:
            self._docket.add(key, updates, measured)
        else:
            self._conclude([(updates, measured)])

    def _measure(self, updates: list[Update]) -> Findings:
        """What is to be known of a round before any of it is applied."""
        self.applied += 1
        finite = all(c.finite for u in updates for c in u.contributions)
        if not finite or not updates or updates[0].contributions[0].hypers.max_grad_norm is None:
            return Findings(0.0, finite)
        norm_sq = self.store.norm_sq(updates)
        return Findings(norm_sq, finite=True) if math.isfinite(norm_sq) else SKIP

    def _conclude(self, due: Due) -> None:
        """Skip a round with a non-finite gradient for everyone; else clip it by its global norm."""
        for updates, (norm_sq, finite) in due:
            if not updates:
                continue
            if not finite:
                self._skip(updates)
                continue
            limit = updates[0].contributions[0].hypers.max_grad_norm
            # torch.nn.utils.clip_grad_norm_ has the same 1e-6, and never scales up.
            coef = 1.0 if limit is None else min(1.0, limit / (math.sqrt(norm_sq) + 1e-6))
            self._apply(updates, coef)

    def _skip(self, updates: list[Update]) -> None:
        self.counters["rounds_skipped"] += 1
        for update in updates:
            self.store.touch(update.bucket)
        self.finish(updates, Outcome.SKIPPED)

    def _apply(self, updates: list[Update], coef: float = 1.0) -> None:
        self.applied += 1
        with self._tracer.span("apply"):
            self.store.apply(updates, coef)
        self.counters["updates"] += len(updates)
        self.finish(updates, Outcome.APPLIED)

    def _post(self, pushed: Pushed, bucket: int, outcome: Outcome) -> None:
        self._busy.discard((pushed.session, bucket))
        if pushed.remote:
            self.consumed.append((pushed, bucket, outcome))
            self.released.append((pushed, bucket))
            return
        index = pushed.rank * len(self.store.layout.buckets) + bucket
        self._posts.append((index, done_word(pushed.seq, outcome)))


def _one_a_bucket(updates: list[Update]) -> tuple[list[Update], list[Update]]:
    """The first update of each bucket, and the rest: those of one bucket follow one another."""
    first = {update.bucket: update for update in reversed(updates)}
    return list(first.values()), [u for u in updates if first[u.bucket] is not u]
