"""The low-level worker: declare tensors, push gradients, pull values, in any loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from zps.config import Settings
from zps.core.address import split
from zps.core.layout import Layout, Param
from zps.core.shards import Shard, cut
from zps.errors import (
    ConfigError,
    HubUnreachable,
    LayoutError,
    NotDeclared,
    RankOutOfRange,
    TensorMismatch,
    UnknownName,
)
from zps.wire import messages as m
from zps.wire.hypers import pack_hypers
from zps.worker import joining
from zps.worker.account import merge
from zps.worker.assembly import Assembly, Selection
from zps.worker.channel import Channel
from zps.worker.gradients import check_like, dtype_name, nonfinite
from zps.worker.link import PushInfo
from zps.worker.tracing import WorkerTracer
from zps.worker.verdicts import Verdicts
from zps.worker.work import Work

log = logging.getLogger("zps")

What = str | Sequence[str] | Mapping[str, torch.Tensor]

_MAX_SELECTIONS = 1024  # a loop may choose other names in every round


class Worker:
    """One worker of a job.

        with zps.Worker("ipc:///...", rank=0, world_size=2) as worker:
            worker.declare({"w": torch.zeros(10)}, rule="sgd", lr=0.1)
            worker.slot("w")[:] = gradient           # written where the hub will read it
            worker.push("w").wait()
            worker.weights("w")                      # the new values

    address     of the hub, or of several, comma-separated, in the same order on every rank; None:
                the setting `hub`
    rank        from 0; None: the setting, or the lowest one free
    world_size  None: the setting, or what the hub says
    settings    None: `Settings.load(**overrides)`
    Raises HubUnreachable, DuplicateRank, RankOutOfRange, ConfigError (settings that the hub has
    otherwise), ProtocolError. Threads may share a worker; a forked child may not use it.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        settings: Settings | None = None,
        **overrides: Any,
    ):
        settings = settings if settings is not None else Settings.load(**overrides)
        addresses = _addresses(address, settings)
        rank = settings.rank if rank is None else rank
        world_size = settings.world_size if world_size is None else world_size
        if (rank is not None and rank < 0) or (world_size is not None and world_size < 1):
            raise RankOutOfRange(f"rank {rank} of {world_size} workers: ranks count from 0")
        self.tracer = WorkerTracer(settings.trace)
        self._sessions = joining.greet(addresses, settings, rank, world_size)
        self._session = self._sessions[0]  # for what one hub answers for all
        self.settings = self._session.agree()
        self.rank = self._session.rank
        self.world_size = self._session.world_size
        self._model: Assembly | None = None
        self._verdicts: Verdicts | None = None
        self._published = self._closed = False
        self._selected: dict[tuple[str, ...], Selection] = {}  # names -> their buckets
        self._under_way: list[Work] = []  # pushes that may still lie in their slots
        self._at_close: list[Callable[[bool], None]] = []

    # --- declaring ----------------------------------------------------------------------------

    def declare(
        self,
        tensors: Mapping[str, torch.Tensor],
        rule: str = "sum",
        *,
        groups: Sequence[Mapping[str, Any]] | None = None,
        extras: Mapping[str, torch.Tensor] | None = None,
        max_grad_norm: float | None = None,
        fuse: bool = False,
        **hypers: Any,
    ) -> None:
        """Agree with all workers on what is exchanged; rank 0's values are everyone's first.

        tensors  name -> tensor of float32, bfloat16 or float16; only rank 0's values matter
        rule     what the hub does with the gradients of a round. `sum`, `mean`: the value becomes
                 their (weighted) sum or mean; `assign`: the lowest rank's; `add`: the sum is added
                 to it; sgd, adam, adamw, adagrad, rmsprop, lion; or the import path of a class that
                 the hub may run
        groups   hyperparameters by group: {"params": [names], "lr": 0.1, ...}; None: one group of
                 all, with **hypers
        extras   tensors of any dtype that follow rank 0 at the start, and on `publish`
        fuse     put small tensors together, which then have to be pushed together
        Returns once every worker has declared the same. Raises LayoutMismatch, DuplicateName,
        TensorMismatch, ConfigError, OutOfMemory, WaitTimeout naming the missing ranks.
        """
        self._session.check_usable()
        if self._model is not None:
            raise LayoutError(f"rank {self.rank} has declared its tensors already")
        layout = Layout.build(
            _params(tensors),
            _params(extras or {}),
            bucket_bytes=self.settings.bucket_bytes,
            split="." not in rule,  # a foreign rule sees whole tensors
            fuse=fuse,
        )
        if max_grad_norm is not None or ("." in rule and fuse):
            self._check_may_hold(f"rule={rule!r}, max_grad_norm={max_grad_norm}")
        groups = [{"params": list(tensors), **hypers}] if groups is None else groups
        if self.rank == 0:
            self._warn_of_patterns(list(tensors))
        channels = self._channels(layout, rule, groups, max_grad_norm)
        self._model = Assembly(layout, channels)
        if len(channels) > 1:
            self._verdicts = Verdicts(channels, bsp=self.settings.mode == "bsp")
        # A hub whose workers have yet to publish may stand beside one where they have.
        self._publish(tensors, extras or {}, [c for c in channels if not c.link.formed])
        for channel in channels:
            if channel.link.formed:
                channel.link.download()
        self.refresh()

    def _warn_of_patterns(self, names: list[str]) -> None:
        for setting, codecs in (
            ("ZPS_COMPRESSION", self.settings.push_codecs),
            ("ZPS_PULL_COMPRESSION", self.settings.pull_codecs),
        ):
            for lost in codecs.unmatched(names):
                log.warning("%s: %s", setting, lost)

    def _channels(
        self,
        layout: Layout,
        rule: str,
        groups: Sequence[Mapping[str, Any]],
        max_grad_norm: float | None,
    ) -> list[Channel]:
        """Declare every hub's shard to it."""
        members = [_indices(group.get("params", ()), layout) for group in groups]
        shards = cut(layout, len(self._sessions))
        hypers = [
            pack_hypers(_groups_of(shard, groups, members), max_grad_norm) for shard in shards
        ]
        attached = joining.declare(
            self._sessions, self.settings, shards, layout, rule=rule, hypers=hypers
        )
        aliased, together = self._may_alias, layout.fuse or max_grad_norm is not None
        return [
            Channel(session, self.settings, shard, attach, aliased=aliased, together=together)
            for session, shard, attach in zip(self._sessions, shards, attached, strict=True)
        ]

    def publish(
        self,
        tensors: Mapping[str, torch.Tensor] | None = None,
        extras: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Make rank 0's values the truth for everyone. Every worker has to call it.

        None: on rank 0, what its `weights` hold now. Raises UnknownName, TensorMismatch; then
        nothing has been written, and the others go on waiting.
        """
        model = self._declared()
        for name, value in (tensors or {}).items():
            _check_shape(model.layout.params[self._index(name)], value)
        for name, value in (extras or {}).items():
            _check_shape(model.layout.extras[self._extra_index(name)], value)
        if self._published:
            self.barrier()  # nobody may be reading what rank 0 is about to write
        values = (
            dict(zip(model.layout.index, model.weights, strict=True))
            if tensors is None
            else tensors
        )
        self._publish(values, extras or {}, model.channels)
        self.refresh()

    def _publish(
        self,
        tensors: Mapping[str, torch.Tensor],
        extras: Mapping[str, torch.Tensor],
        channels: Sequence[Channel],
    ) -> None:
        model = self._declared()
        if self.rank == 0:
            for name, value in tensors.items():
                model.write(self._index(name), value, channels)
            for name, value in extras.items() if model.channels[0] in channels else ():
                self.extra(name).copy_(value.detach())
        for channel in channels:
            channel.publish()
        self._published = True

    # --- exchanging ---------------------------------------------------------------------------

    def slot(self, name: str) -> torch.Tensor:
        """This worker's gradient slot of `name`, to be written in place before `push(name)`.

        It belongs to the hub from the push until the push has been waited for.
        """
        index = self._index(name)
        return self._declared().slot(index)

    def weights(self, name: str) -> torch.Tensor:
        """The values of `name` as this worker sees them.

        In bsp a view of the hub's own memory: do not write to it. Otherwise a copy that `pull`
        brings up to date.
        """
        index = self._index(name)
        return self._declared().weights[index]

    def extra(self, name: str) -> torch.Tensor:
        """The shared copy of an extra, as rank 0 last published it."""
        index = self._extra_index(name)
        return self._declared().channels[0].extra(index)

    def push(self, what: What, *, samples: float = 1.0) -> Work:
        """Hand gradients to the hub: a mapping is copied into the slots, names are there already.

        samples  weight of this worker in a mean
        The k-th push of a name belongs to round k. With tensors that were fused, push them
        together. Raises UnknownName, TensorMismatch, NonFiniteGradient (nothing has left then).
        """
        names = (what,) if isinstance(what, str) else tuple(what)
        selection = self._buckets_of(names)
        self._wait_for_slots(selection)
        with self.tracer.span("encode"):
            finite = self._fill(what, names) if isinstance(what, Mapping) else self._inspect(names)
        if not finite and self.settings.nonfinite == "skip":
            samples = 0.0
        work = self.push_buckets(selection, PushInfo(samples=samples, finite=finite))
        if len(selection) > 1 and self.aliased:
            model, indices = self._declared(), [self._index(name) for name in names]
            work.then(lambda: model.gather(indices))
        return work

    def pull(self, names: str | Iterable[str] | None = None) -> Work:
        """Bring `weights` up to date. Done when this returns; `wait` is there for symmetry."""
        model = self._declared()
        names = model.layout.index if names is None else names
        wanted = (names,) if isinstance(names, str) else tuple(names)
        with self.tracer.span("copy"):
            for channel, buckets in zip(model.channels, self._buckets_of(wanted), strict=True):
                channel.refresh(buckets)
            model.gather(self._index(name) for name in wanted)
        return Work((), default_timeout_s=self.settings.timeout_s).wait()

    def push_pull(self, what: What, *, samples: float = 1.0) -> Work:
        """Push; once waited for, `weights` holds the new values, and so do the tensors of `what`.

        With the rule `sum` or `mean` this is an all-reduce in place.
        """
        tensors = dict(what) if isinstance(what, Mapping) else {}
        work = self.push(what, samples=samples)

        def bring() -> None:
            names = tensors or ([what] if isinstance(what, str) else list(what))
            self.pull(names)
            for name, tensor in tensors.items():
                tensor.detach().copy_(self.weights(name))

        return work.then(bring)

    def push_buckets(self, selection: Selection, info: PushInfo) -> Work:
        """Push whole buckets that already lie in the slots, each in its next round.

        Every hub has its part before any of them is waited for.
        """
        model = self._declared()
        if info.hold:
            self._check_may_hold("nonfinite='skip', or a GradScaler")
        with self.tracer.span("signal"):
            parts = [
                channel.push(buckets, info)
                for channel, buckets in zip(model.channels, selection, strict=True)
                if len(buckets)
            ]
        attend = bool if self._verdicts is None else self._verdicts.poll
        timeout_s = self.settings.timeout_s
        work = Work(parts, default_timeout_s=timeout_s, attend=attend, tracer=self.tracer)
        self._under_way = [work, *(other for other in self._under_way if not other.done())]
        return work

    def refresh(self) -> None:
        """Copy the hubs' weights here, where they are not views of them anyway."""
        model = self._declared()
        with self.tracer.span("copy"):
            for channel in model.channels:
                channel.refresh()
            model.gather()

    # --- the rest -----------------------------------------------------------------------------

    @property
    def aliased(self) -> bool:
        """Whether `weights` are views of the hub's memory: see the setting `pull`."""
        return self._model is not None and self._model.channels[0].aliased

    @property
    def _may_alias(self) -> bool:
        return self.settings.pull == "alias" or (self.settings.pull == "auto" and self.in_step)

    @property
    def joined_late(self) -> bool:
        """Whether the job was running already when this worker declared."""
        return all(channel.link.formed for channel in self._declared().channels)

    def times_updated(self, name: str) -> int:
        """How often `name` has been updated; may change at any time."""
        index = self._index(name)
        return self._declared().times_updated(index)

    @property
    def in_step(self) -> bool:
        """Whether every round ends for all workers at once, with the gradients of all of them."""
        return self.settings.mode == "bsp" and self.settings.quorum == 1

    def check_usable(self) -> None:
        """Raise Closed, ForkedProcess or NotDeclared when nothing can be exchanged."""
        self._declared()

    @property
    def inherited(self) -> bool:
        """Whether this process got it by a fork, and may not use it."""
        return self._session.inherited

    @property
    def closed(self) -> bool:
        """Whether `close` has been called here, on a worker that had declared."""
        return self._closed

    @property
    def layout(self) -> Layout:
        """What was declared, as one hub would have it."""
        return self._declared().layout

    @property
    def channels(self) -> tuple[Channel, ...]:
        """The hubs, in order, each with its part of what was declared."""
        return self._declared().channels

    @property
    def model(self) -> Assembly:
        """What was declared, put together from all hubs: for who brings many gradients."""
        return self._declared()

    @property
    def every_bucket(self) -> Selection:
        """What `push_buckets` takes for all that was declared."""
        return self._declared().every

    def barrier(self) -> None:
        """Return once every live worker has called it."""
        self._session.request(m.Barrier)

    def stats(self) -> dict[str, Any]:
        """The hub's own account: members, versions, dropped and skipped rounds.

        Of several hubs: one for all, with each one's own in the list "hubs".
        """
        return merge([session.stats() for session in self._sessions])

    def close(self, *, goodbye: bool = True) -> None:
        """Leave the job. Closing twice is allowed.

        What has been pushed counts, waited for or not. A hub with little room asks for large
        gradients late, where they travel in messages: this waits for it up to `timeout_s`.

        goodbye  True: the others go on without this worker; False: it has failed, and the setting
                 `on_death` says what that means for them
        """
        calls, self._at_close = self._at_close, []
        for call in calls:
            call(goodbye)
        model, timeout_s = self._model, self.settings.timeout_s
        links = [channel.link for channel in model.channels] if goodbye and model else []
        if joining.hand_over(links, self.rank, timeout_s):
            joining.leave(self._sessions, failed=False, timeout_s=timeout_s)
        else:
            joining.leave(self._sessions, failed=not goodbye)
        self._under_way.clear()
        self._model = None
        if model is not None:
            model.close()
            self._closed = True
            self.tracer.finish(self.rank)

    def at_close(self, call: Callable[[bool], None]) -> None:
        """Have `call(goodbye)` made first when this worker closes.

        After a goodbye nobody writes what it can still read.
        """
        self._at_close.append(call)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(goodbye=kind is None)

    # --- parts --------------------------------------------------------------------------------

    def _declared(self) -> Assembly:
        self._session.check_usable()
        if self._model is None:
            raise NotDeclared(f"rank {self.rank} has to call declare() first")
        return self._model

    def _check_may_hold(self, what: str) -> None:
        """Raise ConfigError if rounds are not to be held back until all of them is known.

        With a quorum each hub closes rounds at a pace of its own: none is whole at all of them.
        """
        if len(self._sessions) > 1 and self.settings.quorum < 1:
            raise ConfigError(
                f"{what}: this holds whole rounds back, which with quorum={self.settings.quorum} "
                "needs a single hub"
            )

    def _index(self, name: str) -> int:
        layout = self._declared().layout
        index = layout.index.get(name)
        if index is None:
            raise UnknownName(
                f"rank {self.rank} has declared no tensor {name!r}; there are {list(layout.index)}"
            )
        return index

    def _extra_index(self, name: str) -> int:
        known = self.layout.extra_index
        if name not in known:
            raise UnknownName(
                f"rank {self.rank} has declared no extra {name!r}; there are {list(known)}"
            )
        return known[name]

    def _buckets_of(self, names: tuple[str, ...]) -> Selection:
        """The buckets in which these tensors lie. Raises UnknownName."""
        model = self._declared()
        selection = self._selected.get(names)
        if selection is None:
            selection = model.buckets_of(self._index(name) for name in names)
            if len(self._selected) >= _MAX_SELECTIONS:
                self._selected.clear()
            self._selected[names] = selection
        return selection

    def _wait_for_slots(self, selection: Selection) -> None:
        for channel, buckets in zip(self._declared().channels, selection, strict=True):
            channel.wait_for_slots(buckets)

    def _fill(self, tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> bool:
        """Bring gradients into the slots; whether all are finite."""
        model = self._declared()
        pairs = [(self._index(name), tensors[name]) for name in names]
        for index, tensor in pairs:
            check_like(model.layout.params[index], tensor, self.rank)
        return self._all_finite(
            zip(names, [model.load(index, tensor) for index, tensor in pairs], strict=True)
        )

    def _inspect(self, names: Sequence[str]) -> bool:
        model, look = self._declared(), self.settings.nonfinite != "allow"
        return self._all_finite(
            (name, model.load_in_place(self._index(name), look=look)) for name in names
        )

    def _all_finite(self, findings: Iterable[tuple[str, bool]]) -> bool:
        bad = [name for name, finite in findings if not finite]
        if bad and self.settings.nonfinite == "raise":
            raise nonfinite(bad[0], self.rank)
        return not bad or self.settings.nonfinite == "allow"


def _addresses(address: str | None, settings: Settings) -> tuple[str, ...]:
    """The hubs to join, in order."""
    named = settings.hubs if address is None else split(address)
    if not named:
        raise HubUnreachable("no hub is named: pass its address, or set ZPS_HUB")
    if len(set(named)) < len(named):
        raise ConfigError(f"{','.join(named)} names a hub twice")
    return named


def _groups_of(
    shard: Shard, groups: Sequence[Mapping[str, Any]], members: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """The parameter groups as one hub gets them, with its own parameters by their index there."""
    own: dict[int, list[int]] = {}
    for index, part in enumerate(shard.parts):
        own.setdefault(part.param, []).append(index)
    return [
        {**group, "params": [index for param in params for index in own.get(param, ())]}
        for group, params in zip(groups, members, strict=True)
    ]


def _params(tensors: Mapping[str, torch.Tensor]) -> list[Param]:
    return [Param(name, tuple(t.shape), dtype_name(t)) for name, t in tensors.items()]


def _check_shape(param: Param, value: torch.Tensor) -> None:
    if tuple(value.shape) != param.shape:
        raise TensorMismatch(
            f"{param.name!r} was declared as {param.shape}, and {tuple(value.shape)} is published"
        )


def _indices(names: Iterable[str], layout: Layout) -> list[int]:
    try:
        return [layout.index[name] for name in names]
    except KeyError as error:
        raise UnknownName(f"a group names {error}, which is not declared") from None
