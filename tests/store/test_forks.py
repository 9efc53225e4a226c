"""A process that forks with a store open, and two handles of one process: no lock is lost, nothing acknowledged is."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest

from normadapt.errors import StoreError
from normadapt.store import Store, forks
from store.tiny import ended, fork

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
IN_USE = "was in use by its process at the moment in which this one was forked from it -> fork while no transaction"


class Gate:
    """Lets another process, forked before, go on when it is told to."""

    def __init__(self):
        self.ends = os.pipe()

    def open(self):
        os.write(self.ends[1], b"x")

    def wait(self):
        os.read(self.ends[0], 1)


def kinds(path):
    with Store(path) as store:
        assert store.verify().ok
        return [event.kind for event in store.history()]


def test_a_second_handle_of_a_process_costs_no_acknowledged_write(tmp_path):
    """A process loses its locks on a file when it closes any descriptor of it, and with them the WAL to others."""
    Store(tmp_path).close()
    gate = Gate()

    def visit():
        gate.wait()
        Store(tmp_path).close()

    stranger = fork(visit)  # before anything is open here
    first = Store(tmp_path)
    first.record("before")
    second = Store(tmp_path)
    with first.transaction():
        first.record("acknowledged")
        gate.open()
        assert ended(stranger) == 0
    second.record("by the second")
    assert [event.kind for event in first.history()] == ["created", "before", "acknowledged", "by the second"]
    first.close()
    second.close()
    assert kinds(tmp_path) == ["created", "before", "acknowledged", "by the second"]


def test_what_a_child_wrote_outlives_its_parents_handle(tmp_path):
    store = Store(tmp_path)
    store.record("parent")
    inside, closed = Gate(), Gate()

    def write():
        with store.transaction():
            store.record("child")
            inside.open()
            closed.wait()

    child = fork(write)
    inside.wait()
    store.close()  # as the last one, if the child's locks were none: it takes the WAL away
    Store(tmp_path).close()
    closed.open()
    assert ended(child) == 0
    assert kinds(tmp_path) == ["created", "parent", "child"]


def test_parent_and_children_write_by_the_handle_that_they_share(tmp_path):
    def write(store, number):
        for _ in range(5):
            store.record("child", number=number)

    with Store(tmp_path) as store, Store(tmp_path) as other:
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=write, args=(store, number)) for number in range(3)]
        for child in children:
            child.start()
            store.record("parent")
            other.record("parent")
        for child in children:
            child.join(30)
        assert [child.exitcode for child in children] == [0, 0, 0]
        assert len(store.history(kinds=["child"])) == 15
        assert len(other.history(kinds=["parent"])) == 6
    assert len(kinds(tmp_path)) == 22


def refused(path, *stores):
    """Nothing of the file can be used in this process."""
    for attempt in (
        *(lambda store=store: store.record("child") for store in stores),
        *(store.history for store in stores),
        lambda: Store(path),
    ):
        with pytest.raises(StoreError, match=IN_USE):
            attempt()


def test_a_fork_inside_a_transaction_is_the_parents_alone(tmp_path):
    with Store(tmp_path / "a") as store, Store(tmp_path / "a") as other, Store(tmp_path / "b") as apart:
        other.generation()
        stack = ExitStack()
        stack.enter_context(store.transaction())
        store.record("parent")

        def leave():
            refused(tmp_path / "a", store, other)
            with pytest.raises(StoreError, match=IN_USE):
                stack.close()  # must not commit, nor roll back
            store.close()
            assert apart.record("child")  # another store is not concerned

        assert ended(fork(leave)) == 0
        store.record("parent again")
        stack.close()
        assert ended(fork(lambda: other.record("a later child"))) == 0
        other.record("other")
    assert kinds(tmp_path / "a") == ["created", "parent", "parent again", "a later child", "other"]
    assert kinds(tmp_path / "b") == ["created", "child"]


def test_the_end_of_a_child_that_was_forked_inside_a_transaction_undoes_nothing(tmp_path):
    script = """
import os, sys
from normadapt.store import Store
store = Store(sys.argv[1], timeout=1)
with store.transaction():
    for _ in range(1500):
        store.record("parent", text="x" * 4000)
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    else:
        sys.exit()
store.record("parent")
assert len(store.history(kinds=["parent"])) == 1501 and store.verify().ok
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def hold(context, seconds):
    """A thread inside `context`; returns when it is, with what to join."""
    inside, leave = threading.Event(), threading.Event()

    def work():
        with context:
            inside.set()
            leave.wait(seconds)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(10)
    return thread, leave


def test_a_fork_waits_a_moment_for_another_thread(tmp_path):
    with Store(tmp_path) as store:
        for context in (store.transaction(), store._database.read(), store._database.read_apart()):
            thread, _ = hold(context, 0.1)
            assert ended(fork(lambda: store.record("child"))) == 0
            thread.join()
            store.record("parent")
    assert kinds(tmp_path) == ["created", *["child", "parent"] * 3]


@pytest.mark.parametrize("what", ["transaction", "read", "read_apart"])
def test_a_fork_does_not_wait_long_for_another_thread(tmp_path, what, monkeypatch):
    monkeypatch.setattr(forks, "_WAIT", 0.1)
    with Store(tmp_path) as store:
        store.generation()
        context = store.transaction() if what == "transaction" else getattr(store._database, what)()
        thread, leave = hold(context, 20)
        begun = time.monotonic()
        child = fork(lambda: refused(tmp_path, store))
        assert time.monotonic() - begun < 5
        assert ended(child) == 0
        leave.set()
        thread.join()
        store.record("parent")
    assert kinds(tmp_path) == ["created", "parent"]


def test_a_store_that_is_deleted_between_two_forks_is_missed(tmp_path):
    with Store(tmp_path / "store") as store:
        assert ended(fork(lambda: None)) == 0
        (tmp_path / "store" / "store.db").rename(tmp_path / "elsewhere")
        for _ in range(2):
            with pytest.raises(StoreError, match="was deleted or replaced"):
                store.record("x")
        assert not (tmp_path / "store" / "store.db").exists()
        Store(tmp_path / "store").close()  # another one in its place
        with pytest.raises(StoreError, match="was deleted or replaced"):
            store.record("x")
