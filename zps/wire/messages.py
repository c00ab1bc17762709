"""Every message between hub and worker, and the one way to and from bytes.

A message is one header frame, MessagePack, followed by raw payload frames. `decode` rejects what
is too large, too long, repeated or unknown before it costs memory, and then validates the types.
Nothing is ever pickled.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, TypeVar

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zps.core.rounds import MAX_ROUND
from zps.errors import ProtocolError
from zps.memory.control import MAX_SEQ
from zps.wire.packing import unpack

PROTOCOL = 1
MAX_HEADER_BYTES = 4096
MAX_PROBE_BYTES = 1 << 20
MAX_PUSH_BUCKETS = 256  # keeps the header of a PUSH under its limit; longer pushes are cut
_MAX_ITEMS = 512
_MAX_CONTAINERS = 64
_MAX_TEXT = 700  # a header holds 4 KiB, and a character up to 4 bytes

#: Settings that a hub and its workers must agree on; the hub's count where a worker set none.
SHARED_SETTINGS = (
    *("mode", "staleness", "quorum", "staleness_policy", "staleness_alpha", "dc_lambda"),
    *("bucket_bytes", "compression", "pull_compression", "compression_min_bytes"),
    *("world_size", "on_death"),
)

U32 = Annotated[int, Field(ge=0, lt=1 << 32)]
U64 = Annotated[int, Field(ge=0, lt=1 << 63)]
Seq = Annotated[int, Field(ge=0, lt=MAX_SEQ)]
Round = Annotated[int, Field(ge=0, lt=MAX_ROUND)]  # a newcomer's first round lies beyond it
Pid = Annotated[int, Field(ge=1, lt=1 << 31)]  # what the system calls take
World = Annotated[int, Field(ge=1, le=1 << 16)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(allow_inf_nan=False, ge=0)]
Setting = str | int | Finite | None
Name = Annotated[str, Field(max_length=256)]
Text = Annotated[str, Field(max_length=3000)]


class Message(BaseModel):
    """Base of every message: strict types, no unknown fields, immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    tag: ClassVar[str]


class Probe(Message):
    """How fast is the way to a hub that nobody works with? Payload: any bytes, or none.

    Answered with PROBED, without a hello and without effect; refused once a worker has joined.
    """

    tag: ClassVar[str] = "probe"
    seq: Seq
    back: Annotated[int, Field(ge=0, le=MAX_PROBE_BYTES)]  # bytes of payload in the answer


class Sessioned(Message):
    """What a worker sends once it has been welcomed: refused when epoch or session is old."""

    epoch: U64
    session: U64
    seq: Seq


# --- worker to hub ----------------------------------------------------------------------------


class Hello(Message):
    tag: ClassVar[str] = "hello"
    protocol: U32
    job: Name
    rank: U32 | None
    world_size: World | None
    incarnation: Name
    host: Name  # boot id and PID namespace: equal on both sides means shared memory is possible
    pid: Pid
    settings: dict[Name, Setting]  # those set explicitly; they must agree


class Declare(Sessioned):
    """Payload: the layout, then the hyperparameters; of several hubs' first, then the whole layout.

    hub, hubs  this hub is number `hub`, from 0, of `hubs` that the sender works with
    """

    tag: ClassVar[str] = "declare"
    layout_hash: Name
    rule: Name
    shared: bool = True  # this worker can map the hub's memory
    hub: U32 = 0
    hubs: U32 = 1


class Enter(Sessioned):
    """A newcomer of a job over several hubs: all of them let it in at the same round.

    Answered with ATTACH once the rounds before have closed.
    """

    tag: ClassVar[str] = "enter"
    round: Round


class Publish(Sessioned):
    """Collective: once every worker has sent it, rank 0's values are the weights of all."""

    tag: ClassVar[str] = "publish"


class Push(Sessioned):
    """Buckets of one round, ready in the sender's slots.

    Payload, each present when its flag says so: hyperparameters; indices of absent parameters; one
    frame for each bucket. Without `inline`, a hub that cannot see the slots asks with FETCH.
    """

    tag: ClassVar[str] = "push"
    round: Round
    buckets: list[U32]
    bases: list[U64]  # version of each bucket that the gradient was computed on
    samples: Finite  # weight of this worker in the mean; 0 leaves it out
    grad_scale: Finite  # what the loss was multiplied by
    finite: bool
    hold: bool  # apply nothing of this round before all of it is known to be finite
    hypers: bool
    absent: bool
    inline: bool = False


def in_range(weight: float) -> bool:
    """Whether `samples`, `grad_scale` or their ratio is one that the kernels, which compute in
    float32, can weight and divide by."""
    return 1e-30 <= weight <= 1e30


class Data(Sessioned):
    """Answer to a FETCH. Payload: one bucket of the push `push`, in one frame or several."""

    tag: ClassVar[str] = "data"
    push: Seq
    bucket: U32


class Pull(Sessioned):
    """Ask for the weights of buckets: a WEIGHTS for each, then OK."""

    tag: ClassVar[str] = "pull"
    buckets: list[U32]
    whole: bool  # the values themselves: nothing is known of what the worker holds


class Verdict(Sessioned):
    """What the PARTIALs of all hubs about a round come to. The first one counts; no answer."""

    tag: ClassVar[str] = "verdict"
    round: Round
    norm_sq: NotNegative
    finite: bool


class Read(Sessioned):
    """Ask for the bytes of a state of one bucket, or of a rule's own state of one parameter.

    `steps` are the int64 step counts of all pieces.
    """

    tag: ClassVar[str] = "read"
    what: Literal["state", "weights", "foreign", "extra", "steps"]
    field: Name
    index: U32


