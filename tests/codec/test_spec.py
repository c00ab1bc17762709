"""The grammar of compression: what it means, and where a mistake is said to be."""

from __future__ import annotations

import pickle
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.codec.test_codecs import any_codec
from zps.codec.fp16 import Fp16
from zps.codec.int8 import Int8
from zps.codec.none import Plain
from zps.codec.onebit import OneBit
from zps.codec.registry import CODECS
from zps.codec.spec import Compression, Unmatched
from zps.codec.topk import TopK
from zps.errors import CompressionSyntaxError, ConfigError

parse = Compression.parse


@pytest.mark.parametrize(
    ("text", "default", "rules"),
    [
        ("none", Plain(), ()),
        ("int8", Int8(), ()),
        ("int8:block=64,ef=false", Int8(block=64, ef=False), ()),
        ("int8:ef=false,block=64", Int8(block=64, ef=False), ()),
        ("*.bias=fp16", Plain(), (("*.bias", Fp16()),)),
        ("int8; *.bias=none", Int8(), (("*.bias", Plain()),)),
        (
            "int8:block=256;*.bias=none;embed.*=topk:ratio=1e-2,ef=true",
            Int8(),
            (("*.bias", Plain()), ("embed.*", TopK())),
        ),
        (
            "  int8 : block = 64 , ef = false ; a* = onebit : block=16 ",
            Int8(block=64, ef=False),
            (("a*", OneBit(block=16)),),
        ),
        ("two words.[!0-9]=int8", Plain(), (("two words.[!0-9]", Int8()),)),
        ("topk:ratio=1", TopK(ratio=1.0), ()),
        ("topk:ratio=.5", TopK(ratio=0.5), ()),
        ("int8=none", Plain(), (("int8", Plain()),)),
    ],
)
def test_a_text_means_codecs(text: str, default: object, rules: object) -> None:
    compression = parse(text)
    assert (compression.default, compression.rules) == (default, rules)


# Where the caret stands, beside the text; "expected" and what is wrong, each in part.
BAD = [
    ("", "^", "empty", "a codec, or pattern=codec"),
    ("   ", "   ^", "empty", "a codec"),
    ("int9", "^", "'int9'; did you mean 'int8'?", "none, fp16, bf16, fp8, int8, int4, onebit"),
    ("INT8", "^", "did you mean 'int8'?", "a codec"),
    ("fc.weight", "^", "no codec 'fc.weight'", "a codec"),
    ("int8; fp8", "         ^", "'fp8'; only the first item", "pattern=codec"),
    ("int8; fp8:block=64", "         ^", "'fp8'; only the first item", "pattern=codec"),
    ("int8; *.bias", "            ^", "no '=' after '*.bias'", "pattern=codec"),
    ("int8; *.bias =", "              ^", "there is no codec", "a codec"),
    ("int8; =none", "      ^", "no pattern", "pattern=codec"),
    ("int8;", "     ^", "an item is empty", "pattern=codec"),
    ("int8;;a=none", "     ^", "an item is empty", "pattern=codec"),
    (";int8", "^", "an item is empty", "a codec"),
    ("int8; a,b=none", "       ^", "a pattern has no ','", "';'"),
    ("a==int8", "  ^", "no codec '=int8'", "a codec"),
    ("int8:", "     ^", "an option is missing", "block, ef, rounding"),
    ("int8: ; a=none", "     ^", "an option is missing", "block, ef, rounding"),
    ("int8:block=64,", "              ^", "an option is missing", "block, ef, rounding"),
    (":block=64", "^", "there is no codec", "a codec"),
    ("int8:blok=64", "     ^", "'blok'; did you mean 'block'?", "block, ef, rounding"),
    ("int8:ratio=0.1", "     ^", "no option 'ratio'", "block, ef, rounding"),
    ("int8:block", "          ^", "no '=' after 'block'", "a power of two"),
    ("int8:block=", "           ^", "block is empty", "a power of two"),
    ("int8:=64", "     ^", "an option is missing", "block"),
    ("int8:ef=true, ef=true", "              ^", "'ef' is given twice", "once"),
    ("none:ef=true", "     ^", "none has no option 'ef'", "none has no options"),
    ("none:", "     ^", "an option is missing", "none has no options"),
    ("int8:block=100", "           ^", "'100'", "a power of two from 16 to 4096"),
    ("int8:block=8", "           ^", "'8'", "a power of two from 16 to 4096"),
    ("int8:block=8192", "           ^", "'8192'", "a power of two from 16 to 4096"),
    ("int8:block=-64", "           ^", "'-64'", "a power of two"),
    ("int8:block=6_4", "           ^", "'6_4'", "a power of two"),
    ("int8:block=٦٤", "           ^", "'٦٤'", "a power of two"),
    ("int8:block=64:ef=true", "           ^", "'64:ef=true'", "a power of two"),
    ("int8:ef=maybe", "        ^", "ef cannot be 'maybe'", "true or false"),
    ("int8:ef=True", "        ^", "ef cannot be 'True'", "true or false"),
    ("int8:rounding=up", "              ^", "rounding cannot be 'up'", "nearest or stochastic"),
    ("topk:ratio=0", "           ^", "ratio cannot be '0'", "above 0, at most 1"),
    ("topk:ratio=1.01", "           ^", "'1.01'", "above 0, at most 1"),
    ("topk:ratio=-0.1", "           ^", "'-0.1'", "above 0, at most 1"),
    ("topk:ratio=nan", "           ^", "'nan'", "above 0, at most 1"),
    ("topk:ratio=inf", "           ^", "'inf'", "above 0, at most 1"),
    ("topk:ratio=1e-999", "           ^", "'1e-999'", "above 0, at most 1"),
    ("topk:ratio=0.1_0", "           ^", "'0.1_0'", "above 0, at most 1"),
    ("topk:value=fp8", "           ^", "'fp8'", "fp32 or fp16"),
    ("int8;\ta=none", "     ^", r"'\t' cannot be printed", "printable"),
    ("int8\n", "    ^", r"'\n' cannot be printed", "printable"),
    ("a\x00=int8", " ^", r"'\x00' cannot be printed", "printable"),
    ("a\u202e=int8", " ^", r"'\u202e' cannot be printed", "printable"),
]


