from __future__ import annotations

import pytest

from zps.errors import ConfigError
from zps.launch.torchrun import Torchrun, detect

WORKER_1 = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "run",
}


def test_torchruns_variables_become_a_place_in_the_job() -> None:
    assert detect(WORKER_1) == Torchrun(1, 4, 1, 2, "10.0.0.1", 29500, "run")


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE"])
def test_without_rank_or_world_size_there_is_no_job(missing: str) -> None:
    assert detect({}) is None
    assert detect({**WORKER_1, missing: ""}) is None
    assert detect({name: value for name, value in WORKER_1.items() if name != missing}) is None


def test_one_node_is_assumed_when_nothing_is_said_of_local_ranks() -> None:
    job = detect({"RANK": "1", "WORLD_SIZE": "2"})
    assert job == Torchrun(1, 2, 1, 2, "", 0, "")
    assert job is not None
    assert job.one_node


def test_a_job_over_several_nodes_is_seen() -> None:
    job = detect(WORKER_1)
    assert job is not None
    assert not job.one_node


def test_the_token_is_one_per_job_and_the_same_for_all_its_workers() -> None:
    def token(**changes: str) -> str:
        job = detect({**WORKER_1, **changes})
        assert job is not None
        return job.hub_token()

    assert token() == token(RANK="3", LOCAL_RANK="0")
    assert len(token()) == 16
    others = {
        token(MASTER_PORT="29501"),
        token(TORCHELASTIC_RUN_ID="other"),
        token(WORLD_SIZE="8"),
        token(MASTER_ADDR="10.0.0.2"),
    }
    assert len(others | {token()}) == 5


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"RANK": "x"}, "RANK='x'"),
        ({"RANK": "4"}, "RANK=4 must be from 0 to below WORLD_SIZE=4"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
    ],
)
def test_a_broken_variable_is_named(changes: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        detect({**WORKER_1, **changes})


def test_every_node_of_a_job_has_a_number_and_a_token_of_its_own() -> None:
    jobs = [detect({**WORKER_1, "RANK": rank, "LOCAL_RANK": "0"}) for rank in "0123"]
    assert all(job is not None for job in jobs)
    assert [(job.nodes, job.node_rank) for job in jobs if job] == [(2, 0), (2, 0), (2, 1), (2, 1)]
    tokens = [job.hub_token(job.node_rank) for job in jobs if job]
    assert tokens[0] == tokens[1] != tokens[2] == tokens[3]
    assert jobs[0] is not None
    assert jobs[0].hub_token() not in tokens
