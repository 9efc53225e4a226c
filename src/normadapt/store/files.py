"""Content under its hash, as files that are either there in full or not at all.

Written beside, flushed to the disk, renamed, and the folder flushed. Nothing here knows what is in them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from normadapt.errors import StoreError

_SUFFIX = ".safetensors"
_TEMPORARY = ".tmp"
_OURS = re.compile(rf"[0-9a-f]{{64}}{re.escape(_SUFFIX)}(\.\d+{re.escape(_TEMPORARY)})?")


class Shelf:
    """A folder of content, each file named by its SHA-256.

    Args:
        folder: Where; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, digest: str) -> Path:
        """Where content of this hash is."""
        return self.folder / (digest + _SUFFIX)

    def put(self, digest: str, data: bytes) -> None:
        """Keep content under its hash; content that is there is not written again, but for a damaged file.

        Raises:
            OSError: If the disk is full, read-only or gone.
        """
        path = self.path(digest)
        try:
            there = digest_of(path.read_bytes()) == digest
        except OSError:
            there = False
        if there:  # by whom, and whether it got as far as the disk, is not known: an earlier flush may have failed
            _flush(path)
            _flush_folder(path.parent)
        else:
            write_durably(path, data)

    def get(self, digest: str) -> bytes:
        """The content of this hash.

        Raises:
            StoreError: If the file cannot be read, or is not what was put there.
        """
        try:
            data = self.path(digest).read_bytes()
        except OSError as error:
            raise StoreError(
                f"the file of a snapshot cannot be read ({error}) -> if it was not pruned just now, it was deleted: "
                "bring it back, or use another snapshot"
            ) from error
        if digest_of(data) != digest:
            raise StoreError(
                f"{self.path(digest)} is not what was committed: its hash is wrong -> bring back a copy, or "
                "use another snapshot"
            )
        return data

    def remove(self, digest: str) -> None:
        """Take content away, if it is there."""
        self.path(digest).unlink(missing_ok=True)

    def holds_any(self) -> bool:
        """Whether there is content."""
        if not self.folder.is_dir():
            return False
        return any(_OURS.fullmatch(path.name) and path.suffix == _SUFFIX for path in self.folder.iterdir())

    def orphans(self, needed: Iterable[str]) -> list[Path]:
        """Content that is not needed, and beginnings of content; files of other names are not ours."""
        wanted = {digest + _SUFFIX for digest in needed}
        return sorted(path for path in self.folder.iterdir() if _OURS.fullmatch(path.name) and path.name not in wanted)


def digest_of(data: bytes) -> str:
    """SHA-256, which names the content."""
    return hashlib.sha256(data).hexdigest()


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that their names outlive a power cut.

    Raises:
        OSError: If one of them cannot be made.
    """
    new = [above for above in (folder, *folder.parents) if not above.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    # the nearest ones even if they are there: who made them may not have come to it
    for holder in dict.fromkeys([folder.parent, folder.parent.parent, *(made.parent for made in new)]):
        with contextlib.suppress(PermissionError):  # one that may be entered, but not read, cannot be flushed
            _flush_folder(holder)


def write_durably(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that after a crash at any moment the file is whole or absent.

    Raises:
        OSError: If the disk is full, read-only or gone; no beginning of a file is left behind.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
        _flush_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes for writers only
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    """Make the names in a folder outlive a power cut."""
    if os.name == "nt":  # has no such thing, and needs none
        return
    _flush(folder)
