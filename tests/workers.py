"""Real hubs and real worker processes, started once and lent to many tests.

    def body(ctx: Context, rounds: int) -> torch.Tensor:    # at module level: it runs in a worker
        worker = ctx.worker()
        ...

    def test_something(run):
        first, second = run(body, world=2, rounds=3)         # what each rank returned

A worker process imports torch once, then takes one job after another. Each job makes workers of its
own; they are closed when it returns, so the hub is ready for the next job. When a rank fails, its
traceback is the test's failure, and everything is started anew for the next test.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.ports import free_port
from zps.config import Settings
from zps.hub.process import HubProcess
from zps.worker.worker import Worker

ROOT = Path(__file__).resolve().parents[1]
MOST = 3  # worker processes
MOST_HUBS = 6
PATIENCE_S = 60.0
#: How every worker reaches its hub (see the fixture `link` in conftest): the setting `link`, over
#: ipc; "tcp" is messages to a hub that listens on tcp.
LINK = "auto"
#: How long the other ranks may take to fail too, once one has.
GRACE_S = 3.0
#: Small buckets, so that small models have several; a hub that does not answer fails soon.
HUB = {"bucket_bytes": 4096, "timeout_s": 20.0}

Body = Callable[..., Any]


class Context:
    """What a body knows: who it is, how to reach the hub, and the way to the other ranks."""

    def __init__(self, rank: int, world: int, hub: str, peers: Mapping[int, Connection], link: str):
        self.rank = rank
        self.world = world
        self.hub = hub
        self.link = link
        self._peers = peers
        self._stack = ExitStack()

    def worker(self, **settings: Any) -> Worker:
        """A worker of this rank, closed when the job ends."""
        settings = {"timeout_s": HUB["timeout_s"], "link": self.link, **settings}
        worker = Worker(self.hub, rank=self.rank, world_size=self.world, **settings)
        return self._stack.enter_context(worker)

    def tell(self, rank: int, what: object = None) -> None:
        """Send something to another rank's `hear`."""
        self._peers[rank].send_bytes(pickle.dumps(what))

    def hear(self, rank: int) -> Any:
        """Wait for what another rank tells this one."""
        assert self._peers[rank].poll(PATIENCE_S), f"rank {self.rank} hears nothing of {rank}"
        return pickle.loads(self._peers[rank].recv_bytes())

    def is_told(self, rank: int) -> bool:
        """Whether `hear` would return at once."""
        return self._peers[rank].poll()

    def meet(self) -> None:
        """Wait until every rank is here. No part of zps is involved."""
        others = [rank for rank in range(self.world) if rank != self.rank]
        for rank in others:
            self.tell(rank, "here")
        for rank in others:
            self.hear(rank)

    def close(self) -> None:
        self._stack.close()