class Write(Sessioned):
    """Payload: the bytes that replace what `Read` would return.

    `published` and `extra` are bytes of the weights arena, which count from the next PUBLISH on.
    """

    tag: ClassVar[str] = "write"
    what: Literal["state", "foreign", "published", "extra"]
    field: Name
    index: U32


class SetSteps(Sessioned):
    """Payload: int64 step count of every parameter."""

    tag: ClassVar[str] = "set_steps"


class Barrier(Sessioned):
    tag: ClassVar[str] = "barrier"


class Stats(Sessioned):
    tag: ClassVar[str] = "stats"


class Bye(Sessioned):
    tag: ClassVar[str] = "bye"
    failed: bool  # the worker ends by an error: to the job it has died


# --- hub to worker ----------------------------------------------------------------------------


class SegmentAt(Message):
    tag: ClassVar[str] = "segment"
    pid: Pid
    fd: U32
    nbytes: U64


class Welcome(Message):
    tag: ClassVar[str] = "welcome"
    protocol: U32
    epoch: U64
    session: U64
    rank: U32
    world_size: U32
    pid: Pid
    host: Name
    settings: dict[Name, Setting]


class Probed(Message):
    """Answer to the probe `seq`. Payload: as many bytes as it asked for, if any."""

    tag: ClassVar[str] = "probed"
    seq: Seq
    host: Name


class Attach(Message):
    """The layout is accepted: where weights, slots, control and bell lie, and the first round.

    Without memory to share the worker keeps its own, and everything travels in messages.
    """

    tag: ClassVar[str] = "attach"
    seq: Seq
    control: SegmentAt | None
    weights: SegmentAt | None
    slots: SegmentAt | None
    bell: SegmentAt | None
    doorway: U32 | None  # descriptor of a pipe, in the process of the bell
    first_round: U64
    formed: bool  # the job runs already: take its weights instead of publishing


class Ok(Message):
    """Answer to the request `seq`; payload as the request says."""

    tag: ClassVar[str] = "ok"
    seq: Seq


class Fetch(Message):
    """The hub has room for these buckets of the push `push`: answer each with DATA."""

    tag: ClassVar[str] = "fetch"
    push: Seq
    buckets: list[U32]


class Consumed(Message):
    """What became of buckets of the push `push`, where weights are only sent to who asks."""

    tag: ClassVar[str] = "consumed"
    push: Seq
    buckets: list[U32]
    outcomes: list[U32]


class Weights(Message):
    """A bucket as it is now, to those who pushed it in step with all others, or asked for it.

    Payload: int64 step counts of its pieces, then its bytes in one frame or several.
    """

    tag: ClassVar[str] = "weights"
    bucket: U32
    version: U64
    closed: U64  # 1 + the highest round of the bucket that has closed
    push: Seq | None  # the push that has been consumed by this; None: only asked for
    outcome: U32
    coded: bool  # the difference from what was sent before, in the codecs of the way back
    over: U64 = 0  # `closed` of the bucket that is furthest behind


class Partial(Message):
    """A round is on hold at this hub, one of several: what it knows, for a VERDICT of the worker.

    norm_sq  sum of squares of its part of the averaged gradient; 0 if none was asked for
    """

    tag: ClassVar[str] = "partial"
    round: Round
    norm_sq: NotNegative
    finite: bool


class Refuse(Message):
    """Answer to the request `seq`, or to anything from a stranger; nothing was changed."""

    tag: ClassVar[str] = "refuse"
    seq: Seq | None
    code: Name
    text: Text


class Closing(Message):
    """The hub is ending this job for everyone."""

    tag: ClassVar[str] = "closing"
    text: Text


_MODELS: dict[str, type[Message]] = {
    model.tag: model
    for model in (
        *(Hello, Declare, Enter, Publish, Push, Data, Verdict, Pull, Read, Write, SetSteps),
        *(Barrier, Stats, Bye, Probe),
        *(Probed, Welcome, Attach, Fetch, Consumed, Weights, Partial, Ok, Refuse, Closing),
    )
}

M = TypeVar("M", bound=Message)


def cut(text: str) -> str:
    """As much of a text as a header has room for, whatever its characters."""
    return text[:_MAX_TEXT]


def encode(message: Message) -> bytes:
    """The header frame of a message; raises ProtocolError when it would be over the limit."""
    # The fields as they are: `model_dump` would copy them first. A message inside is a map too.
    data: bytes = msgpack.packb({**vars(message), "t": message.tag}, default=vars)
    if len(data) > MAX_HEADER_BYTES:
        raise ProtocolError(
            f"a {message.tag} header of {len(data)} bytes is over the limit of {MAX_HEADER_BYTES}"
        )
    return data


def decode(frame: bytes | memoryview) -> Message:
    """The message in a header frame. Raises ProtocolError for anything but a well-formed one."""
    if len(frame) > MAX_HEADER_BYTES:
        raise ProtocolError(f"header of {len(frame)} bytes; the limit is {MAX_HEADER_BYTES}")
    fields = unpack(frame, max_items=_MAX_ITEMS, max_containers=_MAX_CONTAINERS)
    if not isinstance(fields, dict):
        raise ProtocolError("header is not a map")
    tag = fields.pop("t", None)
    model = _MODELS.get(tag) if isinstance(tag, str) else None
    if model is None:
        raise ProtocolError(f"unknown message {tag!r:.80}; is the other side of another version?")
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ProtocolError(f"{tag} message: {where}: {first['msg']}") from None
