"""A writer killed at any moment, and a disk that is full at any write: nothing torn, nothing acknowledged lost."""

import errno
import mmap
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest

from models import same
from normadapt.errors import StoreError
from normadapt.store import Store, files
from store.tiny import adapted, ended, feed, fork

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
RETAIN = 4


def check(path, acknowledged):
    """Open the store as the next process would, and find all in order; returns the head's number."""
    with Store(path, retain=RETAIN) as store:
        verification = store.verify()
        assert verification.ok, verification.problems
        assert verification.orphans == 0  # swept
        assert verification.snapshots <= RETAIN + 1
        head = store.restore(adapted())
        assert acknowledged <= head.number <= acknowledged + 1
        return head.number


def write_on(path, shared):
    """Commit again and again; in `shared` stand whether a commit is under way, and the last one that returned."""
    a = adapted()
    with Store(path, retain=RETAIN) as store:
        seed = store.head().number
        while True:
            seed += 1
            feed(a, seed)
            shared[0] = 1
            number = store.commit(a, "more").number
            shared[1:5] = number.to_bytes(4, "little")
            shared[0] = 0


def test_fifty_kills_in_the_middle_of_a_commit(tmp_path):
    chance = random.Random(0)
    shared = mmap.mmap(-1, 8)

    def number():
        return int.from_bytes(shared[1:5], "little")

    with Store(tmp_path) as store:
        a = adapted()
        feed(a)
        head = store.commit(a, "begin").number
    shared[1:5] = head.to_bytes(4, "little")
    kills = hits = 0
    while hits < 50:
        kills += 1
        assert kills < 300, "the kills do not hit commits"
        child = fork(lambda: write_on(tmp_path, shared))
        begun, first = time.monotonic(), head + chance.randint(0, 1)  # in the first commit, or in the second
        while (shared[0] == 0 or number() < first) and time.monotonic() < begun + 10:
            time.sleep(0.0002)
        time.sleep(chance.uniform(0, 0.012))
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        hits += shared[0]
        shared[0] = 0
        head = check(tmp_path, number())
        shared[1:5] = head.to_bytes(4, "little")
    assert head >= 10


class Steps:
    """Every call by which a commit reaches the disk, but for SQLite's own; at number `last` something is done."""

    def __init__(self, patch, last, act):
        self.count, self.last, self.act = 0, last, act
        for owner, name in ((os, "open"), (os, "write"), (os, "fsync"), (os, "close"), (Path, "replace")):
            patch.setattr(owner, name, self.counted(getattr(owner, name)))
        patch.setattr(files.Shelf, "remove", self.counted(files.Shelf.remove))

    def counted(self, function):
        def call(*args, **kwargs):
            self.count += 1
            if self.count == self.last:
                self.act()
            return function(*args, **kwargs)

        return call


def kill_me():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_at_every_step(tmp_path):
    a = adapted()
    with Store(tmp_path, retain=RETAIN) as store:
        for seed in range(RETAIN):  # so that the next one prunes
            feed(a, seed)
            store.commit(a, "before")

    def commit_once(step):
        with pytest.MonkeyPatch.context() as patch, Store(tmp_path, retain=RETAIN) as store:
            feed(a, 1000 + step)
            Steps(patch, step, kill_me)
            store.commit(a, "killed")

    head, killed, swept = RETAIN, 0, 0
    for step in range(1, 50):
        child = fork(lambda step=step: commit_once(step))
        code = ended(child)
        assert code in (0, -signal.SIGKILL)
        before = head
        head = check(tmp_path, before)
        if code == 0:
            break
        killed += 1
        swept += head == before
    assert killed >= 8  # open, write, fsync, close, replace, open, fsync, close of the folder; removal of a pruned file
    assert swept >= 7
    assert head > RETAIN


