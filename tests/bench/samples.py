"""Records as the suites write them, for those who read them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from bench.harness import Measured, Run
from bench.out import Record
from bench.peers.team import Cpu
from bench.report import Case, facts, records

SIZE = 25_000_000


def case(bench: str = "step", size: int = SIZE, world: int = 2, **measured: float) -> Case:
    """A case in which every round of each participant took the given microseconds."""
    found = {
        name.replace("_", "-"): Measured(
            [np.full(4, us)] * 3,
            {"worker": 1, "server": 2, "total": 9},
            restarts=[2, 1],
            cpu=[Cpu(us, us / 2)],
        )
        for name, us in measured.items()
    }
    return Case(bench, size, 4 * size, world, Run(found, 1.0, 0.25), facts())


def told(bench: str = "step", size: int = SIZE, world: int = 2, **measured: float) -> list[Record]:
    """The records of such a case, as they come back from a file."""
    found = records(case(bench, size, world, **measured))
    return [json.loads(json.dumps(record)) for record in found]


def kernel(contributors: int, **more: Any) -> Record:
    return {
        "bench": "kernels",
        "what": "sgd",
        "memory": "engine",
        "contributors": contributors,
        "elements": SIZE,
        "ratio": 0.95,
        "ratio_ci95": [0.9, 1.0],
        "goal": 0.85,
        "gbps": 12.0,
        **more,
    }


def scale(what: str, *relative: float) -> Record:
    points = [
        {
            "name": f"point {number}",
            "size": 1000 << number,
            "workers": 2 << number,
            "hubs": 1 << number,
            "p50_us": 100.0,
            "relative": value,
            "relative_ci95": [value - 0.1, value + 0.1],
        }
        for number, value in enumerate(relative)
    ]
    off = max(relative) - 1
    ends = {"off_linear_ci95": [off - 0.1, off + 0.1]}
    return {"bench": "scale", "what": what, "points": points, "off_linear": off, **ends}


def look(at_s: float, **more: Any) -> Record:
    return {"at_s": at_s, "p50_us": 50.0, "memory_bytes": [2 << 20, 1 << 20], **more}


SOAK: Record = {
    "bench": "soak",
    "what": "zps",
    "size": SIZE,
    "workers": 2,
    "seconds": 60.0,
    "rounds": 1000,
    "steady": False,
    "memory_growth": 0.5,
    "memory_of_allowed": 1.75,
    "latency_drift": 0.01,
    "faults": ["process 2 has grown by 7.0 MiB"],
    "looks": [look(0.0), look(1.0)],
}

CONVERGE: Record = {
    "bench": "converge",
    "what": "bsp int8",
    "target": 0.2,
    "to_target": {"rounds": 4, "seconds": 1.0, "bytes": 400},
    "over_bsp": {"rounds": 1.0, "seconds": 1.25, "bytes": 0.25},
    "accuracy": 0.97,
    "curves": [
        {"push_bytes": 100, "rounds": [0, 4], "seconds": [0.0, 1.0], "loss": [2.3, 0.1]},
    ],
}

BREAKDOWN: Record = {
    "bench": "breakdown",
    "what": "zps-grad",
    "size": SIZE,
    "workers": 2,
    "parts_us": {"encode": 100.0, "apply": 200.0, "wake": 100.0},
    "round_p50_us": 410.0,
}

SERVER_TIME: Record = {
    "bench": "rtt",
    "what": "zps-cpu",
    "size": 1000,
    "workers": 2,
    "server_us": 5.0,
    "peers": {"echo": {"server_us": 20.0, "ratio": 4.0, "ratio_ci95": [2.0, 5.0]}},
}


def coded(what: str, codec: str, contributors: int, ratio: float, **more: Any) -> Record:
    return {
        "bench": "codecs",
        "what": what,
        "codec": codec,
        "contributors": contributors,
        "elements": SIZE,
        "peer": "stream",
        "ratio": ratio,
        "ratio_ci95": [ratio - 0.1, ratio + 0.1],
        "goal": 0.8,
        "gbps": 12.0,
        **more,
    }


CODECS: list[Record] = [
    coded("encode", "int8", 1, 0.5),
    coded("encode", "fp16", 1, 0.6),
    coded("encode", "topk 1 %", 1, 12.0, peer="torch.topk", goal=5.0),
    coded("apply", "fp16", 1, 0.9),
    coded("apply", "int8", 2, 0.7),
]

_ONE_WAY = {"bytes": 1_020_000, "formula": 1_019_900, "off": 0.0001}
_NODE_WAY = {"bytes": 4_000_000, "formula": 4_010_000, "off": -0.0025}
WIRE: list[Record] = [
    *told("wire", SIZE, 1, zps_int8=100.0, zps_onebit_int8=80.0, zps_fp16=200.0, none=400.0),
    {
        "bench": "wire",
        "what": "link",
        "size": SIZE,
        "workers": 1,
        "wire": {"zps-int8": {"to_hub": _ONE_WAY, "from_hub": _ONE_WAY}},
        "link": {
            "plain_tcp_bytes_per_s": 125_000_000,
            "share": 0.94,
            "goal": 0.9,
            "verdict": "met",
        },
    },
    {"bench": "wire", "what": "node", "workers": 4, "to_hub": _NODE_WAY, "from_hub": _NODE_WAY},
    {
        "bench": "wire",
        "what": "memory",
        "workers": 8,
        "bytes": 16_777_216,
        "peak_bytes": 126_779_392,
        "ratio": 1.08,
        "goal": 1.3,
    },
]
