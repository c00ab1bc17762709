"""The one door to the compiled core: checks dtypes, shapes and alignment, then passes pointers.

Memory is given as integer addresses, because it lies in shared segments, tensors and arrays alike;
the caller keeps it alive and large enough. Every call that touches bulk data or waits releases the
GIL. What is wrong in a call is a ValueError; a pool in a forked child is ForkedProcess.
"""

from __future__ import annotations

from zps.native.checks import DTYPE, isa, isas
from zps.native.codecs import (
    CODEC,
    EXACT,
    FEEDBACK,
    HALF_VALUES,
    KIND,
    STOCHASTIC,
    Encoding,
    encode,
    inspect,
)
from zps.native.jobs import (
    MAX_THREADS,
    RULES,
    SEGMENT,
    TILE,
    Job,
    Pool,
    RuleFacts,
    apply,
    norm_sq,
    reduce,
    states_used,
)
from zps.native.lane import Lane, Steps
from zps.native.roofline import move, stream
from zps.native.words import (
    Waited,
    add_u32,
    load_u32,
    load_u64,
    post,
    post_signal,
    pull,
    store_u32,
    store_u64,
    wait,
)

__all__ = [
    "CODEC",
    "DTYPE",
    "EXACT",
    "Encoding",
    "FEEDBACK",
    "HALF_VALUES",
    "Job",
    "KIND",
    "Lane",
    "MAX_THREADS",
    "Pool",
    "RULES",
    "RuleFacts",
    "SEGMENT",
    "STOCHASTIC",
    "Steps",
    "TILE",
    "Waited",
    "add_u32",
    "apply",
    "encode",
    "inspect",
    "isa",
    "isas",
    "load_u32",
    "load_u64",
    "move",
    "norm_sq",
    "post",
    "post_signal",
    "pull",
    "reduce",
    "states_used",
    "store_u32",
    "store_u64",
    "stream",
    "wait",
]
