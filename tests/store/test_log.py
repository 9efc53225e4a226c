"""The audit log: only ever longer, quick to read, and any change to it is found."""

import json
import sqlite3
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

import numpy as np
import pytest
import torch

from normadapt.errors import StoreError
from normadapt.store import OWN_KINDS, Store, log, records
from normadapt.store.schema import TRIGGERS
from store.tiny import adapted, feed


@pytest.fixture
def store(tmp_path):
    """With a snapshot 0 and 1, rolled back to 0, and two events of the user's."""
    with Store(tmp_path / "store") as store:
        a = adapted()
        feed(a)
        store.commit(a, "kept")
        store.record("stage", name="shadow")
        store.record("stage", name="canary")
        store.rollback(by="Eva")
        yield store


class Stage(Enum):
    CANARY = "canary"


def test_facts_become_plain_json(store):
    given = {
        "nan": float("nan"),
        "inf": [float("inf"), -float("inf")],
        "numpy": np.float32(0.5),
        "array": {"nan": np.float64("nan")},
        "torch": torch.tensor(3),
        "big": 2**80,
        "pair": (1, "a"),
        "stage": Stage.CANARY,
        "flag": True,
        "keys": {1: None},
        "long": np.longdouble(0.5),
        "kind": "a fact may be called so",
    }
    event = store.record("odd", **given)
    expected = {
        "nan": None,
        "inf": [None, None],
        "numpy": 0.5,
        "array": {"nan": None},
        "torch": 3,
        "big": 2**80,
        "pair": [1, "a"],
        "stage": "canary",
        "flag": True,
        "keys": {"1": None},
        "long": 0.5,
        "kind": "a fact may be called so",
    }
    assert event.facts == expected
    assert store.history(1) == (event,)
    assert store.verify().ok


@dataclass
class Other:
    x: int


@pytest.mark.parametrize("value", [object(), Other(1), torch.ones(2), {1, 2}, b"x", np.clongdouble(1)])
def test_other_facts_are_named(store, value):
    before = store.history()
    with pytest.raises(ValueError, match=r"facts\['deep'\]\[0\] holds"):
        store.record("odd", deep=[value])
    assert store.history() == before


def test_no_fact_is_lost_or_endless(store):
    before = store.history()
    with pytest.raises(ValueError, match=r"facts\['x'\] has two keys that are both '1' in JSON -> rename one"):
        store.record("odd", x={1: "a", "1": "b"})
    endless = []
    endless.append(endless)
    with pytest.raises(ValueError, match="nested too deeply"):
        store.record("odd", x=endless)
    assert store.history() == before


def test_names_are_proper_unicode(store):
    for attempt in (
        lambda: store.record("\ud800"),
        lambda: store.send("\ud800"),
        lambda: store.write_state("\ud800", {}),
        lambda: store.read_state("\ud800"),
        lambda: store.history(kinds=["\ud800"]),
    ):
        with pytest.raises(ValueError, match="must be proper Unicode"):
            attempt()
    store.record("a\0b \N{SNOWMAN}")
    assert store.history(kinds=["a\0b \N{SNOWMAN}"])
    assert store.verify().ok


def test_kinds_of_the_stores_own_are_refused(store):
    for kind in (*OWN_KINDS, "", None):
        with pytest.raises(ValueError, match="kind"):
            store.record(kind)


def test_history_gives_the_newest_oldest_first(store):
    kinds = [event.kind for event in store.history()]
    assert kinds == ["created", "commit", "commit", "stage", "stage", "rollback"]
    assert [event.seq for event in store.history()] == [1, 2, 3, 4, 5, 6]
    assert [event.seq for event in store.history(2)] == [5, 6]
    assert [event.seq for event in store.history(2, kinds=["stage", "commit"])] == [4, 5]
    assert [event.seq for event in store.history(kinds="commit")] == [2, 3]
    assert [event.seq for event in store.history(after=4)] == [5, 6]
    assert [event.seq for event in store.history(1, after=4, kinds=["stage"])] == [5]
    assert store.events_since(5) == store.history(1)
    assert store.history(0) == store.history(kinds=[]) == store.events_since(6) == ()
    assert store.history(2**70, after=-(2**70)) == store.history(np.int64(10)) == store.history()
    assert store.history(after=2**70) == ()
    for limit in (-1, 1.5, "1"):
        with pytest.raises(ValueError, match="limit"):
            store.history(limit)
    with pytest.raises(ValueError, match="after must be a whole number"):
        store.history(after=1.5)


