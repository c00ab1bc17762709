"""What torchrun tells its workers: the only place that knows the names of its variables."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from zps.errors import ConfigError

__all__ = ["Torchrun", "detect"]


@dataclass(frozen=True, slots=True)
class Torchrun:
    """One worker's place in a job that torchrun, or a launcher with its variables, has started."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    run_id: str

    @property
    def one_node(self) -> bool:
        """Whether all workers are on this machine, so that a path can be their meeting point."""
        return self.local_world_size == self.world_size

    @property
    def nodes(self) -> int:
        """How many machines the workers are on, as many on each."""
        return self.world_size // self.local_world_size

    @property
    def node_rank(self) -> int:
        """This machine's number: torchrun numbers the workers node by node."""
        return self.rank // self.local_world_size

    def hub_token(self, node_rank: int | None = None) -> str:
        """16 hex digits, the same in every worker of this job and no other: names its ipc path.

        node_rank  for the hub of that node alone
        """
        parts = [self.run_id, self.master_addr, str(self.master_port), str(self.world_size)]
        parts += [] if node_rank is None else [f"node {node_rank}"]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def detect(environ: Mapping[str, str]) -> Torchrun | None:
    """The job that `environ` describes; None without RANK and WORLD_SIZE.

    LOCAL_RANK and LOCAL_WORLD_SIZE default to RANK and WORLD_SIZE, one node.
    Raises ConfigError for a variable that is no number, or a rank outside the world.
    """
    if not environ.get("RANK") or not environ.get("WORLD_SIZE"):
        return None
    rank = _number(environ, "RANK", 0)
    world_size = _number(environ, "WORLD_SIZE", 1)
    job = Torchrun(
        rank=rank,
        world_size=world_size,
        local_rank=_number(environ, "LOCAL_RANK", rank),
        local_world_size=_number(environ, "LOCAL_WORLD_SIZE", world_size),
        master_addr=environ.get("MASTER_ADDR", ""),
        master_port=_number(environ, "MASTER_PORT", 0),
        run_id=environ.get("TORCHELASTIC_RUN_ID", ""),
    )
    _check_within("RANK", job.rank, "WORLD_SIZE", job.world_size)
    _check_within("LOCAL_RANK", job.local_rank, "LOCAL_WORLD_SIZE", job.local_world_size)
    return job


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name)
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r}: must be a whole number, as torchrun sets it") from None


def _check_within(name: str, value: int, bound_name: str, bound: int) -> None:
    if not 0 <= value < bound:
        raise ConfigError(
            f"{name}={value} must be from 0 to below {bound_name}={bound}; start every worker "
            "through one launcher, or set ZPS_RANK and ZPS_WORLD_SIZE"
        )