def no_room():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_at_every_step_of_the_file(tmp_path):
    a = adapted()
    feed(a)
    with Store(tmp_path) as store:
        kept = store.commit(a, "kept")
        state = a.snapshot()
        events, names = store.history(), sorted((tmp_path / "snapshots").iterdir())
        failed = 0
        for step in range(1, 50):
            feed(a, step)
            with pytest.MonkeyPatch.context() as patch:
                Steps(patch, step, no_room)
                try:
                    store.commit(a, "no room")
                except StoreError as error:
                    said = str(error)
                else:
                    break
            failed += 1
            assert "the disk is full -> make room; the head is unchanged" in said
            assert store.head() == kept
            assert store.history() == events
            assert same(store.load(kept.number), state)
            left = set((tmp_path / "snapshots").iterdir()) - set(names)
            assert not [path for path in left if path.suffix == ".tmp"]
            assert store.verify().ok
        assert failed >= 8
        assert store.head().number == kept.number + 1  # room again: it goes on
    with Store(tmp_path) as store:
        assert store.verify().orphans == 0


def test_a_full_disk_at_every_step_of_the_database(tmp_path):
    a = adapted()
    feed(a)
    with Store(tmp_path) as store:
        kept = store.commit(a, "kept")
    feed(a, 1)

    def commit_within(limit):
        with Store(tmp_path, timeout=1) as store:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                store.commit(a, "no room")
            except StoreError as error:
                said = str(error)
            else:
                return
            with pytest.raises(StoreError, match="disk"):
                store.record("no room", text="x" * 100_000)
            assert store.head() == kept  # reading goes on
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert store.verify().ok
            store.record("refused", limit=limit, said=said)

    for limit in range(0, 100_000, 2_000):
        assert ended(fork(lambda limit=limit: commit_within(limit))) == 0
        with Store(tmp_path) as store:
            assert store.verify().ok
            if store.head() != kept:
                break
    with Store(tmp_path) as store:
        refused = [event.facts for event in store.history(kinds=["refused"])]
        assert store.head().number == kept.number + 1
        assert all("disk" in facts["said"] for facts in refused)
        assert any(facts["limit"] < kept.bytes for facts in refused)  # no room for the content
        assert any(facts["limit"] >= kept.bytes + 2_000 for facts in refused)  # room for it, but not for the rows


def test_pages_of_the_database_run_out(tmp_path):
    a = adapted()
    feed(a)
    with Store(tmp_path) as store:
        kept = store.commit(a, "kept")
        with store._database.read() as connection:
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
        with store._database.write("limit") as connection:
            connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreError, match="the disk is full"):
            store.record("large", text="x" * 100_000)
        with pytest.raises(StoreError, match="the disk is full"), store.transaction():  # noqa: PT012
            store.rollback(0)
            store.record("large", text="x" * 100_000)
        assert store.head() == kept
        assert store.verify().ok


def limited(store):
    """No more pages for the database than it has."""
    with store._database.read() as connection:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
    with store._database.write("limit") as connection:
        connection.execute(f"PRAGMA max_page_count = {pages}")


def test_a_transaction_that_sqlite_gave_up_takes_nothing_more(tmp_path):
    """A full disk ends it at once; what the caller writes after that, the error dealt with, must not stay alone."""
    a = adapted()
    feed(a)
    with Store(tmp_path) as store:
        kept = store.commit(a, "kept")
        limited(store)
        with pytest.raises(StoreError, match="undid all of it"), store.transaction():  # noqa: PT012
            store.write_state("one", {})
            with pytest.raises(StoreError, match="the disk is full"):
                store.write_state("large", {"x": "x" * 100_000})
            for attempt in (lambda: store.write_state("two", {}), lambda: store.record("three"), store.rollback):
                with pytest.raises(StoreError, match="undid all of it; the head is unchanged -> leave the transaction"):
                    attempt()
        with pytest.raises(StoreError, match="undid all of it"), store.transaction():  # noqa: PT012
            store.write_state("one", {})
            with pytest.raises(StoreError, match="the disk is full"):
                store.write_state("large", {"x": "x" * 100_000})  # and nothing after it: must not seem to have worked
        assert store.read_state("one") is store.read_state("two") is None
        assert store.head() == kept
        store.write_state("after", {})
        assert store.verify().ok


