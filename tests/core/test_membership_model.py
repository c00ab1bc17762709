"""Membership against a model: any order of hellos, declarations, goodbyes and deaths."""

from __future__ import annotations

from typing import Literal

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zps.core.membership import Admitted, Membership, Refused, Verdict

RANKS = st.sampled_from([0, 1, 2, 3, 0, 1, -1, 4])
INCARNATIONS = st.sampled_from("abc")


class MembershipMachine(RuleBasedStateMachine):
    @initialize(
        world=st.sampled_from([3, 2, 4, 1]),
        spare=st.sampled_from([1, 0, 2, 4]),
        on_death=st.sampled_from(["shrink", "shrink", "wait", "abort"]),
        early=st.booleans(),
    )
    def begin(
        self, world: int, spare: int, on_death: Literal["shrink", "wait", "abort"], early: bool
    ) -> None:
        self.world, self.on_death, self.early = world, on_death, early
        self.min_workers = max(0, world - spare)
        self.membership = Membership(world, self.min_workers, on_death)
        self.live: dict[int, tuple[str, Admitted]] = {}  # rank -> incarnation, its first answer
        self.ended: dict[int, tuple[str, str]] = {}  # rank -> last incarnation, how it ended
        self.declared: set[int] = set()
        self.sessions: list[int] = []
        self.was_formed = self.aborted = False

    @rule(rank=RANKS, incarnation=INCARNATIONS)
    def hello(self, rank: int, incarnation: str) -> None:
        answer = self.membership.hello(rank, incarnation)
        if isinstance(answer, Refused):
            assert answer.code == self.expected_refusal(rank, incarnation)
            assert f"rank {rank}" in answer.text
            return
        assert self.expected_refusal(rank, incarnation) is None
        if rank in self.live:
            first = self.live[rank][1]
            assert answer == Admitted(first.session, first.rejoined, repeat=True)
            return
        assert answer.session > max(self.sessions, default=0), "sessions strictly increase"
        assert answer == Admitted(answer.session, rank in self.ended, repeat=False)
        self.sessions.append(answer.session)
        self.live[rank] = (incarnation, answer)
        self.ended.pop(rank, None)

    def expected_refusal(self, rank: int, incarnation: str) -> str | None:
        if rank not in range(self.world):
            return "rank_out_of_range"
        if rank in self.live:
            return None if self.live[rank][0] == incarnation else "duplicate_rank"
        last, how = self.ended.get(rank, ("", ""))
        if incarnation == last:
            return {"bye": "finished", "death": "session_lost"}[how]
        return None

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def declare(self, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from(sorted(self.live)))
        self.membership.declared(rank)
        self.declared.add(rank)
        self.was_formed |= self.declared == set(range(self.world))

    @precondition(lambda self: self.early)
    @rule(incarnation=INCARNATIONS)
    def everyone_arrives(self, incarnation: str) -> None:
        for rank in range(self.world):
            self.hello(rank, incarnation)
        for rank in self.live:
            self.membership.declared(rank)
            self.declared.add(rank)
        self.was_formed |= self.declared == set(range(self.world))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), ends=st.sampled_from(["death", "bye"]))
    def end(self, data: st.DataObject, ends: str) -> None:
        rank = data.draw(st.sampled_from(sorted(self.live)))
        self.ended[rank] = (self.live.pop(rank)[0], ends)
        if ends == "bye":
            assert self.membership.bye(rank) is self.expected_verdict()
            return
        if not self.was_formed:
            self.declared.discard(rank)
        too_few = self.was_formed and len(self.live) < self.min_workers
        if self.on_death == "abort" or (self.on_death == "shrink" and too_few):
            self.aborted = True
        assert self.membership.die(rank) is self.expected_verdict()

    @rule(rank=RANKS)
    def end_of_one_that_is_not_there(self, rank: int) -> None:
        if rank not in self.live:
            assert self.membership.bye(rank) is self.expected_verdict()
            assert self.membership.die(rank) is self.expected_verdict()

    def dead(self) -> list[int]:
        return sorted(rank for rank, (_, how) in self.ended.items() if how == "death")

    def expected_verdict(self) -> Verdict:
        if self.aborted:
            return Verdict.ABORT
        if self.dead() and (self.on_death == "wait" or not self.was_formed):
            return Verdict.WAIT
        return Verdict.CONTINUE

    @invariant()
    def the_live_and_the_dead_are_known(self) -> None:
        assert self.membership.live == tuple(sorted(self.live))
        assert self.membership.dead == tuple(self.dead())
        for rank in range(-1, 5):
            admitted = self.live.get(rank)
            assert self.membership.session_of(rank) == (admitted and admitted[1].session)

    @invariant()
    def no_two_workers_share_a_session(self) -> None:
        sessions = [admitted.session for _, admitted in self.live.values()]
        assert len(set(sessions)) == len(sessions)

    @invariant()
    def formation_is_reached_once_and_for_all(self) -> None:
        assert self.membership.formed == self.was_formed
        missing = set() if self.was_formed else set(range(self.world)) - self.declared
        assert self.membership.missing() == tuple(sorted(missing))

    @invariant()
    def the_verdict_follows_from_the_policy(self) -> None:
        assert self.membership.verdict is self.expected_verdict()
        assert bool(self.membership.why) == (self.expected_verdict() is not Verdict.CONTINUE)


TestMembership = MembershipMachine.TestCase
TestMembership.settings = settings(
    deadline=None,
    max_examples=150,
    stateful_step_count=40,
)
