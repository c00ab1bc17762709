"""What do gradients and weights cost between hosts: bytes, time, and memory in the hub?

    python -m bench.wire

Two hosts are two network namespaces with a cable of 1 Gb/s, which only root may lay; without it
`link` and `node` are skipped. `link`: one worker here and its hub there, a synchronous round for
each pair of codecs, checked, counted and timed in one run. `node`: four workers here send what one
would. `memory`: what a hub holds when eight workers push and one is late.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import typer

from . import footprint, goals, harness, netns, report, sections, suites
from .kernels import require_memory
from .netns import Counters, Host
from .options import Level, Options, read
from .out import Out, Record
from .peers import encoded, remote
from .peers import team as teams_of
from .peers.base import BenchError
from .peers.problem import Array
from .peers.remote import Remote, RemoteFp16, RemoteInt8, RemoteOnebit, Unsupported
from .peers.team import Team
from .peers.zps_round import Zps
from .report import Case

PEERS: tuple[type[Remote], ...] = (Remote, RemoteInt8, RemoteOnebit, RemoteFp16)
_QUICK_PEERS: tuple[type[Remote], ...] = (Remote, RemoteInt8)
CASES = ("link", "node", "memory")
SHARE_GOAL = 0.9  # of the cable's bandwidth, as a plain TCP connection reaches it
BYTES_RTOL = 0.02
_CHECKED_ROUNDS = 5
_COUNTED_ROUNDS = 3
_NODE_WORKERS = 4
_QUICK_CASES = "link,memory"
_MEMORY_WORKERS, _MEMORY_BYTES, _QUICK_MEMORY_BYTES = 8, 100_000_000, 16 << 20
_MEMORY_COPIES = 3 * _MEMORY_WORKERS + 4  # slot, weights, what is under way of each; the hub's
_SIZE, _QUICK_SIZE = 25_000_000, 1_000_000

app = typer.Typer(add_completion=False)

Tick = Callable[[str], None]
Peers = Sequence[type[Remote]]


# --- link: bytes and time ------------------------------------------------------------------------


def measure_link(
    peers: Peers, size: int, rate: str, options: Options, out: Out
) -> tuple[Case, Record]:
    """All codecs at one size: results first, then bytes, then time, anew for each restart.

    Returns the case, and what is not about one participant: the bytes of each of them, the cable,
    and why each participant that is not in the case was left out.
    """
    steps = len(peers) * (4 + options.plan.blocks) + 1
    with out.progress(options.restarts * steps) as tick, netns.network(rate) as (hub, workers):
        before = netns.bandwidth(workers, hub, 4 * size)
        starts = [_start(peers, hub, workers, size, options, tick) for _ in range(options.restarts)]
        after = netns.bandwidth(workers, hub, 4 * size)
    run, (_, wire, skipped) = harness.merged([start.run for start in starts]), starts[-1]
    plain = (before + after) / 2
    share = 4 * size / (run.measured["none"].p(50) * 1e-6) / plain
    link: Record = {
        "rate": rate,
        "plain_tcp_bytes_per_s": round(plain),
        "share": round(share, 3),
    }
    if size >= _SIZE:  # a model of few buckets has no second one to send while the first comes back
        link |= {"goal": SHARE_GOAL, "verdict": goals.verdict(share, None, SHARE_GOAL)}
    found = {"size": size, "workers": 1, "wire": wire, "link": link, "skipped": skipped}
    return Case("wire", size, 4 * size, 1, run, report.facts()), found


class _Start(NamedTuple):
    """What one start of all processes showed: rounds, bytes by participant, who is left out."""

    run: harness.Run
    wire: dict[str, dict[str, Any]]
    skipped: dict[str, str]


def _start(
    peers: Peers, hub: Host, workers: Host, size: int, options: Options, tick: Tick
) -> _Start:
    with ExitStack() as stack:
        teams, skipped = _seat(stack, peers, hub, workers, size, options.seed, tick)
        for name, team in teams.items():
            tick(f"check {name}")
            digest = _expected_digest(name, size, options.seed)
            check_weights(team, size, options.seed, digest)
        wire = {name: count_bytes(team, workers, size) for name, team in teams.items()}
        return _Start(harness.measure(teams, options.plan, tick), wire, skipped)


def _seat(
    stack: ExitStack, peers: Peers, hub: Host, workers: Host, size: int, seed: int, tick: Tick
) -> tuple[dict[str, Team], dict[str, str]]:
    teams: dict[str, Team] = {}
    skipped: dict[str, str] = {}
    for peer in peers:
        tick(f"start {peer.name}")
        try:
            team = stack.enter_context(remote.remote_team(peer, hub, workers, size, seed))
            teams[peer.name] = team
        except Unsupported as reason:
            skipped[peer.name] = str(reason)
    if "none" not in teams:
        raise BenchError(f"not even plain rounds run: {skipped['none']}")
    return teams, skipped


def _expected_digest(name: str, size: int, seed: int) -> str | None:
    """Of the weights that a worker with shared memory ends up with, where nothing is encoded."""
    if name != "none":
        return None
    with (
        TemporaryDirectory(prefix="bench-") as folder,
        teams_of.team(Zps, 1, size, seed, Path(folder)) as team,
    ):
        team.run(_CHECKED_ROUNDS)
        return team.digests()[0]


def check_weights(team: Team, size: int, seed: int, digest: str | None) -> None:
    """Runs the first rounds. Raises BenchError unless their result is what it has to be.

    digest  of the weights, where they must be the same bits; otherwise they may differ from those
            of the hub, which NumPy works out, by what the codec of the weights loses
    """
    team.run(_CHECKED_ROUNDS)
    peer = team.peer
    assert issubclass(peer, Remote)
    expected = encoded.reference(peer.push_codec, size, seed, _CHECKED_ROUNDS)
    if digest is not None:
        harness.check(team, expected, _CHECKED_ROUNDS)
        if team.digests() != [digest]:
            raise BenchError(f"{peer.name}: other bits than over shared memory")
        return
    _check_lossy(peer, dict(team.weights())[0], expected)


def _check_lossy(peer: type[Remote], seen: Array, expected: Array) -> None:
    error, allowed = encoded.error_of(seen, expected), encoded.allowed_error(peer.pull_codec)
    if not error <= allowed:
        raise BenchError(
            f"{peer.name}: after {_CHECKED_ROUNDS} rounds the worker's weights are off by "
            f"{error:.2g} of their size, {allowed:.2g} is what their codec may lose"
        )


def count_bytes(team: Team, workers: Host, size: int) -> dict[str, Any]:
    """Bytes a round, as the cable's counters have it and as the formula has it.

    Raises BenchError when the two differ by more than BYTES_RTOL.
    """
    assert issubclass(team.peer, Remote)
    before = workers.counters()
    team.run(_COUNTED_ROUNDS)
    counted = workers.counters() - before
    up, down = remote.round_bytes(team.peer, size)
    sent = _compared(counted.sent_bytes, counted.sent_packets, up)
    received = _compared(counted.received_bytes, counted.received_packets, down)
    for way, figures in (("to the hub", sent), ("from the hub", received)):
        if abs(figures["off"]) > BYTES_RTOL:
            raise BenchError(
                f"{team.peer.name}: {figures['bytes']} bytes a round {way}, the formula says "
                f"{figures['formula']}"
            )
    return {"to_hub": sent, "from_hub": received}


def _compared(counted: int, packets: int, formula: int) -> dict[str, Any]:
    per_round = counted / _COUNTED_ROUNDS
    expected = formula + remote.packet_bytes(packets) / _COUNTED_ROUNDS
    off = per_round / expected - 1
    return {"bytes": round(per_round), "formula": round(expected), "off": round(off, 5)}


def tell_link(case: Case, found: Record, out: Out) -> None:
    """The table and the lines of the case, and what they do not show."""
    report.tell(case, out)
    _tell("link", sections.link(found), found, out)
    for name, reason in found["skipped"].items():
        _skip(name, reason, out)


# --- node: several workers, one journey ----------------------------------------------------------


def measure_node(size: int, rate: str, seed: int, out: Out) -> dict[str, Any]:
    """Bytes a round between a node of four workers and its hub, beside those of one worker.

    Raises BenchError when they are more than BYTES_RTOL apart.
    """
    with (
        out.progress(3) as tick,
        netns.network(rate) as (hub, workers),
    ):
        totals = []
        for rounds in (_CHECKED_ROUNDS, _CHECKED_ROUNDS + _COUNTED_ROUNDS):
            tick(f"{rounds} rounds")
            totals.append(_node_bytes(hub, workers, size, seed, rounds))
    counted = totals[1] - totals[0]  # start and end cost the same in both
    up, down = remote.round_bytes(Remote, size)
    sent = _compared(counted.sent_bytes, counted.sent_packets, up)
    received = _compared(counted.received_bytes, counted.received_packets, down)
    if max(abs(sent["off"]), abs(received["off"])) > BYTES_RTOL:
        raise BenchError(f"a node's bytes a round are not those of one worker: {sent}, {received}")
    return {"workers": _NODE_WORKERS, "size": size, "to_hub": sent, "from_hub": received}


def _node_bytes(hub: Host, workers: Host, size: int, seed: int, rounds: int) -> Counters:
    """What crosses the cable while a node runs so many checked rounds, from start to end."""
    with ExitStack() as stack:
        server = stack.enter_context(remote.hub_on(hub, 1))
        before = workers.counters()
        command = [sys.executable, "-m", "zps", "launch", "-n", str(_NODE_WORKERS)]
        command += ["-m", f"{__package__}.peers.node_rounds", str(size), str(seed), str(rounds)]
        node = {"ZPS_NODE_HUB": "1", "ZPS_NODES": "1", "ZPS_NODE_RANK": "0"}
        environ = suites.environ(ZPS_HUB=server.address, **node)
        with workers.entered():
            done = subprocess.run(command, env=environ, capture_output=True, text=True)
        if done.returncode:
            raise BenchError(f"the node has failed:\n{done.stderr[-2000:]}")
        return workers.counters() - before


# --- memory --------------------------------------------------------------------------------------


def measure_memory(out: Out, nbytes: int = _MEMORY_BYTES) -> dict[str, Any]:
    """A hub's memory with eight workers of so many bytes, one of them late, by default settings."""
    from zps.config import Settings

    own = Settings.load()
    with out.progress(1) as tick:
        tick("memory")
        found = footprint.measure(
            _MEMORY_WORKERS,
            nbytes,
            buffer_bytes=own.hub_buffer_bytes,
            bucket_bytes=own.bucket_bytes,
        )
    return {
        "workers": _MEMORY_WORKERS,
        "bytes": nbytes,
        "held_bytes": found.held,
        "peak_bytes": found.peak,
        "needed_bytes": found.needed,
        "ratio": round(found.peak / found.needed, 3),
        "goal": footprint.ALLOWED,
        "verdict": "met" if found.bounded else "missed",
    }


