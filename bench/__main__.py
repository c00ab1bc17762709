"""`zps bench`, `python -m bench`: all suites, or those that are named, and a report of them.

    zps bench --quick
    zps bench step rtt --peers zps,gloo -n 2,4 --json lines.jsonl --plot plots --report report.md
    zps bench --from lines.jsonl --report report.md

Everything that can be wrong with the options is found before anything is started.
"""

from __future__ import annotations

import json
import time
import traceback
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from . import markdown, origin, plots, report, suites
from .ending import terminable
from .options import read, require_writable
from .out import Out, Record, complaints, for_people
from .peers.base import BenchError

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command()
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="SUITE", help="Default: all; see --list.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="about a minute in all")] = False,
    full: Annotated[bool, typer.Option("--full", help="every size, many restarts")] = False,
    sizes: Annotated[str | None, typer.Option(help="fp32 parameters: 1K,1M,25M")] = None,
    workers: Annotated[
        str | None, typer.Option("-n", "--workers", help="as 2, or 2,4 one by one")
    ] = None,
    peers: report.Peers = None,
    restarts: report.Restarts = None,
    cycles: report.Cycles = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="of the soak")] = None,
    calm: report.Calm = None,
    seed: report.Seed = 0,
    json_file: report.JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="draw plots into this folder")] = None,
    report_file: Annotated[
        Path | None, typer.Option("--report", help="write a report in Markdown")
    ] = None,
    lines: Annotated[
        Path | None, typer.Option("--from", help="measure nothing: report on these JSON lines")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="list suites and participants")] = False,
) -> None:
    """Measure zps beside what else there is, on this machine; results are checked first."""
    out = for_people(json_file)
    with terminable(), complaints(out.console, "zps bench"):
        chosen = suites.choose(names or [])
        if list_:
            out.console.print(_listed(chosen))
            return
        folder = plot or (report_file.parent / f"{report_file.stem}-plots" if report_file else None)
        require_writable([json_file, report_file], None)
        if plot is not None and (reason := plots.unavailable()):
            raise BenchError(reason)
        origin.settings()
        options = read(
            quick=quick,
            full=full,
            cycles=cycles,
            calm=calm,
            restarts=restarts,
            seed=seed,
            sizes=sizes,
            workers=workers,
            peers=peers,
            minutes=minutes,
        )
        jobs: list[tuple[suites.Suite, suites.Job]] = []
        if lines is None:
            jobs = suites.prepare(chosen, options)
        else:
            out.records = read_lines(lines, out)
            if names or quick or full or options.given:
                out.note("with --from nothing is measured: what chooses measurements is ignored")
        require_writable([], folder)  # last: it makes the folder
        failed = run(jobs, out)
        finish(out, folder, report_file)
        if failed:
            raise BenchError(f"these suites have failed: {', '.join(failed)}")


def run(jobs: list[tuple[suites.Suite, suites.Job]], out: Out) -> list[str]:
    """One suite after the other; returns the names of those that have failed."""
    failed = []
    for suite, job in jobs:
        out.console.rule(f"{suite.name}: {suite.question}", align="left")
        began = time.monotonic()
        try:
            job(out)
        except BenchError as error:
            out.note(f"{suite.name} has failed: {error}")
            failed.append(suite.name)
        except Exception:  # whatever it is, the other suites have something to tell
            out.note(f"{suite.name} has failed:\n{traceback.format_exc()}")
            failed.append(suite.name)
        out.show(f"[dim]{suite.name} took {time.monotonic() - began:.0f} s[/dim]")
    return failed


def finish(out: Out, folder: Path | None, report_file: Path | None) -> None:
    """The goals for people, and the plots and the report if they are asked for."""
    reached = markdown.goals_table(out.records)
    if reached.row_count:
        out.show(reached)
    drawn: list[Path] = []
    if folder is not None:
        reason = plots.unavailable()
        if reason is None:
            drawn = plots.draw(out.records, folder)
        else:
            out.note(f"the report has no plots: {reason}")
    if report_file is not None:
        report_file.write_text(markdown.render(out.records, drawn, report_file.parent))
        out.show(f"report: {report_file}")
    elif folder is not None:
        out.show(f"{len(drawn)} plots in {folder}")


def read_lines(path: Path, out: Out) -> list[Record]:
    """The records of the last run in a file. Raises BenchError for what `--json` has not written.

    Times of different runs mean nothing beside one another, so no two are reported on together.
    """
    try:
        found = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        runs = list(dict.fromkeys(record.get("run") for record in found))
        if not all({"bench", "what"} <= record.keys() for record in found):
            raise ValueError
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from None
    except (ValueError, AttributeError):
        raise BenchError(f"{path} is not a file that --json has written") from None
    if len(runs) > 1:
        out.note(f"{path} has {len(runs)} runs; this is about the last, {runs[-1]}")
    return [record for record in found if record.get("run") == runs[-1]]


def _listed(chosen: list[suites.Suite]) -> Table:
    table = Table("suite", "question", "participants", box=None)
    for suite in chosen:
        table.add_row(suite.name, suite.question, ", ".join(suite.peers))
    return table


if __name__ == "__main__":
    app(prog_name="zps bench")
