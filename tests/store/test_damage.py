"""A store that is taken away, may not be written, is damaged, or is none: an error that says so, and what to do."""

import hashlib
import json
import os
import shutil
import sqlite3
import stat

import pytest
import safetensors.torch
import torch

from normadapt.errors import SnapshotError, StoreError
from normadapt.store import Store
from normadapt.store.content import decode_header, encode
from store.tiny import adapted, ended, feed, fork


def begun(path):
    a = adapted()
    feed(a)
    store = Store(path, timeout=0.1)
    store.commit(a, "kept")
    return store, a


def calls(store, a):
    return {
        "commit": lambda: store.commit(a, "x"),
        "head": store.head,
        "restore": lambda: store.restore(a),
        "rollback": store.rollback,
        "record": lambda: store.record("x"),
        "history": store.history,
        "generation": store.generation,
        "read_state": lambda: store.read_state("x"),
        "write_state": lambda: store.write_state("x", {}),
        "send": lambda: store.send("x"),
        "take_commands": store.take_commands,
        "verify": store.verify,
    }


TAKEN = {
    "folder": shutil.rmtree,
    "folder moved": lambda path: path.rename(path.with_name("elsewhere")),
    "database": lambda path: (path / "store.db").unlink(),
    "log before the tables": lambda path: (path / "store.db-wal").unlink(),
}


@pytest.mark.parametrize("what", TAKEN)
def test_taken_away_under_the_process(tmp_path, what):
    path = tmp_path / "store"
    store, a = begun(path)
    TAKEN[what](path)
    for name, call in calls(store, a).items():
        with pytest.raises(StoreError, match="was deleted or replaced while it was open -> bring the folder back"):
            call()
        assert name
    store.close()
    assert a.snapshot()  # the model is not concerned


def test_replaced_under_the_process(tmp_path):
    path = tmp_path / "store"
    store, _ = begun(path)
    path.rename(tmp_path / "old")
    begun(path)[0].close()
    with pytest.raises(StoreError, match="deleted or replaced"):
        store.record("into the wrong one")
    with Store(path) as other:
        assert not other.history(kinds=["into the wrong one"])
    with Store(tmp_path / "old") as moved:  # what was moved is whole
        assert moved.verify().ok


def test_the_folder_of_the_snapshots_taken_away(tmp_path):
    store, a = begun(tmp_path)
    kept = store.head()
    shutil.rmtree(tmp_path / "snapshots")
    feed(a, 1)
    with pytest.raises(StoreError, match="No such file"):
        store.commit(a, "x")
    with pytest.raises(StoreError, match="cannot be read"):
        store.restore(a)
    assert store.head() == kept
    assert len(store.verify().problems) == 2
    store.close()
    with Store(tmp_path) as store:  # opens all the same, for the log
        assert store.head() == kept
        assert not store.verify().ok


def test_no_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    for path in (file, file / "below"):
        with pytest.raises(StoreError, match="cannot make a store at"):
            Store(path)
    assert file.read_text() == "x"


@pytest.mark.parametrize("content", [b"no database" * 1000, b"SQLite format 3\0" + b"x" * 5000, b"x"])
def test_a_file_that_is_no_database(tmp_path, content):
    (tmp_path / "store.db").write_bytes(content)
    with pytest.raises(StoreError, match=r"not a database"):
        Store(tmp_path)
    assert (tmp_path / "store.db").read_bytes() == content


def test_another_programs_database(tmp_path):
    with sqlite3.connect(tmp_path / "store.db") as connection:
        connection.execute("CREATE TABLE events (x)")
    connection.close()
    before = (tmp_path / "store.db").read_bytes()
    with pytest.raises(StoreError, match="another program's database -> name another folder"):
        Store(tmp_path)
    assert (tmp_path / "store.db").read_bytes() == before


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (1, "has format 1, of a rule that is gone; this version reads 2 -> name another folder"),
        (3, "has format 3; this version reads 2 -> use the version that wrote it"),
    ],
)
def test_another_versions_store(tmp_path, version, words):
    begun(tmp_path)[0].close()
    with sqlite3.connect(tmp_path / "store.db") as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    before = (tmp_path / "store.db").read_bytes()
    for create in (True, False):
        with pytest.raises(StoreError, match=words):
            Store(tmp_path, create=create)
    assert (tmp_path / "store.db").read_bytes() == before


