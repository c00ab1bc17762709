"""The `zps` command: thin; every command reads its options, calls one function, prints."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from zps.config import Settings, variable
from zps.errors import ConfigError, ZpsError

if TYPE_CHECKING:
    from zps.launch.sizes import Sizes

__all__ = ["app", "main"]

app = typer.Typer(
    name="zps",
    help="A parameter server for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any setting; repeat it for several."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Mode = Annotated[str | None, typer.Option(help="bsp, ssp or async.")]
OnDeath = Annotated[str | None, typer.Option(help="shrink, wait or abort.")]
Staleness = Annotated[int | None, typer.Option(help="ssp: rounds a worker may lead by.")]
Quorum = Annotated[float | None, typer.Option(help="bsp: share of members that closes a round.")]


def main() -> None:
    """Run the command line; an error of zps is one line, and exit code 2 if it was the user's."""
    try:
        app()
    except ZpsError as error:
        _say("zps")(f"error: {error}")
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


# The script's own options are none of ours: everything from the first plain word on is passed on.
@app.command(context_settings={"allow_interspersed_args": False})
def launch(
    script: Annotated[str, typer.Argument(help="The training script, or a module with -m.")],
    args: Annotated[list[str] | None, typer.Argument(help="Its arguments, untouched.")] = None,
    workers: Annotated[int, typer.Option("-n", "--workers", help="Number of workers.")] = 1,
    hubs: Annotated[int, typer.Option(help="Number of hubs, which share the model.")] = 1,
    nodes: Annotated[
        int | None, typer.Option(help="Machines, each with -n workers; --set hub= is for all.")
    ] = None,
    node_rank: Annotated[int | None, typer.Option(help="This machine's number, from 0.")] = None,
    node_hub: Annotated[
        bool, typer.Option("--node-hub", help="This machine's workers share a hub of their own.")
    ] = False,
    module: Annotated[bool, typer.Option("-m", "--module", help="SCRIPT is a module.")] = False,
    mode: Mode = None,
    staleness: Staleness = None,
    quorum: Quorum = None,
    on_death: OnDeath = None,
    min_workers: Annotated[int | None, typer.Option(help="Fewest that may go on.")] = None,
    grace_s: Annotated[float, typer.Option(help="Seconds between asking and killing.")] = 10.0,
    prefix_all: Annotated[
        bool, typer.Option("--prefix-all", help="Prefix rank 0 too, even on a terminal.")
    ] = False,
    set_: Set = None,
) -> None:
    """Start hubs and N workers on this machine, and end with the first failing worker's code.

    On several machines, give each --nodes, its --node-rank and the same hub, and --node-hub to let
    the gradients of its workers travel as one.

    Every line of output gets its rank in front. On a terminal rank 0 has the terminal to itself,
    so that its progress bars work.
    """
    from zps.launch.local import Plan, command
    from zps.launch.local import launch as run

    console = Console(stderr=True)
    plan = Plan(
        command=command(script, args or [], module=module),
        workers=workers,
        hubs=hubs,
        inherit_first=sys.stdout.isatty() and not prefix_all,
        grace_s=grace_s,
        colour=console.is_terminal and not console.no_color and sys.stdout.isatty(),
    )
    chosen = _chosen(
        set_,
        mode=mode,
        staleness=staleness,
        quorum=quorum,
        on_death=on_death,
        min_workers=min_workers,
        nodes=nodes,
        node_rank=node_rank,
        node_hub=node_hub or None,
    )
    try:
        code = run(plan, os.environ, _say("zps launch"), **chosen)
    finally:
        if plan.inherit_first:  # a killed worker may have left the cursor hidden
            console.show_cursor(True)
    raise typer.Exit(code)


@app.command()
def hub(
    bind: Annotated[
        str | None,
        typer.Option(
            help="tcp://HOST:PORT, beyond this machine only with --set insecure=true; without it, "
            "a private ipc socket."
        ),
    ] = None,
    world_size: Annotated[int | None, typer.Option(help="Number of workers.")] = None,
    mode: Mode = None,
    staleness: Staleness = None,
    quorum: Quorum = None,
    on_death: OnDeath = None,
    set_: Set = None,
) -> None:
    """Serve one hub in the foreground, until Ctrl-C or SIGTERM.

    For node hubs its world size is the number of nodes.
    """
    from zps.hub.process import configure_logging, run
    from zps.relay.process import run as run_node_hub

    settings = Settings.load(
        **_chosen(
            set_,
            world_size=world_size,
            mode=mode,
            staleness=staleness,
            quorum=quorum,
            on_death=on_death,
        )
    )
    configure_logging(settings, quiet=False)
    say = _say("zps hub")

    def tell(event: str, **facts: Any) -> None:
        if event == "ready":
            say(f"serving at {facts['address']}; start workers with {variable('hub')} set to it")

    serve = run_node_hub if settings.node_hub else run
    serve(settings, bind=bind, parent_pid=None, on_event=tell)


