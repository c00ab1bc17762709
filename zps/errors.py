"""Every error zps raises on purpose.

    ZpsError
    ├── ConfigError (ValueError)              a setting is misspelt or invalid
    │   └── CompressionSyntaxError            a codec, an option or a pattern, with a caret under it
    ├── LayoutError (ValueError)              a model's list of parameters
    │   ├── LayoutMismatch                    another model on another rank
    │   ├── UnknownName                       no such parameter
    │   ├── DuplicateName                     one name, two parameters
    │   └── TensorMismatch                    wrong shape or dtype
    ├── GradientError (ValueError)            what a training loop did to its tensors
    │   ├── NonFiniteGradient                 NaN or infinity in a gradient
    │   ├── GradientModified                  changed after it left
    │   └── WeightsModified                   written by a worker, without publish()
    ├── ProtocolError (ConnectionError)       a bad peer or a bad message
    │   └── Rejected                          the hub refused; .code says why
    │       ├── DuplicateRank                 two workers claim one rank
    │       ├── RankOutOfRange                rank >= world size
    │       └── SessionLost                   the hub has given this worker up
    ├── HubError (ConnectionError)            the way to the hub
    │   ├── HubUnreachable                    it never answered
    │   └── HubLost                           it answered once, and is gone
    ├── WaitTimeout (TimeoutError)            the others did not come in time
    ├── UsageError (RuntimeError)             a call at the wrong moment
    │   ├── Closed                            after shutdown
    │   ├── ForkedProcess                     in a forked child
    │   └── NotDeclared                       before declare()
    ├── OutOfMemory (MemoryError)             a segment does not fit
    └── UnsupportedError (NotImplementedError)   a known thing zps does not do

Each is also the built-in error that fits it, so `except TimeoutError` works without importing zps.
A message says what was expected, what came, from whom, and what to do. An impossible state is an
`AssertionError`, and none of these.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "Closed",
    "CompressionSyntaxError",
    "ConfigError",
    "DuplicateName",
    "DuplicateRank",
    "ForkedProcess",
    "GradientError",
    "GradientModified",
    "HubError",
    "HubLost",
    "HubUnreachable",
    "LayoutError",
    "LayoutMismatch",
    "NonFiniteGradient",
    "NotDeclared",
    "OutOfMemory",
    "ProtocolError",
    "RankOutOfRange",
    "Rejected",
    "SessionLost",
    "TensorMismatch",
    "UnknownName",
    "UnsupportedError",
    "UsageError",
    "WaitTimeout",
    "WeightsModified",
    "ZpsError",
]


class ZpsError(Exception):
    """The root: catch it to catch everything zps raises on purpose."""


class ConfigError(ZpsError, ValueError):
    """A setting is misspelt, out of range, or contradicts another.

    The message names the argument, variable or file it came from. `zps config` prints every
    setting with its value and source.
    """


class CompressionSyntaxError(ConfigError):
    """A text such as `int8:block=256; *.bias=none` that is not in the grammar of compression.

    text      the whole text; of one that is too long, the beginning
    position  index in `text` of the character that is wrong, len(text) for a missing one
    what      what is wrong there
    expected  what would be right there: the codecs, a codec's options, the values of an option

    The message shows the text with a caret under that character. docs/compression.md has the
    grammar.
    """

    def __init__(self, text: str, position: int, what: str, expected: str) -> None:
        super().__init__(text, position, what, expected)
        self.text = text
        self.position = position
        self.what = what
        self.expected = expected

    def __str__(self) -> str:
        # One column a character, so that the caret is under the right one.
        shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in self.text)
        caret = " " * self.position + "^"
        return f"{self.what}\n    {shown}\n    {caret}\nexpected {self.expected}"


class LayoutError(ZpsError, ValueError):
    """Something is wrong with the list of parameters: their names, shapes, dtypes or order."""


class LayoutMismatch(LayoutError):
    """Two ranks declared different models; the message names the first parameter that differs.

    Build the same model, with the same options, in every worker.
    """


class UnknownName(LayoutError):
    """A name that was never declared. Look for a typing mistake, or declare it first."""


class DuplicateName(LayoutError):
    """One name was declared for two tensors. Declare a tied weight once, under one name."""


class TensorMismatch(LayoutError):
    """A tensor's shape or dtype is not what was declared, or not one zps can train.

    Pass a tensor like the declared one; cast parameters of other dtypes to float32.
    """


class GradientError(ZpsError, ValueError):
    """A gradient or a weight is not in the state that a push needs."""


class NonFiniteGradient(GradientError):
    """A gradient holds NaN or infinity; it was refused before it left, so nothing was changed.

    Lower the learning rate, scale the loss, or choose ZPS_NONFINITE=skip or allow.
    """


class GradientModified(GradientError):
    """A gradient was changed in place after it had left for the hub, so the change would be lost.

    Clip with `max_grad_norm=`, or pass `overlap=False` so that gradients leave in `step()`.
    """


class WeightsModified(GradientError):
    """A worker wrote into weights that the hub owns, for example through `load_state_dict`.

    Call `opt.publish()` on every rank to make rank 0's values the new truth.
    """


class ProtocolError(ZpsError, ConnectionError):
    """A peer sent something that is not a valid message, or not valid now.

    Look for another version of zps, or another program, at the other end.
    """


class Rejected(ProtocolError):
    """The hub refused a request.

    code  the hub's short reason, for programs: "layout_mismatch", "duplicate_rank", ...
    """

    default_code: ClassVar[str] = "rejected"

    def __init__(self, text: str = "", code: str | None = None) -> None:
        super().__init__(text)
        self.code = self.default_code if code is None else code


class DuplicateRank(Rejected):
    """Another live worker has this rank. Give every worker its own ZPS_RANK."""

    default_code = "duplicate_rank"


class RankOutOfRange(Rejected):
    """This rank is not below the job's world size. Make ZPS_WORLD_SIZE agree everywhere."""

    default_code = "rank_out_of_range"


class SessionLost(Rejected):
    """The hub has taken this worker for dead, or is itself a new one that does not know it.

    Nothing this worker sends has an effect any more: end it, or call `zps.init()` again to rejoin.
    """

    default_code = "session_lost"


class HubError(ZpsError, ConnectionError):
    """There is no way to the hub."""


class HubUnreachable(HubError):
    """No hub answered at the address within the connect timeout. Check ZPS_HUB; start the hub."""


class HubLost(HubError):
    """The hub has died or fallen silent in the middle of the job.

    Restart it, from its last checkpoint if there is one, and start the workers again.
    """


class WaitTimeout(ZpsError, TimeoutError):
    """A wait ended before what it waited for; the message names the ranks that are missing.

    Look at those workers first; raise ZPS_TIMEOUT_S only if they are merely slow.
    """


class UsageError(ZpsError, RuntimeError):
    """A call at a moment, or from a process, that it does not belong to."""


class Closed(UsageError):
    """The object was used after `close()` or `zps.shutdown()`. Make a new one."""


class ForkedProcess(UsageError):
    """The object was made before a fork, and its threads and sockets did not come along.

    Call `zps.init()` in the child, or start processes with "spawn".
    """


class NotDeclared(UsageError):
    """Something was pushed or pulled before the layout was declared. Call `declare()` first."""


class OutOfMemory(ZpsError, MemoryError):
    """A shared segment does not fit; the message says how many bytes were asked for, and where.

    Free memory, raise the container's limit, or make the model smaller.
    """


class UnsupportedError(ZpsError, NotImplementedError):
    """zps knows what is meant and does not do it; the message names what it does instead."""
