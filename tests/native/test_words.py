"""wait and post, across real processes, over memory that the waiter can only read."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import threading

import numpy as np
import pytest

from zps import native
from zps.native import Waited

# Layout of the shared page: signal at 0, mail at 4, words from 64.
MAIL, WORDS, PAGE = 4, 64, 4096
LONG_NS = 60_000_000_000


def u32(*values):
    return np.array(values, np.uint32)


def u64(*values):
    return np.array(values, np.uint64)


def address_of(mapping):
    return np.frombuffer(mapping, np.uint8).ctypes.data


class Page:
    """A sealed-size memfd, mapped writable here; others open it by path, read-only."""

    def __init__(self):
        self._fd = os.memfd_create("words")
        os.ftruncate(self._fd, PAGE)
        self._map = mmap.mmap(self._fd, PAGE)
        self.base = address_of(self._map)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"

    def wait(self, index, targets, *, mail_seen=0, spin_us=0, timeout_ns=LONG_NS):
        base = self.base
        return native.wait(
            base, base + WORDS, index, targets, base + MAIL, mail_seen, spin_us, timeout_ns
        )

    def post(self, index, values):
        native.post(self.base, self.base + WORDS, index, values)


@pytest.fixture
def page():
    return Page()


def read_only(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        return mmap.mmap(fd, PAGE, prot=mmap.PROT_READ)
    finally:
        os.close(fd)


def waiter(path, ready, results):
    """In a child: wait for words 1 and 3 to reach 5, then for mail."""
    mapping = read_only(path)
    base = address_of(mapping)
    ready.set()
    for target in (5, 99):
        result = native.wait(
            base, base + WORDS, u32(1, 3), u64(target, target), base + MAIL, 0, 0, LONG_NS
        )
        words = np.frombuffer(mapping, np.uint64, 4, WORDS).tolist()
        results.put((int(result), words))


def test_two_processes_wake_on_words_and_then_on_mail(page):
    spawn = multiprocessing.get_context("spawn")
    results, children = spawn.Queue(), []
    for _ in range(2):
        ready = spawn.Event()
        child = spawn.Process(target=waiter, args=(page.path, ready, results))
        child.start()
        children.append(child)
        assert ready.wait(60)
    page.post(u32(1), u64(5))  # not enough: both words are awaited
    page.post(u32(0, 3), u64(9, 6))
    assert [results.get(timeout=60) for _ in children] == [(0, [9, 5, 0, 6])] * 2
    native.add_u32(page.base + MAIL, 1)
    native.post_signal(page.base)
    assert [results.get(timeout=60)[0] for _ in children] == [1, 1]
    for child in children:
        child.join(60)
        assert child.exitcode == 0


def test_wait_returns_at_once_when_the_words_are_there(page):
    page.post(u32(0, 1), u64(3, 4))
    assert page.wait(u32(0, 1), u64(3, 4)) is Waited.REACHED
    assert page.wait(u32(0, 1), u64(2, 0)) is Waited.REACHED
    assert page.wait(u32(), u64()) is Waited.REACHED


def test_one_word_short_of_its_target_is_not_enough(page):
    page.post(u32(0, 1), u64(3, 4))
    assert page.wait(u32(0, 1), u64(3, 5), timeout_ns=1_000_000) is Waited.TIMEOUT


@pytest.mark.parametrize("spin_us", [0, 100_000])
def test_wait_times_out(page, spin_us):
    assert page.wait(u32(0), u64(1), spin_us=spin_us, timeout_ns=1_000_000) is Waited.TIMEOUT


def test_mail_ends_a_wait_and_words_come_first(page):
    native.store_u32(page.base + MAIL, 7)
    assert page.wait(u32(0), u64(1), mail_seen=6) is Waited.MAIL
    assert page.wait(u32(0), u64(1), mail_seen=7, timeout_ns=1_000_000) is Waited.TIMEOUT
    assert page.wait(u32(0), u64(0), mail_seen=6) is Waited.REACHED


@pytest.mark.parametrize("spin_us", [0, 20])
def test_no_wake_is_lost(page, spin_us):
    """Ping-pong: each side waits for the other's word, thousands of times."""
    rounds = 3000

    def answer():
        for i in range(1, rounds + 1):
            page.wait(u32(0), u64(i), spin_us=spin_us)
            page.post(u32(1), u64(i))

    thread = threading.Thread(target=answer)
    thread.start()
    for i in range(1, rounds + 1):
        page.post(u32(0), u64(i))
        assert page.wait(u32(1), u64(i), spin_us=spin_us) is Waited.REACHED
    thread.join()


def test_every_post_raises_the_signal_so_that_nobody_falls_asleep_on_it(page):
    page.post(u32(0), u64(1))
    native.post_signal(page.base)
    assert native.load_u32(page.base) == 2


def test_words_are_read_and_written_whole(page):
    word = page.base + WORDS
    native.store_u64(word, 2**64 - 2)
    assert native.load_u64(word) == 2**64 - 2
    native.store_u32(word, 2**32 - 1)
    assert native.load_u32(word) == 2**32 - 1
    assert native.load_u64(word) == 2**64 - 1
    assert native.add_u32(word, 3) == 2


def test_addresses_and_arrays_are_checked(page):
    base = page.base
    with pytest.raises(ValueError, match="index"):
        native.post(base, base + WORDS, u64(0), u64(1))
    with pytest.raises(ValueError, match="values"):
        native.post(base, base + WORDS, u32(0, 1), u64(1))
    with pytest.raises(ValueError, match="targets"):
        page.wait(u32(0), u64(1, 2))
    with pytest.raises(ValueError, match="aligned"):
        native.load_u64(base + 4)
    with pytest.raises(ValueError, match="null"):
        native.load_u32(0)
