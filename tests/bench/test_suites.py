"""The entry point: what it chooses, and what it refuses before anything is started."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import __main__ as entry
from bench import harness, options, plots, suites
from bench.harness import Plan
from bench.options import Options, parse_workers, read
from bench.origin import facts
from bench.out import Out
from bench.peers.base import BenchError
from bench.suites import SUITES, Job, Suite
from tests.bench.samples import told


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the suites whose jobs were started; nothing is measured."""
    names: list[str] = []

    def prepare(suite: Suite, asked: Options) -> Job:
        suite.module.prepare(asked)
        return lambda out: names.append(f"{suite.name} {asked.peers}")

    monkeypatch.setattr(Suite, "prepare", prepare)
    return names


def test_suites_run_in_their_own_order_and_all_by_default() -> None:
    assert [suite.name for suite in suites.choose(["rtt", "step"])] == ["step", "rtt"]
    assert suites.choose([]) == list(SUITES)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stp"], "unknown suite 'stp' (did you mean 'step'?): choose from kernels,"),
        (["step", "--peers", "zps,glo"], "unknown peer 'glo' (did you mean 'gloo'?)"),
        (["rtt", "--peers", "gloo"], "unknown peer 'gloo'"),
        (["step", "--sizes", "many"], "'many' is not a size"),
        (["step", "--sizes", "900G"], "GiB are free"),
        (["kernels", "--sizes", "900G"], "GiB are free"),
        (["pull", "--sizes", "900G"], "GiB are free"),
        (["scale", "--sizes", "1M,900G"], "GiB are free"),
        (["soak", "--sizes", "900G"], "GiB are free"),
        (["scale", "--quick", "--sizes", "1M", "-n", "2"], "give two --sizes or two --workers"),
        (["step", "-n", "2,x"], "'x' is not a number of workers"),
        (["--quick", "--full"], "exclude each other"),
        (["--json", "/nowhere/lines"], "/nowhere/lines cannot be written"),
        (["--report", "/nowhere/report.md"], "/nowhere/report.md cannot be written"),
        (["--plot", "/proc/plots"], "/proc/plots cannot be made"),
        (["--from", "/nowhere"], "/nowhere: No such file"),
    ],
)
def test_nonsense_is_refused_before_any_work(
    arguments: list[str], said: str, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "unavailable", lambda: None)  # whether matplotlib is there or not
    result = CliRunner().invoke(entry.app, arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert not started


def test_a_suite_that_does_not_fit_here_is_skipped_unless_it_is_the_only_one(
    started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "available_bytes", lambda: 1 << 20)
    result = CliRunner().invoke(entry.app, ["kernels", "rtt"])
    assert result.exit_code == 0, result.stderr
    assert "kernels is skipped: size 25 M needs about" in result.stderr
    assert started == ["rtt None"]
    assert CliRunner().invoke(entry.app, ["kernels"]).exit_code == 2
    assert CliRunner().invoke(entry.app, ["kernels", "rtt", "--sizes", "1M"]).exit_code == 2


@pytest.mark.parametrize("arguments", [["step", "--peers", "glo"], ["--from", "nowhere"]])
def test_what_is_refused_leaves_no_folder(
    arguments: list[str], tmp_path: Path, started: list[str]
) -> None:
    places = ["--report", str(tmp_path / "r.md"), "--json", str(tmp_path / "r.jsonl")]
    assert CliRunner().invoke(entry.app, [*arguments, *places]).exit_code == 2
    assert not list(tmp_path.iterdir())


def test_each_suite_takes_the_participants_it_knows(started: list[str]) -> None:
    arguments = ["step", "rtt", "pull", "--peers", "zps,gloo"]
    result = CliRunner().invoke(entry.app, arguments)
    assert result.exit_code == 0, result.stderr
    assert started == ["step zps,gloo", "rtt zps", "pull None"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["kernels", "--restarts", "2", "--calm", "0.1"], "kernels ignores --calm, --restarts"),
        (["rtt", "--sizes", "1K", "--cycles", "3"], "rtt ignores --sizes"),
        (["rtt", "pull", "--peers", "echo"], "pull ignores --peers"),
        (["rtt", "--minutes", "1"], "rtt ignores --minutes"),
        (["soak", "-n", "1,2", "--sizes", "1K"], "soak ignores all but the first of --workers"),
        (["--from", "LINES", "step"], "with --from nothing is measured"),
    ],
)
def test_an_option_that_makes_no_difference_is_told(
    arguments: list[str], said: str, started: list[str], tmp_path: Path
) -> None:
    (tmp_path / "lines").touch()
    result = CliRunner().invoke(
        entry.app, [str(tmp_path / "lines") if word == "LINES" else word for word in arguments]
    )
    assert result.exit_code == 0, result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith(said)]


def test_options_that_are_heeded_or_not_given_are_not_told(started: list[str]) -> None:
    arguments = ["rtt", "soak", "-n", "1", "--minutes", "1", "--seed", "3"]
    result = CliRunner().invoke(entry.app, arguments)
    assert result.exit_code == 0, result.stderr
    assert "ignores" not in result.stderr


def test_every_suite_says_what_it_takes() -> None:
    assert list(suites.TAKES) == [suite.name for suite in SUITES]
    known = {field.name for field in fields(Options)} | {field.name for field in fields(Plan)}
    assert set(" ".join(suites.TAKES.values()).split()) <= known


