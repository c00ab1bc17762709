"""The low-level worker: declare tensors, push gradients, pull values, in any loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from zps.config import Settings
from zps.core.layout import Layout, Param
from zps.errors import (
    ConfigError,
    HubUnreachable,
    LayoutError,
    NotDeclared,
    RankOutOfRange,
    TensorMismatch,
    UnknownName,
    ZpsError,
)
from zps.wire import messages as m
from zps.wire.hypers import pack_hypers
from zps.worker.channel import Channel
from zps.worker.gradients import check_like, dtype_name, encode, inspect, nonfinite
from zps.worker.link import PushInfo
from zps.worker.session import Session
from zps.worker.work import Work

What = str | Sequence[str] | Mapping[str, torch.Tensor]
Readable = Literal["state", "weights", "foreign"]
Writable = Literal["state", "foreign"]

_MAX_SELECTIONS = 1024  # a loop may choose other names in every round


class Worker:
    """One worker of a job.

        with zps.Worker("ipc:///...", rank=0, world_size=2) as worker:
            worker.declare({"w": torch.zeros(10)}, rule="sgd", lr=0.1)
            worker.slot("w")[:] = gradient           # written where the hub will read it
            worker.push("w").wait()
            worker.weights("w")                      # the new values

    address     of the hub; None: the setting `hub`
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
        addresses = [address] if address is not None else list(settings.hubs)
        if not addresses:
            raise HubUnreachable("no hub is named: pass its address, or set ZPS_HUB")
        if len(addresses) > 1:
            raise ConfigError(f"{len(addresses)} hubs are named; this version uses one")
        rank = settings.rank if rank is None else rank
        world_size = settings.world_size if world_size is None else world_size
        if (rank is not None and rank < 0) or (world_size is not None and world_size < 1):
            raise RankOutOfRange(f"rank {rank} of {world_size} workers: ranks count from 0")
        self._session = Session(addresses[0], settings, rank, world_size)
        self.settings = settings.replace(**self._agreed())
        self.rank = self._session.rank
        self.world_size = self._session.world_size
        self._channel: Channel | None = None
        self._published = self._closed = False
        self._selected: dict[tuple[str, ...], NDArray[np.uint32]] = {}  # names -> their buckets
        self._under_way: list[Work] = []  # pushes that may still lie in their slots
        self._at_close: list[Callable[[bool], None]] = []

    def _agreed(self) -> dict[str, Any]:
        """The hub's values of the shared settings."""
        welcome = self._session.welcome
        return {k: v for k, v in welcome.settings.items() if v is not None and k != "world_size"}

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
        if self._channel is not None:
            raise LayoutError(f"rank {self.rank} has declared its tensors already")
        layout = Layout.build(
            _params(tensors),
            _params(extras or {}),
            bucket_bytes=self.settings.bucket_bytes,
            split="." not in rule,  # a foreign rule sees whole tensors
            fuse=fuse,
        )
        groups = [{"params": list(tensors), **hypers}] if groups is None else groups
        wired = [{**g, "params": _indices(g.get("params", ()), layout)} for g in groups]
        self._channel = Channel(
            self._session,
            self.settings,
            layout,
            rule=rule,
            hypers=pack_hypers(wired, max_grad_norm),
            aliased=self._may_alias,
        )
        self._published = self.joined_late
        if self._published:
            self._channel.link.download()
            self.refresh()
        else:
            self.publish(tensors, extras)

    def publish(
        self,
        tensors: Mapping[str, torch.Tensor] | None = None,
        extras: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Make rank 0's values the truth for everyone. Every worker has to call it.

        None: on rank 0, what its `weights` hold now. Raises UnknownName, TensorMismatch; then
        nothing has been written, and the others go on waiting.
        """
        channel = self._declared()
        layout = channel.layout
        for name, value in (tensors or {}).items():
            _check_shape(layout.params[self._index(name)], value)
        for name, value in (extras or {}).items():
            _check_shape(layout.extras[self._extra_index(name)], value)
        if self._published:
            self.barrier()  # nobody may be reading what rank 0 is about to write
        if self.rank == 0:
            values = (
                dict(zip(layout.index, channel.weights, strict=True))
                if tensors is None
                else tensors
            )
            for name, value in values.items():
                arena = channel.published(layout.index[name])
                if arena.data_ptr() != value.data_ptr():
                    arena.copy_(value.detach())
            for name, value in (extras or {}).items():
                self.extra(name).copy_(value.detach())
            channel.link.upload()
        self._collective(m.Publish)
        self._published = True
        channel.link.download()
        self.refresh()

    # --- exchanging ---------------------------------------------------------------------------

    def slot(self, name: str) -> torch.Tensor:
        """This worker's gradient slot of `name`, to be written in place before `push(name)`.

        It belongs to the hub from the push until the push has been waited for.
        """
        index = self._index(name)
        return self._declared().slots[index]

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
        return self._declared().extra(index)

    def push(self, what: What, *, samples: float = 1.0) -> Work:
        """Hand gradients to the hub: a mapping is copied into the slots, names are there already.

        samples  weight of this worker in a mean
        The k-th push of a name belongs to round k. With tensors that were fused, push them
        together. Raises UnknownName, TensorMismatch, NonFiniteGradient (nothing has left then).
        """
        names = (what,) if isinstance(what, str) else tuple(what)
        buckets = self._buckets_of(names)
        self._wait_for_slots(buckets)
        finite = self._fill(what, names) if isinstance(what, Mapping) else self._inspect(names)
        if not finite and self.settings.nonfinite == "skip":
            samples = 0.0
        return self.push_buckets(buckets, PushInfo(samples=samples, finite=finite))

    def pull(self, names: str | Iterable[str] | None = None) -> Work:
        """Bring `weights` up to date. Done when this returns; `wait` is there for symmetry."""
        layout = self.layout
        wanted = layout.index if names is None else (names,) if isinstance(names, str) else names
        self.refresh(self._buckets_of(tuple(wanted)))
        return Work((), default_timeout_s=self.settings.timeout_s).wait()

    def push_pull(self, what: What, *, samples: float = 1.0) -> Work:
        """Push; once waited for, `weights` holds the new values, and so do the tensors of `what`.

        With the rule `sum` or `mean` this is an all-reduce in place.
        """
        tensors = dict(what) if isinstance(what, Mapping) else {}
        work = self.push(what, samples=samples)

        def bring() -> None:
            names = tensors or ([what] if isinstance(what, str) else list(what))
            self.refresh(self._buckets_of(tuple(names)))
            for name, tensor in tensors.items():
                tensor.detach().copy_(self.weights(name))

        return work.then(bring)

    def push_buckets(self, buckets: NDArray[np.uint32], info: PushInfo) -> Work:
        """Push whole buckets that already lie in the slots, each in its next round."""
        part = self._declared().push(buckets, info)
        work = Work((part,), default_timeout_s=self.settings.timeout_s)
        self._under_way = [work, *(other for other in self._under_way if not other.done())]
        return work

    def refresh(self, buckets: NDArray[np.uint32] | None = None) -> None:
        """Copy the hub's weights here, where they are not views of them anyway."""
        self._declared().refresh(buckets)

    # --- the rest -----------------------------------------------------------------------------

    @property
    def aliased(self) -> bool:
        """Whether `weights` are views of the hub's memory: see the setting `pull`."""
        return self._channel is not None and self._channel.aliased

    @property
    def _may_alias(self) -> bool:
        return self.settings.pull == "alias" or (self.settings.pull == "auto" and self.in_step)

    @property
    def joined_late(self) -> bool:
        """Whether the job was running already when this worker declared."""
        return self._declared().link.formed

    def times_updated(self, name: str) -> int:
        """How often the hub has updated `name`; may change at any time."""
        index = self._index(name)
        channel = self._declared()
        return int(channel.link.steps[channel.layout.pieces_of(index)[0]])

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
        """What was declared."""
        return self._declared().layout

    def barrier(self) -> None:
        """Return once every live worker has called it."""
        self._collective(m.Barrier)

    def stats(self) -> dict[str, Any]:
        """The hub's own account: members, versions, dropped and skipped rounds."""
        with self._session.sequenced() as seq:
            _, payload = self._session.request(m.Stats(**self._session.header(seq)))
        facts: dict[str, Any] = m.unpack(payload[0])
        return facts

    def read(self, what: Readable, index: int, field: str = "") -> bytes:
        """Bytes of optimizer state that live in the hub: see the READ message."""
        with self._session.sequenced() as seq:
            read = m.Read(**self._session.header(seq), what=what, field=field, index=index)
            _, payload = self._session.request(read)
        return b"".join(payload)

    def write(self, what: Writable, index: int, data: bytes, field: str = "") -> None:
        """Replace what `read` returns."""
        step = self.settings.bucket_bytes
        chunks = [data[at : at + step] for at in range(0, len(data), step)]
        with self._session.sequenced() as seq:
            write = m.Write(**self._session.header(seq), what=what, field=field, index=index)
            self._session.request(write, *chunks)

    def set_steps(self, steps: NDArray[np.int64]) -> None:
        """Set the step count of every parameter, as after loading a checkpoint."""
        with self._session.sequenced() as seq:
            self._session.request(m.SetSteps(**self._session.header(seq)), steps.tobytes())

    def close(self, *, goodbye: bool = True) -> None:
        """Leave the job. Closing twice is allowed.

        goodbye  True: the others go on without this worker; False: it has failed, and the setting
                 `on_death` says what that means for them
        """
        calls, self._at_close = self._at_close, []
        for call in calls:
            call(goodbye)
        # The hub may have gone first, which is no concern of a worker that leaves.
        with contextlib.suppress(ZpsError), self._session.sequenced() as seq:
            bye = m.Bye(**self._session.header(seq), failed=not goodbye)
            self._session.request(bye, timeout_s=2.0)
        self._session.close()
        self._session.last_words = str
        self._under_way.clear()
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
            self._closed = True

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

    def _declared(self) -> Channel:
        self._session.check_usable()
        if self._channel is None:
            raise NotDeclared(f"rank {self.rank} has to call declare() first")
        return self._channel

    def _collective(self, kind: type[m.Publish] | type[m.Barrier]) -> None:
        with self._session.sequenced() as seq:
            self._session.request(kind(**self._session.header(seq)))

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

    def _buckets_of(self, names: tuple[str, ...]) -> NDArray[np.uint32]:
        """The buckets in which these tensors lie, ascending. Raises UnknownName."""
        channel = self._declared()
        buckets = self._selected.get(names)
        if buckets is None:
            buckets = channel.buckets_of(self._index(name) for name in names)
            if len(self._selected) >= _MAX_SELECTIONS:
                self._selected.clear()
            self._selected[names] = buckets
        return buckets

    def _wait_for_slots(self, buckets: NDArray[np.uint32]) -> None:
        if not all(work.finished for work in self._under_way):
            self._declared().wait_for_slots(buckets)

    def _fill(self, tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> bool:
        """Copy gradients into the slots; whether all are finite."""
        pairs = [(name, self.slot(name), tensors[name]) for name in names]
        for name, slot, tensor in pairs:
            check_like(name, slot, tensor, self.rank)
        return self._all_finite((name, encode(tensor, slot)) for name, slot, tensor in pairs)

    def _inspect(self, names: Sequence[str]) -> bool:
        if self.settings.nonfinite == "allow":
            return True
        return self._all_finite((name, inspect(self.slot(name))) for name in names)

    def _all_finite(self, findings: Iterable[tuple[str, bool]]) -> bool:
        bad = [name for name, finite in findings if not finite]
        if bad and self.settings.nonfinite == "raise":
            raise nonfinite(bad[0], self.rank)
        return not bad or self.settings.nonfinite == "allow"


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
