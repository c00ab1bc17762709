"""Where results go: tables for people, JSON lines for machines, and a list for the report."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .peers.base import BenchError

Record = dict[str, Any]
Tick = Callable[[str], None]


def console() -> Console:
    """Where people read; stdout is left to the JSON lines."""
    shown = Console(stderr=True)
    if not shown.is_terminal:
        shown.width = 120
    return shown


@dataclass(slots=True)
class Out:
    """Takes what a suite finds.

    json_file  gets every line at once: a run that is broken off has kept what it measured
    echo       print the lines on stdout, too
    records    all lines so far, decoded
    run        names this run in all of its lines: a file may have those of several
    """

    console: Console = field(default_factory=console)
    json_file: Path | None = None
    echo: bool = True
    records: list[Record] = field(default_factory=list)
    run: str = field(default_factory=lambda: f"{datetime.now(timezone.utc):%FT%TZ}-{os.getpid()}")

    def record(self, record: Record) -> None:
        """Keeps one result. Raises OSError when the file cannot be written."""
        line = json.dumps({**record, "run": self.run}, allow_nan=False)
        self.records.append(json.loads(line))
        if self.echo:
            print(line, flush=True)
        if self.json_file is not None:
            with self.json_file.open("a") as file:
                file.write(line + "\n")

    def show(self, what: RenderableType) -> None:
        """A table or a sentence for people."""
        self.console.print(what, highlight=False)

    def note(self, text: str) -> None:
        """Something a reader has to know to judge what follows."""
        self.console.print(text, style="yellow", highlight=False, markup=False)

    def progress(self, steps: int) -> AbstractContextManager[Tick]:
        """A function that says what comes next and moves a bar, drawn on a terminal only."""
        return progress(self.console, steps)


def for_people(json_file: Path | None) -> Out:
    """An `Out` that prints JSON only where nobody reads it."""
    return Out(json_file=json_file, echo=not sys.stdout.isatty())


@contextmanager
def complaints(console: Console, name: str) -> Iterator[None]:
    """Tells a BenchError in one paragraph and ends the command with code 2."""
    try:
        yield
    except BenchError as error:
        console.print(f"{name}: {error}", style="red", highlight=False, markup=False)
        raise typer.Exit(2) from None


@contextmanager
def progress(console: Console, steps: int) -> Iterator[Tick]:
    """A function that says what comes next and moves a bar.

    It draws only when called: a thread that refreshes would disturb what is measured.
    """
    columns = (
        *(TextColumn("{task.description}"), BarColumn()),
        *(MofNCompleteColumn(), TimeElapsedColumn()),
    )
    hidden = not console.is_terminal
    with Progress(
        *columns, console=console, auto_refresh=False, transient=True, disable=hidden
    ) as bar:
        task = bar.add_task("", total=steps)
        yield lambda text: bar.update(task, advance=1, description=text, refresh=True)