def test_a_huge_history_is_read_quickly(tmp_path, monkeypatch):
    with Store(tmp_path) as store:
        monkeypatch.setattr(log, "clock", lambda: 1.0)
        with store._database.write("fill") as connection:
            previous, rows = store.history(1)[0].digest, []
            for seq in range(2, 100_002):
                kind = "rare" if seq == 5 else "item"
                digest = records.event_digest(previous, seq, 1.0, kind, {"n": seq})
                rows.append((seq, 1.0, kind, records.canonical({"n": seq}), digest, previous))
                previous = digest
            connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", rows)
        store.record("last")
        queries = (
            lambda: store.history(limit=100),
            lambda: store.history(limit=100, kinds=["rare", "item"]),
            lambda: store.history(limit=100, kinds=["rare"]),
            lambda: store.events_since(100_000),
            lambda: store.record("more"),
            store.generation,
        )
        for query in queries:
            seconds = []
            for _ in range(3):
                begun = time.perf_counter()
                query()
                seconds.append(time.perf_counter() - begun)
            assert min(seconds) < 0.02  # reading all of it takes half a second
        assert store.history(limit=100)[0].seq == store.history(1)[0].seq - 99
        assert [event.facts for event in store.history(100, kinds=["rare"])] == [{"n": 5}]
        asked = []
        with store._database.read() as connection:
            connection.set_trace_callback(asked.append)
            store.history(limit=100, kinds=["rare"])
            connection.set_trace_callback(None)
            plan = connection.execute(f"EXPLAIN QUERY PLAN {asked[-1]}").fetchall()
        assert "USING INDEX events_by_kind" in plan[0][-1]
        assert store.verify().ok


@pytest.mark.parametrize("moment", [float("nan"), float("inf"), -5.0, 0])
def test_a_clock_that_misbehaves_stops_nothing(store, monkeypatch, moment):
    monkeypatch.setattr(time, "time", lambda: moment)
    event = store.record("odd clock")
    assert event.time == max(moment, -5.0) if moment in (-5.0, 0) else event.time == 0
    store.commit(adapted(), "x")
    store.send("pause")
    assert len(store.take_commands()) == 1
    assert store.verify().ok


def tamper(store, *statements, triggers=True):
    """What somebody with an editor for SQLite files does; with `triggers` off also to the log."""
    with sqlite3.connect(store.path / "store.db") as connection:
        for name in () if triggers else TRIGGERS:
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            connection.execute(statement)
        connection.commit()
        for sql in () if triggers else TRIGGERS.values():
            connection.execute(sql)
    connection.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE events SET facts = '{}' WHERE seq = 4",
        "DELETE FROM events WHERE seq = 6",
        "DELETE FROM events",
        "INSERT OR REPLACE INTO events SELECT 4, time, kind, '{}', digest, previous FROM events WHERE seq = 4",
        "INSERT INTO events SELECT 0, time, kind, facts, digest, previous FROM events WHERE seq = 4",
        "INSERT INTO events SELECT NULL, time, kind, facts, digest, previous FROM events WHERE seq = 4",
        "REPLACE INTO events SELECT * FROM events WHERE seq = 6",
    ],
)
def test_the_database_itself_refuses_changes_to_the_log(store, statement):
    before = store.history()
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        tamper(store, statement)
    assert store.history() == before
    assert store.verify().ok


