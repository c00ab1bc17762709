"""The suite between two hosts, at sizes that take no time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bench import harness, netns, wire
from bench.options import read
from bench.out import Out
from bench.peers import encoded, problem, remote
from bench.peers import team as teams_of
from bench.peers.base import BenchError, Seat
from bench.peers.remote import Remote, RemoteInt8, RemoteOnebit, Unsupported
from bench.peers.zps_round import Zps, ZpsTcp, start_hub

SIZE = 100_000


class Loopback(Remote):
    """A participant that needs no other host."""


def skip_unless_possible() -> None:
    if reason := Zps.available() or netns.unavailable():
        pytest.skip(reason)


# --- the formula ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "nbytes"), [("none", 2052), ("fp16", 1026), ("int8", 525), ("onebit", 77)]
)
def test_a_piece_takes_what_its_codec_says(codec: str, nbytes: int) -> None:
    assert encoded.encoded_bytes(codec, 513) == nbytes


def test_the_bytes_of_a_round_are_mostly_its_payload() -> None:
    up, down = remote.round_bytes(Remote, 25_000_000)
    assert 100_000_000 < up < 100_010_000
    assert 100_000_000 < down < 100_010_000
    up, down = remote.round_bytes(RemoteOnebit, 25_000_000)
    assert 3_500_000 < up < 3_530_000
    assert 25_390_000 < down < 25_410_000


# --- the oracle ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 255, 256, 257, 5000])
def test_what_is_decoded_is_as_near_as_its_codec_allows(size: int) -> None:
    values = problem.gradient(0, size, seed=3)
    largest = np.abs(values).max()
    assert np.array_equal(encoded.decoded("none", values), values)
    assert np.abs(encoded.decoded("fp16", values) - values).max() <= largest / 1024
    assert np.abs(encoded.decoded("int8", values) - values).max() <= largest / 127 / 2 * 1.0001
    signs = encoded.decoded("onebit", values)
    assert np.array_equal(np.sign(signs), np.sign(values))
    block = values[: encoded.BLOCK]
    assert np.allclose(np.abs(signs[: encoded.BLOCK]), np.abs(block).mean(), rtol=1e-5)


def test_a_block_of_zeros_stays_zero() -> None:
    zeros = np.zeros(300, np.float32)
    assert not encoded.decoded("int8", zeros).any()
    assert not encoded.decoded("onebit", zeros).any()


def test_without_a_codec_the_oracle_is_plain_sgd() -> None:
    expected = problem.reference(1, 1000, seed=5, rounds=4)
    np.testing.assert_allclose(encoded.reference("none", 1000, 5, 4), expected, rtol=1e-6)


def test_feedback_makes_up_for_what_a_codec_loses() -> None:
    exact = problem.reference(1, 4096, seed=5, rounds=8)
    off = encoded.error_of(encoded.reference("onebit", 4096, 5, 8), exact)
    assert 0 < off < 0.2
    assert encoded.error_of(encoded.reference("int8", 4096, 5, 8), exact) < 0.01


def test_a_lost_round_is_more_than_a_codec_may_lose() -> None:
    for peer in (RemoteInt8, RemoteOnebit):
        right = encoded.reference(peer.push_codec, 4096, 5, wire._CHECKED_ROUNDS)
        wire._check_lossy(peer, encoded.decoded(peer.pull_codec, right), right)
        wrong = encoded.reference(peer.push_codec, 4096, 5, wire._CHECKED_ROUNDS - 1)
        with pytest.raises(BenchError, match=f"{peer.name}: .* weights are off by"):
            wire._check_lossy(peer, encoded.decoded(peer.pull_codec, wrong), right)


# --- the cases -----------------------------------------------------------------------------------


def test_plain_rounds_are_those_of_shared_memory_and_as_long_as_the_formula_says() -> None:
    skip_unless_possible()
    digest = wire._expected_digest("none", SIZE, 3)
    with (
        netns.network("1gbit") as (hub, workers),
        remote.remote_team(Remote, hub, workers, SIZE, 3) as team,
    ):
        wire.check_weights(team, SIZE, 3, digest)
        counted = wire.count_bytes(team, workers, SIZE)
        for way in ("to_hub", "from_hub"):
            assert 4 * SIZE < counted[way]["bytes"] < 4 * SIZE * 1.02


def test_other_bits_than_over_shared_memory_are_an_error(tmp_path: Path) -> None:
    if reason := Zps.available():
        pytest.skip(reason)
    with (
        teams_of.team(Loopback, 1, SIZE, 3, tmp_path) as team,
        pytest.raises(BenchError, match="none: other bits than over shared memory"),
    ):
        wire.check_weights(team, SIZE, 3, "another digest")


def test_more_bytes_than_the_formula_has_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_possible()
    monkeypatch.setattr(remote, "round_bytes", lambda peer, size: (4 * size, 3 * size))
    with (
        netns.network("1gbit") as (hub, workers),
        remote.remote_team(Remote, hub, workers, SIZE, 3) as team,
        pytest.raises(BenchError, match="bytes a round from the hub, the formula says"),
    ):
        wire.count_bytes(team, workers, SIZE)


def test_settings_that_the_hub_refuses_are_told_in_its_words() -> None:
    skip_unless_possible()

    class Unknown(Remote):
        push_codec = "zip"

    with (
        netns.network("1gbit") as (hub, workers),
        pytest.raises(Unsupported, match="zip"),
        remote.remote_team(Unknown, hub, workers, SIZE, 3),
    ):
        pass


def test_a_worker_that_shares_memory_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := Zps.available():
        pytest.skip(reason)
    with start_hub(1) as server:
        monkeypatch.setattr(ZpsTcp, "connect", Zps.connect)
        with pytest.raises(BenchError, match="does not use messages"):
            ZpsTcp().setup(Seat(0, 1, 100, 3, server.address))


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "many"], "'many' is not a size"),
        (["--size", "900G", "--cases", "node"], "GiB are free"),
        (["--rate", "nonsense"], "'nonsense' is not a rate"),
        (["--rate", "0gbit"], "'0gbit' is not a rate"),
        (["--cases", "link,hub"], "unknown case 'hub': choose from link, node, memory"),
    ],
)
def test_nonsense_is_refused_before_any_work(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(netns, "unavailable", lambda: None)
    result = CliRunner().invoke(wire.app, arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())


def test_without_a_network_a_case_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(netns, "unavailable", lambda: "only root may")
    result = CliRunner().invoke(wire.app, ["--cases", "link,node"])
    assert result.exit_code == 0
    assert not result.stdout
    assert "link is skipped: only root may" in result.stderr
    assert "node is skipped: only root may" in result.stderr


def test_a_case_that_does_not_fit_into_memory_is_skipped_unless_its_size_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(netns, "unavailable", lambda: None)
    monkeypatch.setattr(harness, "available_bytes", lambda: 1 << 30)
    wire.prepare(read())(Out())
    said = capsys.readouterr().err
    assert all(f"{case} is skipped: size 25 M" in said for case in wire.CASES)
    with pytest.raises(BenchError, match="size 25 M"):
        wire.prepare(read(sizes="25M"))


def test_the_command_prints_bytes_time_and_what_it_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unless_possible()
    monkeypatch.setitem(harness.PLANS, harness.Level.QUICK, harness.Plan(cycles=2, block_s=0.01))
    monkeypatch.setattr(wire, "PEERS", (Remote, RemoteInt8))
    kept = tmp_path / "lines.json"
    arguments = ["--size", "100K", "--cases", "link", "--quick", "--json", str(kept)]
    result = CliRunner().invoke(wire.app, arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == kept.read_text()
    records = [json.loads(line) for line in result.stdout.splitlines()]
    (first,) = [record for record in records if record["what"] == "link"]
    assert set(first["wire"]) | set(first["skipped"]) == {peer.name for peer in wire.PEERS}
    assert 0 < first["link"]["share"] < 1.2
    for name, reason in first["skipped"].items():
        assert f"{name} is skipped: {reason.split()[0]}" in result.stderr


def test_a_case_of_one_record_is_a_line_with_its_origin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wire._tell("memory", ["a line"], {"peak_bytes": 7}, Out(json_file=tmp_path / "lines"))
    record = json.loads(capsys.readouterr().out)
    assert (record["bench"], record["what"], record["peak_bytes"]) == ("wire", "memory", 7)
    assert {"machine", "commit"} <= record.keys()
    assert json.loads((tmp_path / "lines").read_text()) == record