# --- what a person reads -------------------------------------------------------------------------


def _tell(case: str, lines: Sequence[str], record: Record, out: Out) -> None:
    for line in lines:
        out.show(line)
    out.record({"bench": "wire", "what": case, **record, **report.facts()})


def _skip(what: str, reason: str, out: Out) -> None:
    out.note(f"{what} is skipped: {reason}")


def choose_cases(names: str | None) -> list[str]:
    """The cases to run, in their order. Raises BenchError for one that there is not."""
    wanted = [name.strip() for name in names.split(",")] if names else list(CASES)
    for name in wanted:
        if name not in CASES:
            raise BenchError(f"unknown case {name!r}: choose from {', '.join(CASES)}")
    return [name for name in CASES if name in wanted]


def choose_peers(options: Options) -> tuple[list[type[Remote]], list[str]]:
    """The codecs to compare, and notes; nothing encoded is always there, as what all is held by."""
    chosen, notes = suites.participants(options, PEERS, _QUICK_PEERS)
    return [peer for peer in PEERS if peer in chosen or peer is Remote], notes


def unavailable(case: str) -> str | None:
    """None, or why this case cannot run here."""
    if case == "memory":
        return None
    return netns.unavailable()


def check_rate(rate: str) -> None:
    """Raises BenchError for what is no rate in tc's words."""
    if not re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)?([kmgt]i?)?(bit|bps)", rate.lower()):
        raise BenchError(f"{rate!r} is not a rate: give it as 1gbit or 100mbit")


