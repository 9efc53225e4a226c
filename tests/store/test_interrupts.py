"""Ctrl-C at the worst moments: what was under way is undone or done, and the store goes on."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from normadapt.store import Store


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
        connection, lock = database._writer, database._writing
        if when == "acquire":
            database._writing = Interrupted(lock, when)
        else:
            database._writer = Interrupted(connection, when)
        with pytest.raises(KeyboardInterrupt), store.transaction():  # noqa: PT012
            store.record("interrupted")
            store.write_state("interrupted", {})
        database._writer, database._writing = connection, lock
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
        connection = store._database._writer
        store._database._writer = Interrupted(connection, "ROLLBACK")
        with pytest.raises(KeyboardInterrupt), store.transaction():  # noqa: PT012
            store.record("undone")
            raise RuntimeError
        store._database._writer = connection
        other.record("other")
        store.record("after")
        assert [event.kind for event in store.history()] == ["created", "before", "other", "after"]


def test_a_transaction_that_was_left_open_is_undone_by_the_next_one(tmp_path):
    """Whatever came between a BEGIN and its end: nothing of it may be committed with what comes next."""
    with Store(tmp_path, timeout=0.1) as store:
        store.record("before")
        store._database._writer.execute("BEGIN IMMEDIATE")
        store._database._writer.execute("INSERT INTO states VALUES ('left', '{}')")
        store.record("after")
        assert store.read_state("left") is None
        assert store.verify().ok
