"""`Store`: the snapshots of one adapted model, which of them is in use, and what was done, crash-safe in one folder."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from normadapt.adapted._adapt import AdaptedModel
from normadapt.errors import StoreError
from normadapt.store.content import check_owner, check_state, decode, decode_header, encode, header_of, identity_of
from normadapt.store.database import Database
from normadapt.store.files import Shelf, digest_of, make_folder
from normadapt.store.ledger import (
    all_snapshots,
    enter,
    entries,
    find,
    head_of,
    move_head,
    needed,
    prune,
    rollback_target,
)
from normadapt.store.log import append
from normadapt.store.notes import Notes
from normadapt.store.records import Snapshot, Verification
from normadapt.store.schema import VERSION
from normadapt.store.verification import verify


class Store(Notes):
    """Snapshots of one adapted model, the head (the one in use), an audit log, and notes between processes.

    Everything is in one folder on a local disk. What a method did is on the disk when it returns, in full; what it
    could not do has changed nothing. Any number of threads and processes may read, and none of them waits; one writes
    at a time.

    Snapshot 0 is the source: a model that has seen no data. It is kept for ever. A store belongs to one model, under
    one kind of policy, with or without a profile: what it holds can always be restored.

    Args:
        path: The folder; made if it is not there.
        retain: Snapshots to keep, the source included. Beyond it the oldest go, but never the source, the head, the
            last good one and the one that `rollback()` would go to.
        timeout: Seconds to wait for another writer.
        create: Whether to make a store where there is none.

    Raises:
        StoreError: If the folder cannot be used, or holds something else.
        ValueError: If an argument is out of range.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> import normadapt as na
        >>> adapted = na.adapt(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)))
        >>> with tempfile.TemporaryDirectory() as folder, Store(folder) as store:
        ...     _ = adapted(torch.randn(8, 1, 8, 8))
        ...     _ = store.commit(adapted, "the first eight")
        ...     store.head().number, store.rollback(by="an operator").number, store.verify().ok
        (1, 0, True)
    """

    def __init__(self, path: Path | str, *, retain: int = 100, timeout: float = 10.0, create: bool = True) -> None:
        if isinstance(retain, bool) or not isinstance(retain, int) or retain < 1:
            raise ValueError(f"retain must be a whole number of snapshots from 1; got {retain!r}")
        if not 0 <= timeout < float("inf"):
            raise ValueError(f"timeout must be seconds from 0; got {timeout!r}")
        self.path = Path(path).absolute()
        self.retain = retain
        self.timeout = float(timeout)
        self._shelf = Shelf(self.path / "snapshots")
        if create:
            self._make_folder()
        self._database = Database(self.path, self.timeout, self._born, create=create, content=self._shelf.holds_any)
        if not create:
            self._make_folder()  # of the snapshots, if somebody took it away
        self._owners: dict[str, dict[str, Any]] = {}  # header of snapshot 0, by digest
        with suppress(
            StoreError
        ):  # somebody is writing, or the disk is full: the next one to open the store will sweep
            self._sweep()

    def _make_folder(self) -> None:
        try:
            make_folder(self._shelf.folder)
        except OSError as error:
            raise StoreError(
                f"cannot make a store at {self.path}: {error} -> name a folder that may be written"
            ) from error

    @staticmethod
    def _born(connection: sqlite3.Connection) -> None:
        append(connection, "created", {"format": VERSION})

    # -- snapshots -----------------------------------------------------------------------------------------------

    def commit(
        self,
        adapted: AdaptedModel,
        note: str,
        *,
        good: bool = True,
        state: Mapping[str, Tensor] | None = None,
        **facts: Any,
    ) -> Snapshot:
        """Keep the state that `adapted` has now and move the head to it; the first time also the source, as 0.

        Args:
            adapted: The model that the store belongs to.
            note: Words for the log.
            good: Whether it may be rolled back to without being asked for by number.
            state: What `adapted.snapshot()` gave earlier, to keep that instead.
            **facts: More for the log; plain JSON values.

        Raises:
            SnapshotError: If the store is another model's, or the state must not be used.
            StoreError: If it cannot be written; the head is what it was.
        """
        state = adapted.snapshot() if state is None else state
        header = header_of(adapted, state)
        check_owner(header, identity_of(adapted), "the state")
        check_state(header, state, adapted.source_snapshot)
        data = encode(header, state)
        with self._writing("commit to") as connection:
            self._own(connection, adapted, header)
            snapshot = enter(connection, header, self._put(data), len(data), note, good, facts)
            self._database.level.left.update(prune(connection, self.retain))
        return snapshot

    def commit_source(self, adapted: AdaptedModel) -> Snapshot:
        """Keep the source as snapshot 0 and make it the head, if nothing was committed yet; returns snapshot 0.

        Raises:
            SnapshotError, StoreError: As `commit`.
        """
        state = adapted.source_snapshot()
        with self._writing("commit to") as connection:
            self._own(connection, adapted, header_of(adapted, state))
            return find(connection, 0)

    def _own(self, connection: sqlite3.Connection, adapted: AdaptedModel, header: Mapping[str, Any]) -> None:
        """See to it that the store is this model's: keep its source if the store is new, else compare."""
        if connection.execute("SELECT 1 FROM snapshots WHERE number = 0").fetchone() is None:
            state = adapted.source_snapshot()
            source = header_of(adapted, state)
            check_state(source, state, None)
            data = encode(source, state)
            enter(connection, source, self._put(data), len(data), "the source", True, {})
            return
        zero = find(connection, 0)
        if zero.digest not in self._owners:
            self._owners[zero.digest] = decode_header(self._shelf.get(zero.digest), "snapshot 0")
        check_owner(self._owners[zero.digest], header, f"the store {self.path}")

    def _put(self, data: bytes) -> str:
        digest = digest_of(data)
        self._database.level.put.add(digest)  # before it is there: it may be there after a failure
        self._shelf.put(digest, data)
        return digest

    def head(self) -> Snapshot:
        """The snapshot in use.

        Raises:
            StoreError: If nothing was committed yet.
        """
        with self._database.read() as connection:
            return head_of(connection)

    def snapshots(self) -> tuple[Snapshot, ...]:
        """All that are kept, the source first; none before the first commit."""
        with self._database.read() as connection:
            return all_snapshots(connection)

    def load(self, number: int) -> dict[str, Tensor]:
        """The state of a snapshot, for `AdaptedModel.restore`, after every check.

        Raises:
            StoreError: If there is no such snapshot, or its file is gone or not what was committed.
            SnapshotError: If it holds non-finite numbers, or variances that are not above 0 where the source's are.
        """
        with self._database.read() as connection:
            snapshot = find(connection, number)
        return self._content(snapshot)[1]

    def restore(self, adapted: AdaptedModel, number: int | None = None) -> Snapshot:
        """Put the head (or the snapshot of that number) in use in `adapted`; the head stays where it is.

        Raises:
            StoreError, SnapshotError: As `load`; also if the snapshot is another model's. `adapted` is unchanged then.
        """
        with self._database.read() as connection:
            snapshot = head_of(connection) if number is None else find(connection, number)
        try:
            header, state = self._content(snapshot)
        except StoreError:
            if number is None and self.head() != snapshot:  # another process moved the head on, and pruned this one
                return self.restore(adapted)
            raise
        check_owner(header, identity_of(adapted), f"snapshot {snapshot.number} in {self.path}")
        adapted.restore(state)
        return snapshot

    def _content(self, snapshot: Snapshot) -> tuple[dict[str, Any], dict[str, Tensor]]:
        where = f"snapshot {snapshot.number} in {self.path}"
        data = self._shelf.get(snapshot.digest)
        header, state = decode_header(data, where), decode(data, where)
        check_state(header, state, None if snapshot.number == 0 else lambda: self.load(0))
        return header, state

    def rollback(self, to: int | None = None, *, by: str = "", reason: str = "") -> Snapshot:
        """Move the head back; nothing is deleted, and `rollback(to=...)` leads forward again.

        Args:
            to: Number of a snapshot. None: the last good one that the head came from, or the source.
            by: Who wants it.
            reason: Why.

        Returns:
            The new head. Models in use take it over with `restore`.

        Raises:
            StoreError: If there is no such snapshot, or its file is damaged: the head is what it was.
        """
        with self._writing("roll back") as connection:
            before = head_of(connection)
            snapshot = find(connection, rollback_target(connection, before.number) if to is None else to)
            self._shelf.get(snapshot.digest)
            move_head(connection, snapshot.number)
            facts = {"from": before.number, "to": snapshot.number, "by": str(by), "reason": str(reason)}
            append(connection, "rollback", facts)
        return snapshot

    def transaction(self) -> AbstractContextManager[Store]:
        """Context in which all that this thread writes to the store happens together, or on an exception not at all.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder, Store(folder) as store, store.transaction():
            ...     _ = store.record("stage", name="shadow")
            ...     store.write_state("pilot", {"stage": "shadow"})
        """
        return self._database.write_for(self, "write to", tidy=self._remove)

    # -- care ----------------------------------------------------------------------------------------------------

    def verify(self) -> Verification:
        """Check the chain of events, that they lead to the snapshots, head and commands as they are, and every file.

        Not in the log, and so not checked, are what `write_state` wrote and whether a command was taken.
        """
        with self._database.read_apart() as connection:
            return verify(connection, self._shelf, self._entries)

    def _entries(self) -> set[tuple[int, str]]:
        with self._database.read() as connection:
            return entries(connection)

    def close(self) -> None:
        """Close the connections; the store cannot be used after it."""
        self._database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, here or in another process, opens the same folder for itself."""
        return {"path": self.path, "retain": self.retain, "timeout": self.timeout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Store.__init__(self, **state, create=False)  # what was deleted meanwhile must not come back empty

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    # -- inside --------------------------------------------------------------------------------------------------

    def _writing(self, verb: str) -> AbstractContextManager[sqlite3.Connection]:
        """A transaction of which files may be left that nothing needs: those go once it is on the disk, or undone."""
        return self._database.write(verb, tidy=self._remove)

    def _remove(self, digests: set[str]) -> None:
        """Take files away that no row refers to, under the write lock: nobody may commit the same content meanwhile."""
        with (
            suppress(StoreError),
            self._database.write("prune") as connection,
        ):  # what stays is swept at the next opening
            for digest in digests - needed(connection):
                self._shelf.remove(digest)

    def _sweep(self) -> None:
        """Remove what a killed writer left behind. Under the write lock, where no file is on its way to a row."""
        with self._database.read() as connection:
            if not self._shelf.orphans(needed(connection)):
                return
        with self._database.write("sweep", timeout=0.0) as connection:
            found = self._shelf.orphans(needed(connection))
            for path in found:
                path.unlink(missing_ok=True)
            if found:
                append(connection, "swept", {"files": len(found)})