@pytest.mark.parametrize(("text", "caret", "what", "expected"), BAD)
def test_a_mistake_is_shown_with_a_caret_under_it(
    text: str, caret: str, what: str, expected: str
) -> None:
    with pytest.raises(CompressionSyntaxError) as caught:
        parse(text)
    error = caught.value
    assert (error.text, error.position) == (text, len(caret) - 1)
    assert what in error.what
    assert expected in error.expected
    first, shown, pointer, last = str(error).split("\n")
    assert first == error.what
    assert len(shown) == 4 + len(text)
    assert pointer == "    " + caret
    assert last == f"expected {error.expected}"
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)


def test_a_text_is_at_most_4096_characters() -> None:
    longest = "int8; " + "x" * (4096 - 6 - 7) + "=onebit"
    assert len(longest) == 4096
    assert isinstance(parse(longest).rules[0][1], OneBit)
    with pytest.raises(CompressionSyntaxError, match="4097 characters") as caught:
        parse(longest + " ")
    assert len(str(caught.value)) < 400, "an error must not be as long as what it complains about"


@given(st.text(st.characters() | st.sampled_from(";:=,*i8n ")))
def test_any_text_parses_or_is_a_syntax_error(text: str) -> None:
    position = None
    try:
        parse(text)
    except CompressionSyntaxError as error:
        position = error.position
    assert position is None or 0 <= position <= len(text)


PATTERN = (
    st.text(st.sampled_from(string.ascii_letters + string.digits + "._-*?[]! é"), min_size=1)
    .map(str.strip)
    .filter(bool)
)


@given(st.builds(Compression, any_codec(), st.lists(st.tuples(PATTERN, any_codec())).map(tuple)))
def test_canonical_text_parses_to_an_equal_object(compression: Compression) -> None:
    if len(str(compression)) <= 4096:
        again = parse(str(compression))
        assert again == compression
        assert str(again) == str(compression)


def test_canonical_text_names_what_differs_from_the_defaults() -> None:
    text = " a*=topk : ratio = 0.01, ef=true;b=int8:ef=false,block=64;c=topk:ratio=1e-5 "
    assert str(parse(text)) == "none; a*=topk; b=int8:block=64,ef=false; c=topk:ratio=1e-05"


@pytest.mark.parametrize("pattern", ["", " a", "a ", "a;b", "a=b", "a:b", "a,b", "a\n"])
def test_a_pattern_that_could_not_be_written_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="no pattern"):
        Compression(rules=((pattern, Plain()),))


# Patterns


def test_the_last_pattern_that_matches_wins() -> None:
    compression = parse("int8; *.bias=none; head.*=fp16; head.bias=onebit")
    assert compression.codec_of("body.weight") == Int8()
    assert compression.codec_of("body.bias") == Plain()
    assert compression.codec_of("head.weight") == Fp16()
    assert compression.codec_of("head.bias") == OneBit()
    assert parse("head.bias=onebit; head.*=fp16").codec_of("head.bias") == Fp16()


def test_patterns_are_globs_over_whole_names_and_know_case() -> None:
    assert parse("weight=int8").codec_of("fc.weight") == Plain()
    assert parse("FC*=int8").codec_of("fc.weight") == Plain()
    assert parse("layer?.w=int8").codec_of("layer3.w") == Int8()
    assert parse("layer?.w=int8").codec_of("layer13.w") == Plain()
    assert parse("layer[0-3].w=int8").codec_of("layer3.w") == Int8()
    assert parse("layer[!0-3].w=int8").codec_of("layer3.w") == Plain()
    assert parse("a.b=int8").codec_of("axb") == Plain()


def test_every_codec_in_use_is_named_once() -> None:
    assert parse("int8; a=fp16; b=int8; c=none").codecs() == (Int8(), Fp16(), Plain())


def test_a_pattern_that_matches_nothing_is_told_with_the_nearest_name() -> None:
    names = ["encoder.embed.weight", "encoder.fc.weight", "encoder.fc.bias"]
    compression = parse("int8; *.bias=none; encodr.embed.*=topk; *.wieght=fp16; *.wieght=int8")
    assert compression.unmatched(names) == (
        Unmatched("encodr.embed.*", "encoder.embed.weight"),
        Unmatched("*.wieght", "encoder.fc.weight"),
    )
    assert compression.unmatched([]) == tuple(
        Unmatched(pattern, None) for pattern in ("*.bias", "encodr.embed.*", "*.wieght")
    )
    assert parse("int8").unmatched(names) == ()


# Weights


@pytest.mark.parametrize("name", CODECS)
def test_some_codecs_are_not_for_weights(name: str) -> None:
    text = f"bf16; *.bias={name}"
    if name in {"none", "fp16", "bf16", "fp8", "int8", "int4"}:
        assert parse(text, weights=True) == parse(text)
        return
    with pytest.raises(CompressionSyntaxError, match=f"{name} is not for weights: ") as caught:
        parse(text, weights=True)
    assert caught.value.position == len("bf16; *.bias=")
    assert caught.value.expected == "a codec: none, fp16, bf16, fp8, int8, int4"
