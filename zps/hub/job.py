"""What a hub knows of the job it serves and of each worker in it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zps.config import Settings
from zps.core.layout import Layout
from zps.core.rounds import Mode
from zps.core.staleness import StalenessPolicy
from zps.errors import ConfigError, ProtocolError
from zps.hub.engine import Engine, Policy
from zps.hub.store import ForeignFactory, Hypers, Store, make_hypers
from zps.memory.bell import Bell
from zps.memory.control import Control
from zps.memory.segment import Segment
from zps.optim.base import Rule
from zps.wire import messages as m
from zps.wire.hypers import take_members, unpack_hypers
from zps.wire.sockets import Frame

log = logging.getLogger("zps.hub")

ResolveRule = Callable[[str], Rule | ForeignFactory]
MakeEngine = Callable[["Declaration", Control, Policy], Engine]


class Refused(Exception):
    """A request that is answered with a refusal and changes nothing; `code` is for programs."""

    def __init__(self, code: str, text: str):
        super().__init__(text)
        self.code = code


@dataclass(slots=True)
class Peer:
    """One session: one life of one worker."""

    route: bytes
    session: int
    rank: int
    hello: m.Hello
    pidfd: int  # -1: it lives on another host
    connection: int = -1  # how the socket's monitor names its connection
    declared: bool = False
    shares: bool = False  # what it said of memory when it last declared
    at_work: bool = False  # it has published, pushed or pulled: what it said is settled
    slots: Segment | None = None  # None: its gradients come in messages
    base: NDArray[np.uint8] | None = None  # the weights it was last sent, if that is needed
    hypers: Hypers | None = None
    first_hypers: Hypers | None = None  # as declared
    first_round: int = 0
    entered: bool = False  # it has been let in, and takes part in rounds
    bell: Bell | None = None  # goes with slots
    rings: bool = False  # its last push came by the bell, and had no more to say
    heard: int = 0  # the highest sequence number that has come, in a message or by the bell
    last_seq: int = 0
    last_reply: list[Frame] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return self.hello.pid

    @property
    def base_address(self) -> int:
        return 0 if self.base is None else int(self.base.ctypes.data)

    def close(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)
        self.share_nothing()

    def share_nothing(self) -> None:
        """Let go of the memory that both see; what was pushed and not yet applied keeps its own."""
        if self.slots is not None:
            self.slots.close()
        if self.bell is not None:
            self.bell.close()
        self.slots = self.bell = None


@dataclass(frozen=True, slots=True)
class Declaration:
    """What a worker says it will exchange."""

    layout: Layout
    rule: str
    hypers: Hypers
    group_of: tuple[int, ...]
    place: tuple[int, int] = (0, 1)
    """This hub's number among those of the worker, and how many these are."""
    whole: Layout | None = None
    """The model of which this hub has a part, where the worker has said it."""

    @classmethod
    def read(
        cls,
        rule: str,
        layout_data: object,
        hypers_data: bytes,
        resolve: ResolveRule,
        *,
        place: tuple[int, int] = (0, 1),
        whole_data: object = None,
    ) -> Declaration:
        """Raises ProtocolError or ConfigError for one that cannot be served."""
        if place[0] >= place[1]:
            raise ProtocolError(f"a hub that is number {place[0]} of {place[1]}")
        layout = Layout.from_wire(layout_data)
        whole = None if whole_data is None else Layout.from_wire(whole_data)
        groups, norm = unpack_hypers(hypers_data)
        group_of = take_members(groups, len(layout.params))
        own = _native(resolve(rule))
        if own is None and len(layout.pieces) > len(layout.params):
            raise ProtocolError(f"{rule} steps whole tensors, and this layout cuts them")
        return cls(layout, rule, make_hypers(own, groups, norm), group_of, place, whole)


@dataclass(slots=True)
class Job:
    """What exists from rank 0's declaration until the last worker has left."""

    declared: Declaration
    engine: Engine
    control: Control
    who: str  # declared it

    @classmethod
    def open(
        cls,
        declared: Declaration,
        settings: Settings,
        *,
        epoch: int,
        world_size: int,
        who: str,
        make_engine: MakeEngine,
    ) -> Job:
        """Allocate everything the job needs. Raises OutOfMemory, ConfigError.

        who  declared it, for messages
        """
        layout = declared.layout
        control = Control.create(
            epoch=epoch,
            world_size=world_size,
            buckets=len(layout.buckets),
            pieces=len(layout.pieces),
        )
        policy = Policy(
            mode=Mode(settings.mode),
            staleness=settings.staleness,
            quorum=settings.quorum,
            staleness_policy=StalenessPolicy(settings.staleness_policy),
            alpha=settings.staleness_alpha,
            dc_lambda=settings.dc_lambda,
        )
        log.info(
            "%d parameters in %d buckets, rule %s, mode %s",
            *(len(layout.params), len(layout.buckets), declared.rule, settings.mode),
        )
        return cls(declared, make_engine(declared, control, policy), control, who)

    @property
    def layout(self) -> Layout:
        return self.declared.layout

    @property
    def store(self) -> Store:
        return self.engine.store

    def check_same(self, other: Declaration, who: str) -> None:
        """Raise Refused naming the first difference from what was declared first."""
        if other.place != self.declared.place:
            (here, among), (first, all_of) = other.place, self.declared.place
            raise Refused(
                "hubs",
                f"this hub is number {here + 1} of {among} on {who}, but number {first + 1} of "
                f"{all_of} on {self.who}. Every worker must list the same hubs in the same order.",
            )
        whole, other_whole = self.declared.whole, other.whole
        if whole is not None and other_whole is not None and whole.hash != other_whole.hash:
            raise Refused("layout", other_whole.explain_mismatch(whole, who, self.who))
        if other.layout.hash != self.layout.hash:
            raise Refused("layout", other.layout.explain_mismatch(self.layout, who, self.who))
        if other.rule != self.declared.rule:
            raise Refused(
                "rule", f"the rule is {other.rule!r} on {who}, {self.declared.rule!r} on {self.who}"
            )
        if other.group_of != self.declared.group_of:
            raise Refused("groups", f"{who} has its parameters in other groups than {self.who}")
        mine, theirs = self.declared.hypers.max_grad_norm, other.hypers.max_grad_norm
        if mine != theirs:
            raise Refused(
                "settings", f"max_grad_norm is {theirs} on {who} but {mine} on {self.who}"
            )

    def new_hypers(self, data: bytes) -> Hypers:
        """Changed hyperparameters, with the state they need. Raises ProtocolError, ConfigError."""
        groups, norm = unpack_hypers(data)
        if len(groups) != len(self.declared.hypers.groups):
            raise ProtocolError("the number of parameter groups has changed")
        if self.store.rule is None:
            _check_kinds(self.declared.hypers.groups, groups)
        hypers = make_hypers(self.store.rule, groups, norm)
        self.store.ensure_state(hypers)
        return hypers

    def close(self) -> None:
        self.store.close()
        self.control.segment.close()


def _check_kinds(
    declared: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Raise ConfigError where a foreign rule, which may check nothing, would be told nonsense."""
    for index, (old, new) in enumerate(zip(declared, groups, strict=True)):
        for name, value in new.items():
            was = old.get(name)
            if isinstance(was, int | float) and not isinstance(value, int | float):
                raise ConfigError(f"group {index}, {name}: {value!r} is no number, as {was!r} was")


def _native(rule: Rule | ForeignFactory) -> Rule | None:
    return rule if isinstance(rule, Rule) else None
