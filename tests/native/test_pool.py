"""The thread pool: it finishes, it rests, it does not survive a fork."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.native.oracle import Bucket
from zps import native
from zps.errors import Closed

WIDE = 12 * native.TILE  # wide enough to be spread over threads


def counting(n=WIDE):
    """A bucket whose every element rises by 1 with each application."""
    return Bucket("add", np.zeros(n, np.float32), [np.ones(n, np.float32)])


def test_a_thousand_rounds_lose_nothing():
    pool = native.Pool(3)
    bucket = counting()
    for _ in range(1000):
        native.apply(pool, [bucket.job])
    assert (bucket.master.values == 1000).all()


def test_callers_on_several_threads_take_turns():
    pool = native.Pool(3)
    buckets = [counting(40 * WIDE) for _ in range(3)]  # long enough to overlap

    def work(bucket):
        for _ in range(60):
            native.apply(pool, [bucket.job])

    threads = [threading.Thread(target=work, args=(bucket,)) for bucket in buckets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((bucket.master.values == 60).all() for bucket in buckets)


class Helpers:
    """A pool's own threads, as the kernel sees them."""

    def __init__(self, threads):
        before = set(os.listdir("/proc/self/task"))
        self.pool = native.Pool(threads)
        self._tasks = set(os.listdir("/proc/self/task")) - before
        assert len(self._tasks) == threads - 1

    def _status(self, field):
        texts = [Path(f"/proc/self/task/{task}/status").read_text() for task in self._tasks]
        return [re.search(rf"^{field}:\s*(\S+)", text, re.MULTILINE)[1] for text in texts]

    def asleep(self):
        return set(self._status("State")) == {"S"}

    def times_slept(self):
        return [int(count) for count in self._status("voluntary_ctxt_switches")]


def test_helpers_sleep_when_there_is_nothing_to_do():
    helpers, bucket = Helpers(3), counting()
    native.apply(helpers.pool, [bucket.job])
    while not helpers.asleep():  # a helper that spins is never seen asleep
        pass
    native.apply(helpers.pool, [bucket.job])
    assert (bucket.master.values == 2).all()


def test_every_helper_is_woken_for_work():
    helpers, bucket = Helpers(3), counting()
    while not helpers.asleep():
        pass
    before = helpers.times_slept()
    while any(now == then for now, then in zip(helpers.times_slept(), before, strict=True)):
        native.apply(helpers.pool, [bucket.job])


def test_closing_ends_the_threads_and_a_closed_pool_says_so():
    before = len(os.listdir("/proc/self/task"))
    pool = native.Pool(4)
    assert len(os.listdir("/proc/self/task")) == before + 3
    pool.close()
    pool.close()
    assert len(os.listdir("/proc/self/task")) == before
    with pytest.raises(Closed, match="make another"):
        native.apply(pool, [counting(8).job])


@pytest.mark.parametrize("threads", [0, -1, native.MAX_THREADS + 1])
def test_an_absurd_number_of_threads_is_refused(threads):
    with pytest.raises(ValueError, match="threads"):
        native.Pool(threads)


FORKED = """
import os
from tests.native.test_pool import counting
from zps import native
from zps.errors import ForkedProcess

pool, bucket = native.Pool(2), counting()
native.apply(pool, [bucket.job])
child = os.fork()
if child == 0:
    try:
        native.apply(pool, [bucket.job])
    except ForkedProcess as error:
        pool.close()  # must not wait for threads that are not there
        native.apply(native.Pool(2), [bucket.job])
        assert (bucket.master.values == 2).all()
        os._exit(7 if "spawn" in str(error) else 8)
    os._exit(9)
_, status = os.waitpid(child, 0)
native.apply(pool, [bucket.job])
raise SystemExit(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_child_is_refused_with_a_hint_and_may_make_its_own():
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", FORKED], cwd=root, timeout=60, check=False)
    assert done.returncode == 7


def test_results_do_not_depend_on_the_callers_floating_point_mode():
    torch = pytest.importorskip("torch")
    tiny = np.full(WIDE, 1e-40, np.float32)
    buckets = [Bucket("sum", np.zeros(WIDE), [tiny, tiny]) for _ in range(2)]
    pool = native.Pool(2)
    native.apply(pool, [buckets[0].job])
    assert torch.set_flush_denormal(True)
    try:
        native.apply(pool, [buckets[1].job])
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(buckets[0].master.values, tiny + tiny)
    np.testing.assert_array_equal(buckets[1].master.values, tiny + tiny)