def test_a_former_versions_state(tmp_path):
    store, a = begun(tmp_path)
    head, state = store.head(), a.snapshot()
    del state["format#"]
    with pytest.raises(SnapshotError, match="another version of normadapt"):
        store.commit(a, "of old", state=state)
    with pytest.raises(SnapshotError, match="another version of normadapt"):
        a.restore(state)
    assert store.head() == head


def test_a_damaged_database(tmp_path):
    store, a = begun(tmp_path)
    store.record("long", text="x" * 200_000)
    store.close()
    data = bytearray((tmp_path / "store.db").read_bytes())
    for start in range(4096, len(data) - 4096, 4096):
        data[start : start + 200] = b"\xff" * 200
    (tmp_path / "store.db").write_bytes(bytes(data))
    with pytest.raises(StoreError, match=r"damaged|disk image"), Store(tmp_path) as store:
        store.restore(a)


@pytest.mark.parametrize("kept", [1, 1000, 5000, 20_000, None])
def test_a_database_cut_short(tmp_path, kept):
    store, a = begun(tmp_path)
    store.close()
    if kept is not None:
        assert (tmp_path / "store.db").stat().st_size > kept
        os.truncate(tmp_path / "store.db", kept)
    found = []
    try:
        with Store(tmp_path) as store:
            found += store.verify().problems
            store.restore(a)
    except StoreError as error:  # found at one place or at another
        found.append(str(error))
    assert bool(found) == (kept is not None)


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize("lost", ["deleted", "emptied", "without tables"])
def test_without_its_database_a_store_keeps_its_snapshots(tmp_path, lost, create):
    store, _ = begun(tmp_path)
    kept = store.head()
    store.close()
    database = tmp_path / "store.db"
    whole, names = database.read_bytes(), sorted((tmp_path / "snapshots").iterdir())
    database.unlink()
    if lost == "emptied":
        database.touch()
    if lost == "without tables":
        with sqlite3.connect(database) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
        connection.close()
    for _ in range(2):
        with pytest.raises(StoreError, match=r"store\.db is gone or empty -> bring store\.db back from a copy"):
            Store(tmp_path, create=create)
        assert sorted((tmp_path / "snapshots").iterdir()) == names
    assert database.exists() == (lost != "deleted")
    database.write_bytes(whole)
    with Store(tmp_path, create=create) as store:
        assert store.head() == kept
        assert store.verify().ok


def test_a_wal_without_its_database_is_not_thrown_away(tmp_path):
    with Store(tmp_path) as store:
        store.record("only in the WAL")
        wal = (tmp_path / "store.db-wal").read_bytes()
    assert wal
    (tmp_path / "store.db").unlink()
    (tmp_path / "store.db-wal").write_bytes(wal)
    with pytest.raises(StoreError, match="is gone or empty"):
        Store(tmp_path)
    assert (tmp_path / "store.db-wal").read_bytes() == wal


@pytest.mark.parametrize("what", ["nothing", "an empty file", "no tables"])
def test_nothing_is_made_where_nothing_may_be_made(tmp_path, what):
    database = tmp_path / "store.db"
    if what == "an empty file":
        database.touch()
    if what == "no tables":
        with sqlite3.connect(database) as connection:
            connection.execute("VACUUM")  # writes the header
            connection.execute("PRAGMA journal_mode = WAL")
        connection.close()
    before = database.read_bytes() if database.exists() else None
    with pytest.raises(StoreError, match="there is no store at"):
        Store(tmp_path, create=False)
    assert (database.read_bytes() if database.exists() else None) == before
    assert not (tmp_path / "snapshots").exists()
    Store(tmp_path).close()  # a file without anything in it may be made a store
    Store(tmp_path, create=False).close()