def test_a_quick_run_measures_the_sizes_that_were_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bench import codecs

    asked = list[int]()
    monkeypatch.setattr(codecs, "require_memory", lambda size, streams: asked.append(size))
    codecs.prepare(read(quick=True, sizes="25M"))
    assert asked == [25_000_000]


def test_a_suite_that_fails_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(out: Out) -> None:
        raise BenchError("no such luck")

    ran = []
    failed = entry.run([(SUITES[0], fail), (SUITES[1], lambda out: ran.append(1))], Out())
    assert (failed, ran) == ([SUITES[0].name], [1])
    assert "kernels has failed: no such luck" in capsys.readouterr().err


def test_lines_of_an_earlier_run_make_a_report(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    records = [*told(zps=100.0, gloo=700.0), *told(size=1000, zps=10.0, gloo=20.0)]
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    report = tmp_path / "report.md"
    result = CliRunner().invoke(entry.app, ["--from", str(lines), "--report", str(report)])
    assert result.exit_code == 0, result.stderr
    text = report.read_text()
    assert "| zps vs gloo | 25 M | 2 | 7.00 (7.00–7.00) | 6 |" in text
    drawn = list((tmp_path / "report-plots").iterdir())
    assert bool(drawn) == (plots.unavailable() is None)
    assert all(f"](report-plots/{path.name})" in text for path in drawn)


def test_of_a_file_with_several_runs_the_last_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for us in (100.0, 200.0):
        out = Out(json_file=tmp_path / "lines", echo=False)
        out.run = f"run of {us:.0f}"
        for record in told(zps=us, gloo=700.0):
            out.record(record)
    found = entry.read_lines(tmp_path / "lines", Out())
    assert [record["p50_us"] for record in found if record["what"] == "zps"] == [200.0]
    assert "has 2 runs; this is about the last, run of 200" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ZPS_TRACE", "trace.json", "ZPS_TRACE is set, and would be part of every time"),
        ("ZPS_TIMOUT_S", "3", "ZPS_TIMEOUT_S"),
    ],
)
def test_settings_that_spoil_a_run_are_refused_before_it(
    name: str, value: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    report = tmp_path / "report.md"
    result = CliRunner().invoke(entry.app, ["rtt", "--quick", "--report", str(report)])
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert not report.exists()


def test_settings_in_force_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZPS_NONFINITE", "allow")
    assert facts()["settings"]["nonfinite"] == "allow"


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    for text in ("hello", "[1]", '{"a": 1}'):
        (tmp_path / "lines").write_text(text)
        with pytest.raises(BenchError, match="is not a file that --json has written"):
            entry.read_lines(tmp_path / "lines", Out())


def test_a_quick_run_says_whom_it_leaves_out() -> None:
    from bench.step import PEERS, QUICK_PEERS

    chosen, notes = suites.participants(read(quick=True), PEERS, QUICK_PEERS)
    assert {peer.name for peer in chosen} <= {peer.name for peer in QUICK_PEERS}
    assert "rpc" in notes[-1]
    assert len(suites.participants(read(), PEERS, QUICK_PEERS)[0]) > len(chosen)
    named, _ = suites.participants(read(quick=True, peers="zps-tcp"), PEERS, QUICK_PEERS)
    assert [peer.name for peer in named] == ["zps-tcp"]


def test_workers_are_read_one_by_one() -> None:
    assert parse_workers("2, 4") == (2, 4)
    for text in ("", "0", "65", "2,,4", "-1", "1.5"):
        with pytest.raises(BenchError, match="is not a number of workers"):
            parse_workers(text)


def test_levels_differ_in_restarts_and_cycles() -> None:
    quick, normal, full = read(quick=True), read(), read(full=True)
    assert quick.restarts < normal.restarts < full.restarts
    assert quick.plan == harness.PLANS[harness.Level.QUICK]
    assert [o.by_level(1, 2, 3) for o in (quick, normal, full)] == [1, 2, 3]
    assert read(restarts=7).restarts == 7


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_file_of_somebody_elses_cannot_be_written() -> None:
    with pytest.raises(BenchError, match="cannot be written"):
        options.require_writable([Path("/etc/passwd")], None)


def test_a_folder_is_no_file_and_a_new_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="cannot be written"):
        options.require_writable([tmp_path], None)
    options.require_writable([tmp_path / "new.json", None], tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_nothing_in_bench_imports_itself_by_an_absolute_name() -> None:
    """It is `bench` in a checkout, and `zps.bench` where it is installed."""
    folder = Path(entry.__file__).parent
    wrong = [
        f"{path.name}: {line}"
        for path in folder.rglob("*.py")
        for line in path.read_text().splitlines()
        if line.lstrip().startswith(("from bench", "import bench"))
    ]
    assert not wrong


def test_a_suite_with_nothing_to_do_does_not_keep_the_others_from_theirs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = read(quick=True, sizes="1K", workers="2")
    (one, _), (two, job) = suites.prepare(suites.choose(["pull", "scale"]), asked)
    assert (one.name, two.name) == ("pull", "scale")
    job(Out())
    assert "scale is skipped: scale: growth is what lies" in capsys.readouterr().err
    with pytest.raises(BenchError, match="give two --sizes or two --workers"):
        suites.prepare(suites.choose(["scale"]), asked)