def prepare(options: Options, cases: str | None = None, rate: str = "1gbit") -> suites.Job:
    """Those of `cases` (comma-separated; None: all) that can run here, at each size.

    Raises BenchError when sizes that were asked for do not fit into memory; of its own sizes it
    leaves out what does not fit.
    """
    check_rate(rate)
    sizes = options.sizes or (options.by_level(_QUICK_SIZE, _SIZE, _SIZE),)
    quick = options.level is Level.QUICK and options.sizes is None
    chosen = choose_cases(cases or (_QUICK_CASES if quick else None))
    peers, notes = choose_peers(options)
    memory_bytes = options.by_level(_QUICK_MEMORY_BYTES, _MEMORY_BYTES, _MEMORY_BYTES)
    reasons = {name: unavailable(name) for name in chosen}
    for name in chosen:
        try:
            if reasons[name] is None:
                _require_memory(name, peers, sizes, memory_bytes)
        except BenchError as error:
            if options.sizes and name != "memory":
                raise
            reasons[name] = str(error)

    def job(out: Out) -> None:
        for note in notes:
            out.note(note)
        for name in chosen:
            if reason := reasons[name]:
                _skip(name, reason, out)
            elif name == "memory":
                found = measure_memory(out, memory_bytes)
                _tell(name, sections.memory(found), found, out)
            else:
                for size in sizes:
                    _run_between_hosts(name, peers, size, rate, options, out)

    return job


