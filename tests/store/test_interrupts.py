"""Ctrl-C at the worst moments: what was under way is undone or done, and the store goes on."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from normadapt.store import Store, transactions
from normadapt.store.transactions import Transaction


class Interrupted:
    """A connection, or a lock, of which a call is interrupted as soon as it has returned: where Python looks for it."""

    def __init__(self, inner, when):
        self.inner, self.when = inner, when

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def _then(self, result, done):
        if self.when is not None and done.startswith(self.when):
            self.when = None
            raise KeyboardInterrupt
        return result

    def execute(self, sql, *args):
        return self._then(self.inner.execute(sql, *args), sql)

    def acquire(self, **kwargs):
        return self._then(self.inner.acquire(**kwargs), "acquire")


STATEMENTS = ["BEGIN", "SAVEPOINT", "INSERT", "RELEASE", "COMMIT", "acquire"]


@pytest.mark.parametrize("when", STATEMENTS)
def test_an_interrupt_leaves_no_lock_behind(tmp_path, when):
    with Store(tmp_path, timeout=0.1) as store, Store(tmp_path, timeout=0.1) as other, ThreadPoolExecutor(1) as pool:
        database = store._database
        store.record("before")
        connection, lock = database.writer, database.writing
        if when == "acquire":
            database.writing = Interrupted(lock, when)
        else:
            database.writer = Interrupted(connection, when)
        with pytest.raises(KeyboardInterrupt), store.transaction():  # noqa: PT012
            store.record("interrupted")
            store.write_state("interrupted", {})
        database.writer, database.writing = connection, lock
        done = bool(store.history(kinds=["interrupted"]))
        assert done == (when == "COMMIT")
        assert (store.read_state("interrupted") is not None) == done
        other.record("other handle")
        pool.submit(store.record, "other thread").result()
        store.record("same thread")
        assert [event.kind for event in store.history(3)] == ["other handle", "other thread", "same thread"]
        assert store.verify().ok


def test_an_interrupt_during_rolling_back(tmp_path):
    with Store(tmp_path, timeout=0.1) as store, Store(tmp_path, timeout=0.1) as other:
        store.record("before")
        connection = store._database.writer
        store._database.writer = Interrupted(connection, "ROLLBACK")
        with pytest.raises(KeyboardInterrupt), store.transaction():  # noqa: PT012
            store.record("undone")
            raise RuntimeError
        store._database.writer = connection
        other.record("other")
        store.record("after")
        assert [event.kind for event in store.history()] == ["created", "before", "other", "after"]


def test_a_transaction_that_was_left_open_is_undone_by_the_next_one(tmp_path):
    """Whatever came between a BEGIN and its end: nothing of it may be committed with what comes next."""
    with Store(tmp_path, timeout=0.1) as store:
        store.record("before")
        store._database.writer.execute("BEGIN IMMEDIATE")
        store._database.writer.execute("INSERT INTO states VALUES ('left', '{}')")
        store.record("after")
        assert store.read_state("left") is None
        assert store.verify().ok


class Cut(Transaction):
    """Of which an interrupt takes the end away, before its first instruction."""

    def __exit__(self, kind, error, traceback):
        raise KeyboardInterrupt


@pytest.mark.parametrize("write", ["in the handler", "behind it", "with the traceback kept"])
def test_what_is_written_after_an_interrupt_is_not_undone_with_what_came_before(tmp_path, monkeypatch, write):
    with Store(tmp_path, timeout=0.1) as store, Store(tmp_path, timeout=0.1) as other:
        store.record("before")
        transaction = store.transaction()
        transaction.__class__ = Cut
        monkeypatch.setattr(transactions, "_END", Cut.__exit__.__code__)
        kept = None
        try:
            with transaction:
                store.record("undone")
        except KeyboardInterrupt as error:
            del transaction
            if write == "in the handler":
                store.record("after")
            if write == "with the traceback kept":
                kept = error
        if kept is not None:
            monkeypatch.setattr(sys, "last_value", kept, raising=False)  # as the interactive interpreter does
        if write != "in the handler":
            store.record("after")
        other.record("other")
        kept = None
        monkeypatch.undo()
        store.record("end")
        assert [event.kind for event in store.history()] == ["created", "before", "after", "other", "end"]


def test_a_transaction_that_nobody_is_inside_of_any_more_ends_at_once(tmp_path):
    with Store(tmp_path, timeout=0.1) as store, Store(tmp_path, timeout=0.1) as other:
        transaction = store.transaction()
        transaction.__enter__()
        store.record("undone")
        nested = store.transaction()
        nested.__enter__()
        store.record("undone")
        del nested
        store.record("undone")
        del transaction
        other.record("other")
        store.record("after")
        assert [event.kind for event in store.history()] == ["created", "other", "after"]


def test_a_savepoint_that_was_cut_off_is_undone_alone(tmp_path):
    with Store(tmp_path, timeout=0.1) as store:
        with store.transaction():
            store.record("outer")
            nested = store.transaction()
            nested.__enter__()
            store.record("undone")
            del nested
            store.record("inner")
        assert [event.kind for event in store.history()] == ["created", "outer", "inner"]
        assert store.verify().ok