@app.command()
def trace(
    path: Annotated[Path, typer.Argument(help="What ZPS_TRACE was set to.")],
) -> None:
    """Put the traces of all processes together, for https://ui.perfetto.dev or chrome://tracing."""
    from zps.trace import join

    print(f"{join(path)} processes in {path}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check what zps needs of this machine; exit code 1 if something fails."""
    from zps.launch.doctor import examine

    checks = examine()
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        table = Table("check", "", "detail", "what to do", title="zps doctor", title_justify="left")
        styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
        for check in checks:
            status = Text(check.status, styles[check.status])
            table.add_row(check.name, status, check.detail, check.advice)
        _console().print(table)
    raise typer.Exit(int(any(check.status == "fail" for check in checks)))


@app.command()
def config(
    as_json: Json = False,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FACTORY",
            help="module.path:factory or script.py:Net; show what its rounds weigh, too.",
        ),
    ] = None,
    set_: Set = None,
) -> None:
    """Show every setting: its value, where that came from, and what it means."""
    settings = Settings.load(**_chosen(set_))
    rows = [
        {
            "setting": name,
            "variable": variable(name),
            "value": getattr(settings, name),
            "source": settings.source(name),
            "help": field.description,
        }
        for name, field in Settings.model_fields.items()
    ]
    sizes = None if model is None else _sizes(model, settings)
    if as_json:
        found = rows if sizes is None else {"settings": rows, "model": sizes.to_json()}
        print(json.dumps(found, indent=2, default=str))
        return
    table = Table("setting", "value", "source", "help", title="zps config", title_justify="left")
    for row in rows:
        value = "" if row["value"] is None else str(row["value"])
        style = None if row["source"] == "default" else "bold"
        table.add_row(row["setting"], value, row["source"], row["help"], style=style)
    _console().print(table)
    if sizes is not None:
        from zps.launch.sizes import render

        _console().print(render(sizes))
        for warning in sizes.warnings:
            _say("zps config")(f"warning: {warning}")


# As with launch, the script's own options are none of ours.
@app.command(context_settings={"allow_interspersed_args": False})
def tune(
    script: Annotated[str, typer.Argument(help="The training script, or a module with -m.")],
    args: Annotated[list[str] | None, typer.Argument(help="Its arguments, untouched.")] = None,
    module: Annotated[bool, typer.Option("-m", "--module", help="SCRIPT is a module.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps whose gradients are used.")] = 8,
    hub: Annotated[
        str | None, typer.Option(help="Measure the link to this hub, which must have no workers.")
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option(help="The hub's link, as 10Gbit/s; without it, it is measured.")
    ] = None,
    workers: Annotated[int, typer.Option("-n", "--workers", min=1, help="Who share it.")] = 1,
    max_error: Annotated[float, typer.Option(min=0, help="Highest error of the sum.")] = 0.1,
    candidates: Annotated[
        list[str] | None, typer.Option("--try", help="A compression; repeat it for several.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Save a picture: .png, .svg, .pdf.")] = None,
    as_json: Json = False,
    set_: Set = None,
) -> None:
    """Measure compressions on a script's own gradients, and say which to set.

    The script is run as a single worker, and stopped after a few steps. Before, the link is
    measured: to the hub of --hub or ZPS_HUB, or to one that is started for it.
    """
    from zps.codec.spec import Compression
    from zps.tuning import capture, show
    from zps.tuning.bandwidth import measure_link
    from zps.tuning.cost import Link
    from zps.tuning.measure import CANDIDATES
    from zps.tuning.runner import NativeRunner
    from zps.tuning.tune import report_on

    # All that can be wrong with the options, before minutes go into the script.
    settings, say = Settings.load(**_chosen(set_, hub=hub)), _say("zps tune")
    compressions = [Compression.parse(text) for text in candidates or CANDIDATES]
    link = measure_link(settings) if bandwidth is None else Link.parse(bandwidth)
    if link.measured is not None:
        say(f"link: {link.measured}")
    report = report_on(
        capture.run(script, args or [], steps=steps, module=module),
        compressions=compressions,
        link=link,
        workers=workers,
        max_error=max_error,
        settings=settings,
        runner=NativeRunner(),
        tell=lambda text: say(f"measuring {text}"),
    )
    if plot is not None:
        show.plot(report, plot)
    if as_json:
        print(report.to_json())
        return
    _console().print(show.table(report))
    print(f"{report.advice}\n{report.advice.reason}")


# The suites have options of their own, and their own help.
@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def bench(context: typer.Context) -> None:
    """Measure zps beside what else there is, on this machine: `zps bench --help`."""
    from zps.launch.suites import command

    argv, environ = command(context.args)
    os.execve(argv[0], argv, environ)


def _sizes(model: str, settings: Settings) -> Sizes:
    from zps.launch.factory import load_model
    from zps.launch.sizes import measure

    return measure(load_model(model), settings)


def _chosen(pairs: list[str] | None, **options: Any) -> dict[str, Any]:
    """Options that were given, and `--set NAME=VALUE` pairs, as keyword arguments of `load`."""
    chosen = {name: value for name, value in options.items() if value is not None}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair}: write it as NAME=VALUE")
        chosen[name.strip().lower().replace("-", "_")] = value.strip()
    return chosen


def _say(who: str) -> Callable[[str], None]:
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    return lambda text: console.print(f"{who}: {text}")


def _console() -> Console:
    """A table must not lose its columns because a pipe has no width, nor a value its brackets."""
    width = None if sys.stdout.isatty() else 160
    return Console(width=width, markup=False, highlight=False)
