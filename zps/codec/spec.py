"""What people write in ZPS_COMPRESSION, and which codec that gives each parameter.

    text     = item {";" item}
    item     = codec | pattern "=" codec          a bare codec comes first: it is the default's
    codec    = name [":" option {"," option}]
    option   = key "=" value

A pattern is a case-sensitive glob over parameter names (*, ?, [a-z], [!a-z]); the last that matches
wins. Without a bare codec the default is none. Blanks around any of these do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from typing_extensions import Self

from zps.codec.base import Codec
from zps.codec.none import Plain
from zps.codec.registry import CODECS
from zps.errors import CompressionSyntaxError, ConfigError

__all__ = ["MAX_CHARACTERS", "Compression", "Unmatched"]

MAX_CHARACTERS = 4096

#: Characters that an error shows of a longer text.
_SHOWN = 60

#: What ends a pattern, so that it cannot be in one.
_RESERVED = ";:=,"


@dataclass(frozen=True, slots=True)
class Unmatched:
    """A pattern that is the name of no parameter, and the parameter it may have meant."""

    pattern: str
    nearest: str | None
    """None when there are no parameters at all."""

    def __str__(self) -> str:
        hint = f"; the nearest is {self.nearest!r}" if self.nearest else ""
        return f"the pattern {self.pattern!r} matches no parameter{hint}"


@dataclass(frozen=True, slots=True)
class Compression:
    """A codec for every parameter, by its name.

    default  where no pattern matches
    rules    (pattern, codec), in the order written

    `str()` gives canonical text, which parses to an equal object. Raises ConfigError for a pattern
    that could not be written.
    """

    default: Codec = field(default_factory=Plain)
    rules: tuple[tuple[str, Codec], ...] = ()

    def __post_init__(self) -> None:
        for pattern, _ in self.rules:
            blank = not pattern or pattern != pattern.strip()
            if blank or not pattern.isprintable() or any(c in _RESERVED for c in pattern):
                raise ConfigError(f"{pattern!r} is no pattern over parameter names")

    @classmethod
    def parse(cls, text: str, *, weights: bool = False) -> Self:
        """Read a text in the grammar above.

        weights  it is for weights on their way back, which not every codec suits
        Raises CompressionSyntaxError, which shows the text with a caret under the mistake.
        """
        _check_characters(text)
        default: Codec = Plain()
        rules = []
        for number, item in enumerate(_Span(text, 0, len(text)).split(";")):
            if not item.text:
                raise item.wrong("an item is empty", "a codec, or pattern=codec")
            head, _ = item.partition(":")
            if number == 0 and "=" not in head.text:
                default = _codec(item, weights)
            else:
                rules.append(_rule(item, weights))
        return cls(default, tuple(rules))

    def codec_of(self, name: str) -> Codec:
        """The codec of the parameter `name`: that of the last pattern that matches it."""
        for pattern, codec in reversed(self.rules):
            if fnmatchcase(name, pattern):
                return codec
        return self.default

    def codecs(self) -> tuple[Codec, ...]:
        """Every codec in it, each once, the default first."""
        return tuple(dict.fromkeys((self.default, *(codec for _, codec in self.rules))))

    def unmatched(self, names: Iterable[str]) -> tuple[Unmatched, ...]:
        """The patterns that match none of these parameters: most likely misspelt."""
        names = list(names)
        patterns = dict.fromkeys(pattern for pattern, _ in self.rules)
        return tuple(
            Unmatched(pattern, _nearest(pattern, names))
            for pattern in patterns
            if not any(fnmatchcase(name, pattern) for name in names)
        )

    def __str__(self) -> str:
        return "; ".join([str(self.default), *(f"{p}={codec}" for p, codec in self.rules)])


@dataclass(frozen=True, slots=True)
class _Span:
    """A part of a text that knows where it is; made without the blanks around it."""

    whole: str
    begin: int
    end: int

    @property
    def text(self) -> str:
        return self.whole[self.begin : self.end]

    def part(self, begin: int, end: int) -> _Span:
        """The span of `whole[begin:end]` without blanks; where there is nothing, its end."""
        text = self.whole[begin:end]
        begin += len(text) - len(text.lstrip())
        return _Span(self.whole, begin, begin + len(text.strip()))

    def split(self, separator: str) -> Iterator[_Span]:
        begin = self.begin
        for text in self.text.split(separator):
            yield self.part(begin, begin + len(text))
            begin += len(text) + len(separator)

    def partition(self, separator: str) -> tuple[_Span, _Span | None]:
        """What is before and after the first separator; None after it if there is none."""
        at = self.whole.find(separator, self.begin, self.end)
        if at < 0:
            return self.part(self.begin, self.end), None
        return self.part(self.begin, at), self.part(at + len(separator), self.end)

    def wrong(self, what: str, expected: str, *, behind: bool = False) -> CompressionSyntaxError:
        """The error for this span; `behind`: for what is missing after it."""
        at = self.end if behind else self.begin
        return CompressionSyntaxError(self.whole, at, what, expected)


def _check_characters(text: str) -> None:
    if len(text) > MAX_CHARACTERS:
        shown = text[:_SHOWN] + "..."
        raise CompressionSyntaxError(
            shown,
            len(shown),
            f"a text of {len(text)} characters",
            f"at most {MAX_CHARACTERS}; name several parameters with one pattern",
        )
    for at, character in enumerate(text):
        if not character.isprintable():
            raise CompressionSyntaxError(
                text, at, f"the character {character!r} cannot be printed", "printable characters"
            )


def _rule(item: _Span, weights: bool) -> tuple[str, Codec]:
    pattern, codec = item.partition("=")
    if codec is None or ":" in pattern.text:
        head, _ = item.partition(":")
        what = f"there is no '=' after {head.text!r}"
        if head.text in CODECS:
            what += "; only the first item may be a codec alone"
        raise head.wrong(what, "pattern=codec", behind=True)
    if not pattern.text:
        raise pattern.wrong("there is no pattern before '='", "pattern=codec")
    if "," in pattern.text:
        comma = pattern.begin + pattern.text.index(",")
        raise CompressionSyntaxError(
            item.whole, comma, "a pattern has no ','", "'=', or ';' and another pattern=codec"
        )
    return pattern.text, _codec(codec, weights)


def _codec(span: _Span, weights: bool) -> Codec:
    name, options = span.partition(":")
    known = [codec.name for codec in CODECS.values() if not (weights and codec.unfit_weights)]
    expected = f"a codec: {', '.join(known)}"
    if not name.text:
        raise name.wrong("there is no codec", expected)
    kind = CODECS.get(name.text)
    if kind is None:
        raise name.wrong(f"there is no codec {name.text!r}{_meant(name.text, known)}", expected)
    if weights and kind.unfit_weights:
        raise name.wrong(f"{kind.name} is not for weights: {kind.unfit_weights}", expected)
    return kind() if options is None else kind(**_options(kind, options))


def _options(kind: type[Codec], span: _Span) -> dict[str, Any]:
    known = kind.options()
    expected = f"an option of {kind.name}: {', '.join(known)}"
    if not known:
        expected = f"no ':', as {kind.name} has no options"
    values: dict[str, Any] = {}
    for item in span.split(","):
        key, value = item.partition("=")
        if not key.text:
            raise key.wrong("an option is missing", expected)
        if key.text not in known:
            what = f"{kind.name} has no option {key.text!r}{_meant(key.text, known)}"
            raise key.wrong(what, expected)
        if key.text in values:
            raise key.wrong(f"{key.text!r} is given twice", "each option once")
        option = known[key.text]
        if value is None:
            what = f"there is no '=' after {key.text!r}"
            raise key.wrong(what, f"{key.text}=VALUE, {option.expected}", behind=True)
        try:
            values[key.text] = option.parse(value.text)
        except ValueError:
            what = f"{key.text} cannot be {value.text!r}" if value.text else f"{key.text} is empty"
            raise value.wrong(what, option.expected) from None
    return values


def _meant(text: str, known: Iterable[str]) -> str:
    near = get_close_matches(text.lower(), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _nearest(pattern: str, names: list[str]) -> str | None:
    """The name most like the fixed part of a pattern."""
    fixed = "".join(c for c in pattern if c not in "*?")
    return next(iter(get_close_matches(fixed, names, n=1, cutoff=0.0)), None)