def test_a_copy_by_vacuum_is_a_store(tmp_path):
    store, _ = begun(tmp_path)
    kept = store.head()
    store.close()
    with sqlite3.connect(tmp_path / "store.db") as connection:
        connection.execute(f"VACUUM INTO '{tmp_path / 'copy.db'}'")  # not in WAL mode
    connection.close()
    (tmp_path / "copy.db").replace(tmp_path / "store.db")
    with Store(tmp_path) as store:
        assert store.head() == kept
        store.record("goes on")
        assert store.verify().ok
        with store._database.read() as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_other_files_in_the_folders_are_left_alone(tmp_path):
    begun(tmp_path)[0].close()
    strange = [tmp_path / "notes.txt", tmp_path / "snapshots" / "best.safetensors", tmp_path / "snapshots" / "x.tmp"]
    for path in strange:
        path.write_text("mine")
    orphan = tmp_path / "snapshots" / f"{'0' * 64}.safetensors"
    beginning = orphan.with_name(f"{orphan.name}.123.tmp")
    for path in (orphan, beginning):
        path.write_text("left behind")
    with Store(tmp_path) as store:
        assert store.history(1)[0].facts == {"files": 2}
        assert store.verify().ok
        assert store.verify().orphans == 0
    assert all(path.exists() for path in strange)
    assert not orphan.exists()
    assert not beginning.exists()


def test_a_folder_that_may_not_be_written(tmp_path):
    """Root may write everywhere: a child becomes nobody for it."""
    path = tmp_path / "store"
    store, a = begun(path)
    store.close()
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == path.owner() and os.geteuid() == 0:
            folder.chmod(folder.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
    for below in (path, path / "snapshots"):
        below.chmod(0o555)
    for file in path.rglob("*.*"):
        file.chmod(0o444)

    def use():
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        with pytest.raises(StoreError, match="give write access"), Store(path) as store:
            store.commit(a, "x")
        with pytest.raises(StoreError, match="name a folder that may be written"):
            Store(path / "below")

    try:
        assert ended(fork(use)) == 0
    finally:
        for below in (path, path / "snapshots"):
            below.chmod(0o755)
    with Store(path) as store:
        assert store.verify().ok


def smuggled(store, change):
    """Put other content under the head's row, with its right hash, as no commit would."""
    head = store.head()
    folder = store.path / "snapshots"
    data = (folder / f"{head.digest}.safetensors").read_bytes()
    header, state = decode_header(data, "it"), safetensors.torch.load(data)
    data = change(header, state)
    digest = hashlib.sha256(data).hexdigest()
    (folder / f"{digest}.safetensors").write_bytes(data)
    with sqlite3.connect(store.path / "store.db") as connection:
        connection.execute("UPDATE snapshots SET digest = ? WHERE number = ?", (digest, head.number))
    connection.close()


def with_entry(ending, value):
    def change(header, state):
        key = next(key for key in state if key.endswith(ending))
        return encode(header, {**state, key: value(state[key])})

    return change


def without_variance(header, state):
    return encode(header, {key: value for key, value in state.items() if not key.endswith("buffers|1")})


FOREIGN = {
    "no safetensors": (StoreError, "not a snapshot", lambda header, state: b"x" * 100),
    "nothing": (StoreError, "not a snapshot", lambda header, state: b""),
    "another's file": (StoreError, "not a snapshot", lambda header, state: safetensors.torch.save(state)),
    "another format": (StoreError, "has format", lambda header, state: encode({**header, "format": "x"}, state)),
    "cut": (StoreError, "safetensors", lambda header, state: encode(header, state)[:-10]),
    "another model's": (SnapshotError, "is of", lambda header, state: encode({**header, "fingerprint": "0"}, state)),
    "NaN": (SnapshotError, "non-finite", with_entry("buffers|0", lambda value: value * float("nan"))),
    "infinite number": (SnapshotError, "non-finite", with_entry("count#", lambda value: value / 0)),
    "variance 0": (SnapshotError, "not above 0", with_entry("buffers|1", torch.zeros_like)),
    "variance below 0": (SnapshotError, "not above 0", with_entry("buffers|1", torch.neg)),
    "other shape": (SnapshotError, "expected a variance of shape", with_entry("buffers|1", lambda v: v[:-1])),
    "no variance": (SnapshotError, "expected a variance of shape", without_variance),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_content_is_not_put_in_use(tmp_path, case):
    kind, words, change = FOREIGN[case]
    store, a = begun(tmp_path)
    before = {key: value.clone() for key, value in a.snapshot().items()}
    smuggled(store, change)
    with pytest.raises(kind, match=words):
        store.restore(a)
    assert all(torch.equal(value, before[key]) for key, value in a.snapshot().items())
    assert not store.verify().ok
    assert json.dumps(store.verify().problems)