FORGED = "INSERT INTO commands (time, command, facts) VALUES (0, 'promote', '{}')"
TAMPERED = {
    "facts": ("event 4 was changed", ['UPDATE events SET facts = \'{"name":"full"}\' WHERE seq = 4']),
    "kind": ("event 4 was changed", ["UPDATE events SET kind = 'note' WHERE seq = 4"]),
    "time": ("event 4 was changed", ["UPDATE events SET time = time + 1 WHERE seq = 4"]),
    "no JSON": ("event 4 makes no sense", ["UPDATE events SET facts = 'x' WHERE seq = 4"]),
    "taken out": ("event 4 is missing", ["DELETE FROM events WHERE seq = 4"]),
    "first": ("event 1 is missing", ["DELETE FROM events WHERE seq = 1"]),
    "all": ("the log is empty", ["DELETE FROM events"]),
    "rollback cut off": ("the head is 0; by the log it is 1", ["DELETE FROM events WHERE seq = 6"]),
    "cut off with the head": (
        "the generation is 3; by the log it is 2",
        ["DELETE FROM events WHERE seq = 6", "UPDATE pointer SET head = 1"],
    ),
    "swapped": (
        "event 4 was changed",
        [
            "UPDATE events SET seq = 99 WHERE seq = 4",
            "UPDATE events SET seq = 4 WHERE seq = 5",
            "UPDATE events SET seq = 5 WHERE seq = 99",
        ],
    ),
    "a fact twice": (
        "event 4 was changed: its facts are not written as the store writes them",
        ['UPDATE events SET facts = \'{"name":"full","name":"shadow"}\' WHERE seq = 4'],
    ),
    "spaces": ("event 4 was changed", ['UPDATE events SET facts = \'{"name": "shadow"}\' WHERE seq = 4']),
    "facts of another kind": ("event 6 makes no sense", ["UPDATE events SET facts = '[]' WHERE seq = 6"]),
    "last one no JSON": ("event 6 makes no sense", ["UPDATE events SET facts = 'x' WHERE seq = 6"]),
    "command put in": ("command 1 is not in the log", [FORGED]),
    "command no JSON": (
        "command 1 is not in the log",
        ["INSERT INTO commands (time, command, facts) VALUES (0, 'promote', 'x')"],
    ),
    "commands gone": ("the table commands is gone or changed", ["DROP TABLE commands"]),
    "snapshots gone": ("the table snapshots is gone or changed", ["DROP TABLE snapshots"]),
    "pointer gone": ("the pointer to the head is not what the store wrote (it is gone)", ["DELETE FROM pointer"]),
    "pointer's table gone": ("the table pointer is gone or changed", ["DROP TABLE pointer"]),
    "head no number": ("the pointer to the head is not what", ["UPDATE pointer SET head = 'x'"]),
    "index gone": ("the index events_by_kind is gone or changed", ["DROP INDEX events_by_kind"]),
    "trigger put in": (
        "the trigger quiet is not the store's",
        ["CREATE TRIGGER quiet BEFORE INSERT ON commands BEGIN SELECT RAISE(IGNORE); END"],
    ),
    "note no JSON": ("the entry of snapshot 1 is not what", ["UPDATE snapshots SET note = 'x' WHERE number = 1"]),
    "note no text": ("the entry of snapshot 1 is not what", ["UPDATE snapshots SET note = '5' WHERE number = 1"]),
    "streams": ("the entry of snapshot 0 is not what", ["UPDATE snapshots SET streams = '5' WHERE number = 0"]),
    "parent no number": (
        "the entry of snapshot 1 is not what",
        ["UPDATE snapshots SET parent = 'a' WHERE number = 1"],
    ),
    "state": ("the state 'a' is not what the store wrote", ["INSERT INTO states VALUES ('a', 'x')"]),
    "head": ("the head is 1; by the log it is 0", ["UPDATE pointer SET head = 1"]),
    "head nowhere": ("the head 7 is not among the snapshots", ["UPDATE pointer SET head = 7"]),
    "good": ("snapshot 1 differs from the log in good", ["UPDATE snapshots SET good = 0 WHERE number = 1"]),
    "note": ("snapshot 1 differs from the log in note", ["UPDATE snapshots SET note = '\"x\"' WHERE number = 1"]),
    "parent": ("snapshot 1 differs from the log in parent", ["UPDATE snapshots SET parent = NULL WHERE number = 1"]),
    "digest": (
        "snapshot 1 differs from the log in digest",
        ["UPDATE snapshots SET digest = (SELECT digest FROM snapshots WHERE number = 0) WHERE number = 1"],
    ),
    "snapshot gone": ("snapshot 1 is gone", ["DELETE FROM snapshots WHERE number = 1"]),
    "source gone": ("snapshot 0, the source, is gone", ["DELETE FROM snapshots WHERE number = 0"]),
    "snapshot put in": (
        "snapshot 2 is not in the log",
        [
            "INSERT INTO snapshots SELECT 2, digest, created, note, good, model_name, fingerprint, streams, bytes, "
            "version, parent FROM snapshots WHERE number = 1"
        ],
    ),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_verify_finds_tampering(store, case):
    words, statements = TAMPERED[case]
    assert store.verify().ok
    tamper(store, *statements, triggers=False)
    found = store.verify()
    assert not found.ok
    assert any(words in problem for problem in found.problems), found.problems
    assert any("trigger" in problem for problem in found.problems) == ("trigger" in case)


@pytest.mark.parametrize("case", TAMPERED)
def test_what_was_tampered_with_gives_errors_with_a_remedy_or_none(store, case):
    store.send("pause")  # so that there is one to take
    tamper(store, *TAMPERED[case][1], triggers=False)
    a = adapted()
    for call in (
        store.head,
        store.snapshots,
        lambda: store.restore(a),
        store.history,
        store.generation,
        lambda: store.read_state("a"),
        store.take_commands,
        lambda: store.send("pause"),
        lambda: store.commit(a, "x"),
        lambda: store.rollback(1),
    ):
        with suppress(StoreError):  # and nothing else
            call()


def test_what_makes_no_sense_is_named(store):
    tamper(
        store,
        "UPDATE events SET facts = 'x' WHERE seq = 6",
        "UPDATE snapshots SET note = 'x' WHERE number = 0",
        "INSERT INTO commands (time, command, facts) VALUES (0, 'promote', 'x')",
        "INSERT INTO states VALUES ('a', 'x')",
        triggers=False,
    )
    for words, call in {
        "the entry of snapshot 0": store.head,
        "the facts of event 6": store.history,
        "the facts of command 1": store.take_commands,
        "the state 'a'": lambda: store.read_state("a"),
    }.items():
        with pytest.raises(StoreError, match=f"{words} is not what the store wrote .* -> verify"):
            call()
    tamper(store, "DELETE FROM pointer")
    for call in (store.head, store.generation, lambda: store.send("x"), store.rollback):
        with pytest.raises(StoreError, match="the pointer to the head is not what the store wrote"):
            call()


def test_verify_is_content_with_every_command_that_was_sent(store):
    """Taken or not, from a transaction that failed or not, with facts of every kind."""
    store.send("pause", by="Eva", until=float("nan"), deep={"b": [1, 0.1], "a": "\ud800"})
    with pytest.raises(KeyError), store.transaction():  # noqa: PT012
        store.send("undone")
        raise KeyError
    assert store.verify().ok
    assert len(store.take_commands()) == 1
    with store.transaction():
        store.send("resume")
        store.commit(adapted(), "x")
        store.send("promote")
    assert store.verify().ok
    assert [command.number for command in store.take_commands()] == [2, 3]
    assert store.verify().ok
    for statement in (FORGED, "UPDATE commands SET command = 'x' WHERE number = 2", "DELETE FROM commands"):
        before = len(store.verify().problems)
        tamper(store, statement)
        assert len(store.verify().problems) > before


def test_verify_finds_that_the_triggers_are_gone(store):
    tamper(store, "DROP TRIGGER events_are_not_changed")
    assert store.verify().problems == ("the trigger events_are_not_changed is gone or changed",)


def test_an_event_forged_with_its_digest_breaks_the_chain(store):
    event = store.history()[3]
    forged = records.event_digest(event.previous, 4, event.time, "stage", {"name": "full"})
    facts = json.dumps({"name": "full"}, separators=(",", ":"))
    tamper(store, f"UPDATE events SET facts = '{facts}', digest = '{forged}' WHERE seq = 4", triggers=False)
    assert store.verify().problems == ("event 5 does not follow the one before it",)


def test_the_last_digest_is_an_anchor(store):
    before = store.verify().digest
    assert before == store.history(1)[0].digest
    store.record("more")
    assert store.verify().digest != before
    assert before in {event.digest for event in store.history()}


def test_damaged_content_is_found_and_refused(store):
    zero, one = store.snapshots()
    path = store.path / "snapshots" / f"{one.digest}.safetensors"
    whole = path.read_bytes()
    a = adapted()
    before = a.snapshot()
    for data in (whole[:-1], whole[:-8] + bytes(8), b"", whole + b"x"):
        path.write_bytes(data)
        assert "not what was committed" in store.verify().problems[0]
        for attempt in (lambda: store.load(1), lambda: store.restore(a, 1), lambda: store.rollback(1)):
            with pytest.raises(StoreError, match="its hash is wrong -> bring back a copy"):
                attempt()
        assert store.head() == zero
    assert all(torch.equal(value, before[key]) for key, value in a.snapshot().items())
    feed(a)
    assert store.commit(a, "the same content once more").digest == one.digest
    assert path.read_bytes() == whole  # put right
    assert store.verify().ok
    path.unlink()
    assert "cannot be read" in store.verify().problems[0]
    with pytest.raises(StoreError, match="if it was not pruned just now, it was deleted"):
        store.load(1)
    assert store.restore(a, 0) == zero
