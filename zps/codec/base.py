"""What every codec has in common: a name, a kernel, checked options, a size known in advance."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeAlias

from zps.errors import ConfigError

__all__ = ["Codec", "Facts", "Option", "block_option", "choice", "flag", "ratio_option", "scales"]

#: (kind, block, flags, reserved, ratio): what a kernel is told, in the order of plan.CODEC.
Facts: TypeAlias = tuple[int, int, int, int, float]

FLAG_EF = 1
FLAG_STOCHASTIC = 2
FLAG_EXACT = 4
FLAG_FP16 = 8

MIN_BLOCK = 16
MAX_BLOCK = 4096

_INTEGER = re.compile(r"[0-9]{1,9}")
_NUMBER = re.compile(r"[0-9]*\.?[0-9]+(e[-+]?[0-9]+)?|[0-9]+\.", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a codec: how it is written, and which values it may have.

    expected  what is allowed, in words: "a power of two from 16 to 4096"
    read      its value in a text; raises ValueError for what is no value of its kind
    holds     whether a value is allowed
    show      the text that `read` turns into the value again
    """

    expected: str
    read: Callable[[str], Any]
    holds: Callable[[Any], bool]
    show: Callable[[Any], str] = str

    def parse(self, text: str) -> Any:
        """The value that `text` stands for. Raises ValueError unless it is allowed."""
        value = self.read(text)
        if not self.holds(value):
            raise ValueError(f"{text} is not {self.expected}")
        return value


@dataclass(frozen=True)
class Codec:
    """One way to encode `n` numbers in a number of bytes that depends on nothing in them.

    name            as people write it
    kind            the kernel's number for it, as in csrc/core/work.h
    unfit_weights   why it is no codec for weights on their way back; "" if it is one

    A subclass is a frozen dataclass whose fields are its options, each made by `flag`, `choice`,
    `block_option` or `ratio_option`. Raises ConfigError for a value that an option does not allow.
    `str(codec)` is what `spec.Compression.parse` makes an equal codec of.
    """

    name: ClassVar[str]
    kind: ClassVar[int]
    unfit_weights: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, option in self.options().items():
            value = getattr(self, name)
            if not option.holds(value):
                raise ConfigError(f"{self.name}: {name}={value!r}: expected {option.expected}")

    @classmethod
    def options(cls) -> dict[str, Option]:
        """The options by name, in the order they are written in."""
        return {entry.name: entry.metadata["option"] for entry in fields(cls)}

    def nbytes(self, n: int, itemsize: int) -> int:
        """Bytes that `n` elements take when encoded, before any padding.

        n         at least 0
        itemsize  bytes of an element as it is: 4, or 2 for a half-precision parameter
        """
        raise NotImplementedError

    @property
    def feedback(self) -> bool:
        """Whether what was lost is kept, in float32, and added to the next gradient."""
        return bool(getattr(self, "ef", False))

    def facts(self) -> Facts:
        """What the kernel is told; 0 for an option that the codec does not have."""
        flags = (
            (FLAG_EF if self.feedback else 0)
            | (FLAG_STOCHASTIC if getattr(self, "rounding", "") == "stochastic" else 0)
            | (FLAG_EXACT if getattr(self, "exact", False) else 0)
            | (FLAG_FP16 if getattr(self, "value", "") == "fp16" else 0)
        )
        return (self.kind, getattr(self, "block", 0), flags, 0, float(getattr(self, "ratio", 0.0)))

    def __str__(self) -> str:
        chosen = ",".join(
            f"{entry.name}={entry.metadata['option'].show(getattr(self, entry.name))}"
            for entry in fields(self)
            if getattr(self, entry.name) != entry.default
        )
        return f"{self.name}:{chosen}" if chosen else self.name


def flag(default: bool) -> Any:
    """A dataclass field that is true or false."""
    return _option(default, Option("true or false", _read_flag, _is_flag, _show_flag))


def choice(*values: str) -> Any:
    """A dataclass field that is one of `values`; the first is its default."""
    return _option(values[0], Option(" or ".join(values), str, lambda value: value in values))


def block_option(default: int) -> Any:
    """A dataclass field: how many elements share one scale."""
    expected = f"a power of two from {MIN_BLOCK} to {MAX_BLOCK}"
    return _option(default, Option(expected, _read_integer, _is_block))


def ratio_option(default: float) -> Any:
    """A dataclass field: the share of elements that travels."""
    expected = "a number above 0, at most 1"
    return _option(default, Option(expected, _read_number, _is_ratio, _show_number))


def scales(n: int, block: int) -> int:
    """Bytes of the float32 scales of `n` elements: one for each block, the last may be short."""
    return 4 * -(-n // block)


def _option(default: Any, option: Option) -> Any:
    return field(default=default, metadata={"option": option})


def _read_flag(text: str) -> bool:
    try:
        return {"true": True, "false": False}[text]
    except KeyError:
        raise ValueError(f"{text} is neither true nor false") from None


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _show_flag(value: bool) -> str:
    return "true" if value else "false"


# int() and float() also take "1_6", " 16 " and the digits of other scripts.
def _read_integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError(f"{text} is not a whole number")
    return int(text)


def _read_number(text: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text} is not a number")
    return float(text)


def _show_number(value: float) -> str:
    return repr(float(value))


def _is_block(value: Any) -> bool:
    return type(value) is int and MIN_BLOCK <= value <= MAX_BLOCK and value & (value - 1) == 0


def _is_ratio(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1
