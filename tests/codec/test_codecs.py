"""Each codec's options and sizes, against the table in docs/compression.md."""

from __future__ import annotations

import dataclasses
import pickle
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zps.codec.base import Codec
from zps.codec.registry import CODECS, codec
from zps.codec.spec import Compression
from zps.errors import ConfigError

SIZES = (0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 63, 64, 65, 255, 256, 257, 4095, 4096, 4097, 100_000)


def any_codec() -> st.SearchStrategy[Codec]:
    return st.sampled_from(sorted(CODECS)).flatmap(with_options)


def with_options(name: str) -> st.SearchStrategy[Codec]:
    values = {
        "block": st.sampled_from([2**p for p in range(4, 13)]),
        "ratio": st.floats(0, 1, exclude_min=True),
        "ef": st.booleans(),
        "exact": st.booleans(),
        "rounding": st.sampled_from(["nearest", "stochastic"]),
        "value": st.sampled_from(["fp32", "fp16"]),
    }
    kind = codec(name)
    return st.builds(kind, **{option: values[option] for option in kind.options()})


def test_the_numbers_and_options_are_those_of_the_format() -> None:
    assert {name: (c.kind, *c.options()) for name, c in CODECS.items()} == {
        "none": (0,),
        "fp16": (1, "ef"),
        "bf16": (2, "ef"),
        "fp8": (3, "block", "ef", "rounding"),
        "int8": (4, "block", "ef", "rounding"),
        "int4": (5, "block", "ef", "rounding"),
        "onebit": (6, "block", "ef"),
        "ternary": (7, "block", "ef", "rounding"),
        "topk": (8, "ratio", "exact", "value", "ef"),
        "randk": (9, "ratio", "ef"),
    }


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("none", (0, 0, 0, 0, 0.0)),
        ("fp16", (1, 0, 0, 0, 0.0)),
        ("bf16:ef=true", (2, 0, 1, 0, 0.0)),
        ("fp8", (3, 256, 1, 0, 0.0)),
        ("int8:ef=false", (4, 256, 0, 0, 0.0)),
        ("int8:rounding=stochastic", (4, 256, 3, 0, 0.0)),
        ("int4", (5, 64, 1, 0, 0.0)),
        ("onebit:block=16", (6, 16, 1, 0, 0.0)),
        ("ternary:rounding=stochastic,ef=false", (7, 256, 2, 0, 0.0)),
        ("topk", (8, 0, 1, 0, 0.01)),
        ("topk:exact=true,value=fp16,ratio=0.5", (8, 0, 13, 0, 0.5)),
        ("randk", (9, 0, 0, 0, 0.01)),
    ],
)
def test_a_kernel_is_told_the_options(text: str, facts: tuple[int, ...]) -> None:
    assert Compression.parse(text).default.facts() == facts


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("block", [16, 64, 256, 4096])
def test_block_codecs_take_a_scale_a_block_and_their_codes(n: int, block: int) -> None:
    scales = 4 * ceil(n / block)
    assert codec("fp8")(block=block).nbytes(n, 4) == scales + n
    assert codec("int8")(block=block).nbytes(n, 4) == scales + n
    assert codec("int4")(block=block).nbytes(n, 4) == scales + ceil(n / 2)
    assert codec("ternary")(block=block).nbytes(n, 4) == scales + ceil(n / 4)
    assert codec("onebit")(block=block).nbytes(n, 4) == scales + ceil(n / 8)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("n", SIZES)
def test_plain_codecs_take_a_multiple(n: int, itemsize: int) -> None:
    assert codec("none")().nbytes(n, itemsize) == n * itemsize
    assert codec("fp16")().nbytes(n, itemsize) == codec("bf16")().nbytes(n, itemsize) == 2 * n


@pytest.mark.parametrize(
    ("n", "ratio", "k"),
    [
        (0, 0.01, 0),
        (1, 0.01, 1),
        (99, 0.01, 1),
        (100, 0.01, 1),
        (101, 0.01, 2),
        (5, 1, 5),
        (3, 1e-300, 1),
        (4097, 0.5, 2049),
    ],
)
def test_sparse_codecs_keep_a_share_and_one_element_at_least(n: int, ratio: float, k: int) -> None:
    offsets, indices = 4 * (ceil(n / 4096) + 1), 4 * ceil(2 * k / 4)
    assert codec("topk")(ratio=ratio).nbytes(n, 4) == offsets + indices + 4 * k
    assert codec("topk")(ratio=ratio, value="fp16").nbytes(n, 4) == offsets + indices + 2 * k
    assert codec("randk")(ratio=ratio).nbytes(n, 4) == 8 + 4 * k


@given(any_codec(), st.integers(0, 20_000))
def test_a_size_only_grows_with_the_elements(one: Codec, n: int) -> None:
    assert 0 <= one.nbytes(n, 4) <= one.nbytes(n + 1, 4)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("int8", "block", 8),
        ("int8", "block", 100),
        ("int8", "block", 8192),
        ("int8", "block", 256.0),
        ("int8", "block", True),
        ("topk", "ratio", 0.0),
        ("topk", "ratio", 1.5),
        ("topk", "ratio", float("nan")),
        ("topk", "ratio", True),
        ("topk", "value", "fp8"),
        ("int4", "ef", 1),
        ("int4", "rounding", "up"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused(name: str, option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name}: {option}=.*expected"):
        codec(name)(**{option: value})


def test_codecs_are_values() -> None:
    one = codec("int8")(block=64)
    assert one == codec("int8")(block=64) != codec("int8")()
    assert codec("int8")() != codec("fp8")()
    assert len({one, codec("int8")(block=64)}) == 1
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.block = 16  # type: ignore[attr-defined]


def test_an_unknown_codec_is_named_beside_the_known() -> None:
    with pytest.raises(ConfigError, match="no codec 'zip'; the codecs are none, fp16"):
        codec("zip")
