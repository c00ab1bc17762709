"""The suites there are, and how one of them is run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from . import harness, origin
from .ending import terminable
from .harness import Entry, Run
from .naming import nearest
from .options import Level, NothingToDo, Options, require_writable
from .out import Out, complaints
from .peers.base import BenchError, Peer
from .peers.team import Team

# What is left of a suite once its options are checked: it measures, and tells.
Job = Callable[[Out], None]
Teams = Mapping[str, Team]  # by the names of their entries


@dataclass(frozen=True, slots=True)
class Suite:
    """A question, and the module of this package whose `prepare` makes a job of it."""

    name: str
    question: str

    @property
    def module(self) -> Any:
        """Loaded when it is needed: some of them import torch."""
        return import_module(f".{self.name}", __package__)

    @property
    def peers(self) -> tuple[str, ...]:
        """The names of its participants, as far as they can be chosen."""
        return tuple(peer.name for peer in getattr(self.module, "PEERS", ()))

    def prepare(self, options: Options) -> Job:
        """Checks the options before any work. Raises BenchError for what cannot be done here."""
        job: Job = self.module.prepare(options)
        return job


SUITES = (
    Suite("kernels", "how near is the fused apply to what memory can do?"),
    Suite("codecs", "how near are encoding and decoding to what memory can do?"),
    Suite("step", "how long does a synchronous round take, beside what else there is?"),
    Suite("rtt", "what does the control path cost, beside a bare ZeroMQ round trip?"),
    Suite("pull", "what does reading the weights cost, by alias, copy and message?"),
    Suite("breakdown", "where does the time of a round go?"),
    Suite("wire", "what do gradients and weights cost between two hosts?"),
    Suite("train", "how long does a training step take, end to end?"),
    Suite("converge", "what loss is reached after how much time and how many bytes?"),
    Suite("scale", "is the cost linear in parameters and workers, and what do hubs bring?"),
    Suite("soak", "does anything grow, leak or slow down over minutes?"),
)

# The options that each suite heeds, by their names in `options.read`; --peers is for those that
# have some. Of TAKES_FIRST they heed the first value.
_COMPARED = "restarts cycles calm seed"
TAKES = {
    "kernels": "sizes workers",
    "codecs": "sizes workers",
    "step": f"sizes workers {_COMPARED}",
    "rtt": f"workers {_COMPARED}",
    "pull": f"sizes workers {_COMPARED}",
    "breakdown": f"sizes workers {_COMPARED}",
    "wire": f"sizes {_COMPARED}",
    "train": f"workers {_COMPARED}",
    "converge": "workers restarts seed",
    "scale": f"sizes workers {_COMPARED}",
    "soak": "sizes workers minutes seed",
}
TAKES_FIRST = {"converge": "workers", "soak": "sizes workers"}


def choose(names: Sequence[str]) -> list[Suite]:
    """The suites of these names, in their own order; of none, all.

    Raises BenchError for a name that there is not, with the nearest that there is.
    """
    table = {suite.name: suite for suite in SUITES}
    for name in names:
        if name not in table:
            raise nearest(name, table, "suite")
    return [suite for suite in SUITES if not names or suite.name in names]


def prepare(chosen: Sequence[Suite], options: Options) -> list[tuple[Suite, Job]]:
    """The jobs of all suites; nothing has been started when one of them raises BenchError.

    `options.peers` is for all of them: each takes those that it knows, or its own choice if it
    knows none. A name that no chosen suite knows is an error. What else was given and is not for a
    suite is a note of its job. So is, unless there is no other suite, what one cannot do here if
    nobody has asked for it, by sizes, workers or participants, and what leaves it nothing to do.
    """
    wanted = [name.strip() for name in options.peers.split(",")] if options.peers else []
    known = list(dict.fromkeys(name for suite in chosen for name in suite.peers))
    for name in wanted:
        if name not in known:
            raise nearest(name, known, "peer")
    if any("minutes" in TAKES[suite.name] for suite in chosen):  # meant for those, by its own words
        options = replace(options, given=options.given - {"minutes"})
    jobs: list[tuple[Suite, Job]] = []
    refused: list[BenchError] = []
    for suite in chosen:
        peers = ",".join(name for name in wanted if name in suite.peers)
        own = replace(options, peers=peers or None)
        try:
            job = suite.prepare(own)
        except BenchError as error:
            asked = options.given & {"sizes", "workers", "peers"}
            if asked and not isinstance(error, NothingToDo):
                raise
            refused.append(error)
            jobs.append((suite, _noting(f"{suite.name} is skipped: {error}")))
            continue
        if ignored := _ignored(suite, own):
            job = _noting(f"{suite.name} ignores {', '.join(ignored)}", job)
        jobs.append((suite, job))
    if len(refused) == len(jobs):
        raise refused[0]
    return jobs


def _ignored(suite: Suite, options: Options) -> list[str]:
    """What was given and makes no difference to this suite; `options.peers` are those it knows."""
    heeded = set(TAKES[suite.name].split()) | ({"peers"} if options.peers else set())
    ignored = [f"--{name}" for name in sorted(options.given - heeded)]
    return ignored + [
        f"all but the first of --{name}"
        for name in TAKES_FIRST.get(suite.name, "").split()
        if len(getattr(options, name) or ()) > 1
    ]


def _noting(text: str, job: Job | None = None) -> Job:
    """A job that says something before it begins."""

    def noted(out: Out) -> None:
        out.note(text)
        if job is not None:
            job(out)

    return noted


def participants(
    options: Options, known: Sequence[type[Peer]], quick: Sequence[type[Peer]]
) -> tuple[list[type[Peer]], list[str]]:
    """Those that were asked for; of its own, a suite takes all, or `quick` of them in a quick run.

    Returns them, and a line about each that is left out. Raises BenchError as `harness.choose`.
    """
    chosen, notes = harness.choose(options.peers, known)
    if options.peers or options.sizes or options.level is not Level.QUICK:
        return chosen, notes
    left_out = [peer.name for peer in chosen if peer not in quick]
    if left_out:
        notes.append(f"a quick run leaves {', '.join(left_out)} out; --peers names who takes part")
    return [peer for peer in chosen if peer in quick], notes


def compare(
    entered: Sequence[Entry],
    options: Options,
    out: Out,
    check: Callable[[Teams], None],
    sharing: Callable[[Teams], Iterable[Team]] = lambda teams: teams.values(),
) -> Run:
    """Checks and measures all participants, with new processes for each restart.

    check    called with teams that have run no round yet; raises BenchError for a wrong result
    sharing  the teams whose workers must hold the same bits after all rounds
    """
    plan, runs = options.plan, []
    steps = len(entered) * (2 + plan.blocks) + 1
    with out.progress(options.restarts * steps) as tick:
        for _ in range(options.restarts):
            fresh = options.level is not Level.QUICK
            with harness.all_teams(entered, options.seed, tick, fresh=fresh) as teams:
                tick("check")
                check(teams)
                runs.append(harness.measure(teams, plan, tick))
                for team in sharing(teams):
                    harness.check_agreement(team)
    return harness.merged(runs)


def environ(**more: str) -> dict[str, str]:
    """For a process that has to find every module that this one finds."""
    here = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return {**os.environ, "PYTHONPATH": here, **more}


@contextmanager
def alone(name: str, json_file: Path | None) -> Iterator[Out]:
    """Where a suite that is run by itself puts its results; a BenchError ends it with code 2."""
    out = Out(json_file=json_file)
    with terminable(), complaints(out.console, name):
        require_writable([json_file], None)
        origin.settings()
        yield out