def _require_memory(case: str, peers: Peers, sizes: Sequence[int], memory_bytes: int) -> None:
    """Raises BenchError when a case does not fit into memory."""
    if case == "memory":
        require_memory(memory_bytes // 4, _MEMORY_COPIES)
        return
    for size in sizes:
        if case == "link":
            harness.require_memory(peers, size, 1, payload_bytes=4 * size)
        else:  # each worker works the reference out
            payload_bytes = 4 * size * _NODE_WORKERS
            harness.require_memory([Remote], size, _NODE_WORKERS, payload_bytes=payload_bytes)


def _run_between_hosts(
    name: str, peers: Peers, size: int, rate: str, options: Options, out: Out
) -> None:
    if name == "link":
        tell_link(*measure_link(peers, size, rate, options, out), out)
    else:
        found = measure_node(size, rate, options.seed, out)
        _tell(name, sections.node(found), found, out)


@app.command()
def main(
    size: Annotated[str, typer.Option(help="fp32 parameters: 1M, 25M, ...")] = "25M",
    rate: Annotated[str, typer.Option(help="of the cable, in tc's words")] = "1gbit",
    cases: Annotated[str | None, typer.Option(help="comma-separated; default: all")] = None,
    quick: report.Quick = False,
    cycles: report.Cycles = None,
    restarts: report.Restarts = 1,
    calm: report.Calm = None,
    seed: report.Seed = 0,
    json_file: report.JsonFile = None,
) -> None:
    """Count and time rounds between two hosts, and weigh the hub."""
    with suites.alone("bench.wire", json_file) as out:
        options = read(
            quick=quick, cycles=cycles, restarts=restarts, calm=calm, seed=seed, sizes=size
        )
        prepare(options, cases, rate)(out)


if __name__ == "__main__":
    app()
