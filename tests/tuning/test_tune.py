"""`zps.tune`, its table and its picture."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import zps
from tests.tuning.numpy_runner import NumpyRunner
from zps.config import Settings
from zps.errors import CompressionSyntaxError, LayoutError, UnknownName
from zps.tuning.show import plot, table
from zps.tuning.tune import Report

CANDIDATES = ("fp16", "int8", "onebit")


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Linear(40, 5))


def tune(one: torch.nn.Module, gradients: Any = None, **options: Any) -> Report:
    defaults = {"candidates": CANDIDATES, "runner": NumpyRunner()}
    settings = Settings(compression_min_bytes=0)
    return zps.tune(one, gradients, settings=settings, **{**defaults, **options})


def steps(one: torch.nn.Module, count: int) -> list[dict[str, torch.Tensor]]:
    return [
        {name: torch.randn_like(param) for name, param in one.named_parameters()}
        for _ in range(count)
    ]


def report() -> Report:
    one = model()
    return tune(one, steps(one, 4), bandwidth="1Mbit/s")


def test_the_smallest_that_is_good_enough_is_advised_for_a_slow_link() -> None:
    found = report()
    assert [row.measured.compression for row in found.rows] == ["none", *CANDIDATES]
    assert found.advice.compression == "int8"
    assert found.rows[0].measured.elements == 30 * 40 + 40 + 40 * 5 + 5


def test_the_gradients_that_a_model_holds_are_enough() -> None:
    one = model()
    one(torch.randn(8, 30)).square().sum().backward()
    before = [param.grad.clone() for param in one.parameters()]
    assert tune(one).rows[0].measured.total_error == 0.0
    assert all(torch.equal(p.grad, b) for p, b in zip(one.parameters(), before, strict=True))


def test_what_is_no_gradient_of_the_model_is_refused() -> None:
    one = model()
    with pytest.raises(LayoutError, match="run backward first"):
        tune(one)
    with pytest.raises(UnknownName, match="'0.wight'"):
        tune(one, [{"0.wight": torch.zeros(40, 30)}])
    with pytest.raises(LayoutError, match="shapes"):
        tune(one, [{"0.weight": torch.zeros(3)}])
    with pytest.raises(CompressionSyntaxError, match="int9"):
        tune(one, steps(one, 1), candidates=["int9"])


def test_candidates_that_mean_the_same_are_measured_once() -> None:
    one = model()
    found = tune(one, steps(one, 1), candidates=["int8", " int8:block=256 ", "none"])
    assert [row.measured.compression for row in found.rows] == ["none", "int8"]


def test_a_report_is_json_for_programs() -> None:
    found = json.loads(report().to_json(), parse_constant=lambda name: pytest.fail(name))
    assert found["advice"]["compression"] == "int8"
    assert found["bandwidth"] == 125_000
    assert {row["compression"] for row in found["measured"]} == {"none", *CANDIDATES}
    assert found["measured"][2]["bytes_per_parameter"] == pytest.approx(1, abs=0.2)


def test_a_table_has_a_line_for_each() -> None:
    console = Console(width=160, file=io.StringIO())
    console.print(table(report()))
    text = console.file.getvalue()
    assert "a round of 1 worker over 1 Mbit/s" in text
    for name in ("none", *CANDIDATES):
        assert f"│ {name} " in text


@pytest.mark.parametrize("ending", ["png", "svg"])
@pytest.mark.parametrize("bandwidth", [None, "1Mbit/s"])
def test_a_picture_is_saved(tmp_path: Path, ending: str, bandwidth: str | None) -> None:
    pytest.importorskip("matplotlib")
    one = model()
    path = tmp_path / f"picture.{ending}"
    plot(tune(one, steps(one, 2), bandwidth=bandwidth), path)
    assert path.stat().st_size > 5000
    if ending == "svg":
        assert "<svg" in path.read_text()


def test_the_kernels_lose_what_the_formats_say() -> None:
    one = model()
    given = steps(one, 4)
    ours, theirs = (tune(one, given, **options) for options in ({}, {"runner": None}))
    for a, b in zip(ours.rows, theirs.rows, strict=True):
        assert a.measured.error == pytest.approx(b.measured.error, rel=1e-3, abs=1e-9)
        assert a.measured.total_error == pytest.approx(b.measured.total_error, rel=1e-2, abs=1e-9)