@dataclass(slots=True)
class _Member:
    """A worker process, seen from the test."""

    process: BaseProcess
    jobs: Connection
    log: Path

    def end_of_log(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


@dataclass
class Crew:
    """The worker processes, and the hubs they work with."""

    folder: Path
    _members: list[_Member] = field(default_factory=list)
    _hubs: dict[tuple[Any, ...], HubProcess] = field(default_factory=dict)

    def run(
        self,
        body: Body,
        *args: Any,
        world: int = 2,
        hub: Mapping[str, Any] | None = None,
        hubs: int = 1,
        **kwargs: Any,
    ) -> list[Any]:
        """Run `body(ctx, *args, **kwargs)` in `world` processes; what each returned, by rank.

        hub   settings of the hub, on top of HUB; jobs with the same ones share it
        hubs  how many of them
        """
        address = self.addresses(hubs, **(hub or {}))
        members = self._start()[:world]
        for rank, member in enumerate(members):
            request = (body, rank, world, address, setting(), args, kwargs)
            member.jobs.send_bytes(pickle.dumps(request))
        answers = self._gather(members)
        failures = [
            f"--- rank {rank} ---\n{text}" for rank, (ok, text) in answers.items() if not ok
        ]
        if failures:
            logs = [f"--- hub ---\n{path.read_text()}" for path in self.folder.glob("hub-*")]
            self.stop()
            raise AssertionError("\n".join([*failures, *logs]))
        return [answers[rank][1] for rank in range(world)]

    def addresses(self, hubs: int, **settings: Any) -> str:
        """The addresses of so many running hubs, as a worker takes them."""
        return ",".join(self.hub(number, **settings).address for number in range(hubs))

    def hub(self, number: int = 0, **settings: Any) -> HubProcess:
        """A running hub with these settings; those with other numbers are others."""
        tcp = LINK == "tcp"
        key = (number, tcp, *sorted(settings.items()))
        found = self._hubs.pop(key, None)
        if found is not None:
            if found.poll() is None:
                self._hubs[key] = found
                return found
            found.stop()
        while len(self._hubs) >= MOST_HUBS:
            self._hubs.pop(next(iter(self._hubs))).stop()  # the one that was used the longest ago
        own = Settings(**{**HUB, "runtime_dir": self.folder / "run", **settings})
        log = self.folder / f"hub-{len(list(self.folder.glob('hub-*')))}"
        bind = f"tcp://127.0.0.1:{free_port()}" if tcp else None
        with log.open("wb") as file, _environment():
            self._hubs[key] = HubProcess.start(own, bind=bind, stderr=file)
        return self._hubs[key]

    def stop(self) -> None:
        """End every process; the next `run` starts them again."""
        for member in self._members:
            member.jobs.close()
            member.process.kill()
            member.process.join()
        self._members.clear()
        for hub in self._hubs.values():
            hub.stop()
        self._hubs.clear()

    def _gather(self, members: list[_Member]) -> dict[int, tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        rank_of = {member.jobs: rank for rank, member in enumerate(members)}
        while len(answers) < len(members):
            failed = any(not ok for ok, _ in answers.values())
            left = [jobs for jobs, rank in rank_of.items() if rank not in answers]
            ready = wait(left, GRACE_S if failed else PATIENCE_S)
            if not ready:
                for rank in set(rank_of.values()) - set(answers):
                    answers[rank] = (False, _stack_of(members[rank]))
            for jobs in ready:
                rank = rank_of[jobs]
                try:
                    answers[rank] = pickle.loads(jobs.recv_bytes())
                except EOFError:
                    members[rank].process.join()
                    code = members[rank].process.exitcode
                    answers[rank] = (False, f"died: {code}\n{members[rank].end_of_log()}")
        return answers

    def _start(self) -> list[_Member]:
        if self._members and all(member.process.is_alive() for member in self._members):
            return self._members
        start = multiprocessing.get_context("forkserver")
        # Imported once for all: torch's own first optimizer step costs seconds of imports.
        start.set_forkserver_preload(["torch._dynamo", "pytest", "tests.workers"])
        peers: list[dict[int, Connection]] = [{} for _ in range(MOST)]
        for i in range(MOST):
            for j in range(i):
                peers[i][j], peers[j][i] = start.Pipe()
        for rank in range(MOST):
            mine, theirs = start.Pipe()
            log = self.folder / f"worker-{rank}"
            process = start.Process(target=_serve, args=(theirs, peers[rank], log), daemon=True)
            with _environment():
                process.start()
            theirs.close()
            self._members.append(_Member(process, mine, log))
        for ends in peers:
            for end in ends.values():
                end.close()
        return self._members


def setting() -> str:
    """The setting `link` of workers now."""
    return "message" if LINK == "tcp" else LINK


def _environment() -> Any:
    """Children find this folder from wherever the tests are run."""
    return mock.patch.dict(os.environ, PYTHONPATH=str(ROOT))


def _stack_of(member: _Member) -> str:
    """Where a worker that does not answer is; it ends by this."""
    os.kill(member.process.pid or 0, signal.SIGABRT)
    member.process.join()
    return f"no answer\n{member.end_of_log()}"


def _serve(jobs: Connection, peers: dict[int, Connection], log: Path) -> None:
    """The life of a worker process."""
    with log.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 2)
        faulthandler.enable(all_threads=True)
        for name in [name for name in os.environ if name.startswith("ZPS_")]:
            del os.environ[name]
        torch.set_num_threads(1)  # there are more processes than cores
        while True:
            try:
                request = jobs.recv_bytes()
            except EOFError:
                return
            jobs.send_bytes(_answer(request, peers))


def _answer(request: bytes, peers: dict[int, Connection]) -> bytes:
    try:
        body, rank, world, hub, link, args, kwargs = pickle.loads(request)
        ctx = Context(rank, world, hub, peers, link)
        try:
            result = body(ctx, *args, **kwargs)
        finally:
            ctx.close()
        return pickle.dumps((True, result))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))


@contextmanager
def together(
    address: str,
    tensors: Mapping[str, torch.Tensor],
    rule: str = "sum",
    *,
    world: int = 2,
    hypers: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Iterator[list[Worker]]:
    """Declared workers of all ranks in this one process, so that a test decides who acts when."""
    with ExitStack() as stack:
        settings = {"timeout_s": HUB["timeout_s"], "link": setting(), **settings}
        workers = [
            stack.enter_context(Worker(address, rank=rank, world_size=world, **settings))
            for rank in range(world)
        ]
        at_once(*(lambda w=w: w.declare(tensors, rule, **(hypers or {})) for w in workers))
        yield workers


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Make calls that wait for one another; returns their results, raises the first error."""
    results: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []

    def call(index: int) -> None:
        try:
            results[index] = calls[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive() or errors, "a call does not return"
    if errors:
        raise errors[0]
    return results
