"""Several processes and threads at one store: one writes, nobody who reads waits, nothing is lost or mixed up."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain

import pytest

from normadapt.errors import StoreError, StoreLockedError
from normadapt.store import Store, files
from store.tiny import adapted, ended, feed, fork

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
def test_two_processes_write_and_one_reads(tmp_path):
    a = adapted()
    with Store(tmp_path) as store:
        store.commit_source(a)

    def write(seed):
        with Store(tmp_path, retain=3) as store:
            for step in range(12):
                feed(a, 100 * seed + step)
                store.commit(a, "more", writer=seed)

    writers = [fork(lambda seed=seed: write(seed)) for seed in (1, 2)]
    b = adapted()
    with Store(tmp_path) as store:
        seen, restored, end = [0], 0, time.monotonic() + 30
        while seen[-1] < 24 and time.monotonic() < end:
            seen.append(store.head().number)
            with suppress(StoreError):  # it was the head a moment ago, and may be pruned now
                store.restore(b)
                restored += 1
        assert [ended(child) for child in writers] == [0, 0]
        assert seen == sorted(seen)
        assert restored > len(seen) // 2
        assert store.verify().ok
        assert store.verify().orphans == 0
        assert len(store.history(kinds=["commit"])) == 25


@needs_fork
def test_two_processes_make_the_same_store(tmp_path):
    for attempt in range(8):
        path = tmp_path / str(attempt)

        def make(path=path):
            Store(path).record("here")

        children = [fork(make) for _ in range(3)]
        assert [ended(child) for child in children] == [0, 0, 0]
        with Store(path) as store:
            assert [event.kind for event in store.history()] == ["created", "here", "here", "here"]


@needs_fork
def test_a_second_writer_gets_a_clear_error_and_readers_do_not_wait(tmp_path):
    a = adapted()
    feed(a)
    with Store(tmp_path) as store:
        kept = store.commit(a, "kept")
    ready, done = os.pipe(), os.pipe()

    def hold():
        os.close(done[1])  # so that the parent's end, if it fails, ends the reading below
        with Store(tmp_path) as store, store.transaction():
            store.rollback(0)
            os.write(ready[1], b"x")
            os.read(done[0], 1)

    child = fork(hold)
    os.read(ready[0], 1)
    with Store(tmp_path, timeout=0.05) as store:
        begun = time.monotonic()
        assert store.head() == kept
        assert store.generation() == 2
        assert store.verify().ok
        assert time.monotonic() - begun < 1
        for attempt in (
            lambda: store.commit(a, "x"),
            store.rollback,
            lambda: store.record("x"),
            lambda: store.send("x"),
        ):
            with pytest.raises(
                StoreLockedError, match=r"another writer has held it for 0\.05 s -> end the other process"
            ):
                attempt()
        os.write(done[1], b"x")
        assert ended(child) == 0
        assert store.head().number == 0
        assert store.commit(a, "now").number == 2


def test_a_writer_waits_for_another(tmp_path):
    with Store(tmp_path) as first, Store(tmp_path) as second:
        inside = threading.Event()

        def hold():
            with first.transaction():
                inside.set()
                first.record("first")
                time.sleep(0.1)

        with ThreadPoolExecutor(1) as pool:
            held = pool.submit(hold)
            assert inside.wait(10)
            second.record("second")
            held.result()
        assert [event.kind for event in second.history()] == ["created", "first", "second"]


def test_a_sweep_takes_nothing_that_is_on_its_way(tmp_path):
    a = adapted()
    feed(a)
    with Store(tmp_path) as store:
        with store.transaction():
            store.commit(a, "its file is there, its row is not yet")
            with Store(tmp_path, timeout=0.05) as other:  # finds an orphan, but may not touch it now
                assert other.verify().orphans == 2
        assert store.verify().ok
        assert store.verify().orphans == 0


def test_threads_share_a_store(tmp_path):
    a = adapted()
    with Store(tmp_path, retain=3) as store:
        store.commit_source(a)

        def write(worker):
            for step in range(5):
                with store.transaction():
                    seq = store.record("step", worker=worker, step=step).seq
                    store.write_state(f"worker {worker}", {"step": step})
                    assert store.history(1)[0].seq == seq
                feed(a, 10 * worker + step)
                store.commit(a, f"{worker}")

        def read(_):
            for _ in range(50):
                store.generation()
                assert store.head().number >= 0
                store.history(limit=3)

        with ThreadPoolExecutor(6) as pool:
            list(
                pool.map(
                    lambda job: job[0](job[1]), [(write, 1), (read, 0), (write, 2), (read, 0), (write, 3), (read, 0)]
                )
            )
        assert store.verify().ok
        assert store.head().number == 15
        assert len(store.history(kinds=["step"])) == 15
        assert store.read_state("worker 2") == {"step": 4}


def test_threads_of_one_process_time_out_too(tmp_path):
    with Store(tmp_path, timeout=0.05) as store, store.transaction(), ThreadPoolExecutor(1) as pool:
        with pytest.raises(StoreLockedError):
            pool.submit(store.record, "x").result()
        assert pool.submit(store.generation).result() == 0


@needs_fork
def test_a_store_survives_a_fork(tmp_path):
    with Store(tmp_path) as store:
        store.record("parent")
        store.generation()
        inherited = (store._database._reader, store._database.writer)

        def child():
            assert len(store.history()) == 2
            assert not set(inherited) & {store._database._reader, store._database.writer}  # SQLite forbids their use
            store.record("child")
            store.close()

        assert ended(fork(child)) == 0
        store.record("parent again")
        assert [event.kind for event in store.history()] == ["created", "parent", "child", "parent again"]
        assert store.verify().ok


@needs_fork
def test_a_command_is_given_to_one_process_only(tmp_path):
    with Store(tmp_path) as store:
        for number in range(40):
            store.send("pause", number=number)

    def take():
        with Store(tmp_path) as store:
            taken = store.take_commands()
            store.record("took", numbers=[command.number for command in taken])

    assert [ended(child) for child in [fork(take) for _ in range(3)]] == [0, 0, 0]
    with Store(tmp_path) as store:
        numbers = [event.facts["numbers"] for event in store.history(kinds=["took"])]
        assert sorted(chain.from_iterable(numbers)) == list(range(1, 41))


def test_verify_finds_no_fault_in_what_others_prune_meanwhile(tmp_path, monkeypatch):
    a = adapted()
    with Store(tmp_path, retain=3) as store, Store(tmp_path, retain=3) as other:
        for seed in range(3):
            feed(a, seed)
            other.commit(a, "more")
        look, looks = files.Shelf.get, 0

        def get_late(shelf, digest):
            nonlocal looks
            looks += 1
            if (number := {s.digest: s.number for s in store.snapshots()}.get(digest)) and looks < 50:
                while number in [s.number for s in store.snapshots()]:
                    feed(a, 100 + other.generation())
                    other.commit(a, "more", good=other.generation() % 2 == 0)
            return look(shelf, digest)

        monkeypatch.setattr(files.Shelf, "get", get_late)
        found = store.verify()
        assert looks > 1
        assert found.problems == ()
        assert found.orphans == 0
        monkeypatch.undo()
        store.verify()
        (tmp_path / "snapshots" / f"{store.head().digest}.safetensors").unlink()
        assert len(store.verify().problems) == 1  # a real one


@pytest.mark.parametrize("timeout", [3e6, 1e10, 1e300])
def test_a_writer_with_all_the_time_in_the_world_waits(tmp_path, timeout):
    with Store(tmp_path) as first, Store(tmp_path, timeout=timeout) as second:
        inside = threading.Event()

        def hold():
            with first.transaction():
                inside.set()
                time.sleep(0.1)
                first.record("first")

        with ThreadPoolExecutor(2) as pool:
            held = pool.submit(hold)
            assert inside.wait(10)
            both = [pool.submit(second.record, "second"), pool.submit(second.record, "second")]  # on SQLite, on a lock
            for waiting in (held, *both):
                waiting.result()
        assert [event.kind for event in second.history()] == ["created", "first", "second", "second"]