def names(path):
    return sorted(file.name for file in (path / "snapshots").iterdir())


def test_commits_that_fail_leave_no_files_on_the_full_disk(tmp_path):
    a = adapted()
    feed(a)
    with Store(tmp_path) as store:
        store.commit(a, "kept")
        before = names(tmp_path)
        limited(store)
        failed = 0
        for seed in range(100):
            feed(a, seed)
            try:
                store.commit(a, "x" * 3000)
                before = names(tmp_path)
            except StoreError:
                failed += 1
            assert names(tmp_path) == before
            if failed == 3:
                break
        assert failed == 3
        assert store.verify().ok


def test_a_commit_undone_inside_a_transaction_that_goes_on_leaves_no_file(tmp_path):
    a = adapted()
    feed(a)
    with Store(tmp_path, retain=2) as store:
        store.commit(a, "kept")
        before = names(tmp_path)
        with store.transaction():
            feed(a, 1)
            with pytest.raises(KeyError), store.transaction():  # noqa: PT012
                store.commit(a, "undone")
                raise KeyError
            with pytest.raises(ValueError, match="object"):
                store.commit(a, "undone", fact=object())
            store.record("goes on")
        assert names(tmp_path) == before
        with pytest.raises(KeyError), store.transaction():  # noqa: PT012
            store.commit(a, "the same content", by=1)
            store.rollback(0)
            raise KeyError
        assert names(tmp_path) == before
        store.commit(a, "now")
        assert store.verify().ok
        assert store.verify().orphans == 0


class Flushes:
    """Which files and folders are flushed, by inode; the `failing` one fails once."""

    def __init__(self, patch, failing=None):
        self.seen, self.failing, self.real = [], failing, os.fsync
        patch.setattr(os, "fsync", self.flush)

    def flush(self, descriptor):
        inode = os.fstat(descriptor).st_ino
        if self.failing is not None and inode == self.failing.stat().st_ino:
            self.failing = None
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.seen.append(inode)
        self.real(descriptor)

    def includes(self, path):
        return path.stat().st_ino in self.seen


def test_a_commit_tried_again_after_a_failed_flush_is_flushed(tmp_path, monkeypatch):
    a = adapted()
    folder = tmp_path / "snapshots"
    with Store(tmp_path) as store:
        store.commit(a, "kept")
        feed(a)
        with monkeypatch.context() as patch:
            flushes = Flushes(patch, failing=folder)
            with pytest.raises(StoreError, match="look at the folder"):
                store.commit(a, "not yet")
            flushes.seen.clear()
            kept = store.commit(a, "again")
            assert flushes.includes(folder)
            assert flushes.includes(folder / f"{kept.digest}.safetensors")


def test_content_that_is_there_is_flushed_all_the_same(tmp_path, monkeypatch):
    """Whoever wrote it may not have come to that."""
    a = adapted()
    with Store(tmp_path) as store:
        kept = store.commit(a, "kept")
        flushes = Flushes(monkeypatch)
        assert store.commit(a, "the same").digest == kept.digest
        assert flushes.includes(tmp_path / "snapshots")
        assert flushes.includes(tmp_path / "snapshots" / f"{kept.digest}.safetensors")


def test_new_folders_are_flushed(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b"
    flushes = Flushes(monkeypatch)
    Store(path).close()
    assert all(flushes.includes(holder) for holder in (tmp_path, tmp_path / "a", path))
    flushes.seen.clear()
    Store(path).close()  # whoever made them may not have come to that
    assert all(flushes.includes(holder) for holder in (tmp_path / "a", path))
