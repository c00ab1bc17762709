"""The seqlock around a bucket's weights: a reader in another process never sees half an update."""

from __future__ import annotations

import mmap
import multiprocessing
import os

import numpy as np

from tests.native.oracle import Bucket
from zps import native

N = 40 * native.TILE  # five chunks, so that several threads write at once
ENOUGH = 100
SEQ_BYTES = 4096


def address_of(mapping):
    return np.frombuffer(mapping, np.uint8).ctypes.data


def reader(path, results):
    """In a child: pull until enough versions came, and report what was seen on the way."""
    fd = os.open(path, os.O_RDONLY)
    mapping = mmap.mmap(fd, SEQ_BYTES + 4 * N, prot=mmap.PROT_READ)
    base, out = address_of(mapping), np.empty(N, np.float32)
    versions, torn = [], 0
    while len(set(versions)) < ENOUGH:
        version = native.pull(base, base + SEQ_BYTES, out.ctypes.data, out.nbytes, 1000)
        if version >= 0:
            versions.append(version)
            torn += int(out.min() != out.max() or out[0] != version)
    results.put((torn, versions == sorted(versions)))


def test_a_reader_never_sees_half_an_update():
    fd = os.memfd_create("weights")
    os.ftruncate(fd, SEQ_BYTES + 4 * N)
    memory = mmap.mmap(fd, SEQ_BYTES + 4 * N)
    base = address_of(memory)
    slot = np.ones(N, np.float32)
    job = native.Job(
        rule=native.RULES["add"].kernel,
        segments=np.array([(0, N, 0, 0)], native.SEGMENT),
        grad_dtype=native.DTYPE["float32"],
        weights_ptr=base + SEQ_BYTES,
        master_ptr=base + SEQ_BYTES,
        seq_ptr=base,
        slots=[slot.ctypes.data],
        steps=np.ones(1, np.int64),
    )
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    child = spawn.Process(target=reader, args=(f"/proc/{os.getpid()}/fd/{fd}", results))
    child.start()
    pool = native.Pool(3)
    while child.is_alive() and results.empty():
        native.apply(pool, [job])  # every weight becomes the version
        for _ in range(3000):  # some quiet, about as long as the writing
            pass
    torn, ordered = results.get(timeout=60)
    child.join(60)
    assert torn == 0
    assert ordered


def pulled(bucket, spins=10):
    out = np.zeros(len(bucket.weights), np.float32)
    seq, source = bucket.seq_word.ctypes.data, bucket.master.address
    return native.pull(seq, source, out.ctypes.data, out.nbytes, spins), out


def test_each_application_raises_the_version_by_one():
    buckets = [Bucket("add", np.zeros(n), [np.ones(n)], seq=3) for n in (0, 5, 20 * native.TILE)]
    pool = native.Pool(2)
    for _ in range(2):
        native.apply(pool, [bucket.job for bucket in buckets])
    for bucket in buckets:
        version, out = pulled(bucket)
        assert version == 5
        assert (out == 2).all()


def test_a_round_in_which_every_parameter_is_absent_is_still_a_version():
    bucket = Bucket("add", np.zeros(5), [np.ones(5)], seq=3)
    bucket.job.steps[:] = 0
    native.apply(native.Pool(1), [bucket.job])
    version, out = pulled(bucket)
    assert version == 4
    assert not out.any()


def test_pull_gives_up_when_the_writer_does_not_finish():
    bucket = Bucket("add", np.ones(5), [np.ones(5)])
    bucket.seq_word[0] = 7
    version, out = pulled(bucket)
    assert version == -1
    assert not out.any()
