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

    def put(self, data: bytes) -> str:
        """Keep content and return its hash; content that is there is not written again, but for a damaged file.

        Raises:
            OSError: If the disk is full, read-only or gone.
        """
        digest = hashlib.sha256(data).hexdigest()
        path = self.path(digest)
        try:
            there = hashlib.sha256(path.read_bytes()).hexdigest() == digest
        except OSError:
            there = False
        if not there:
            write_durably(path, data)
        return digest

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
        if hashlib.sha256(data).hexdigest() != digest:
            raise StoreError(
                f"{self.path(digest)} is not what was committed: its hash is wrong -> bring back a copy, or "
                "use another snapshot"
            )
        return data

    def remove(self, digest: str) -> None:
        """Take content away, if it is there."""
        self.path(digest).unlink(missing_ok=True)

    def orphans(self, needed: Iterable[str]) -> list[Path]:
        """Content that is not needed, and beginnings of content; files of other names are not ours."""
        wanted = {digest + _SUFFIX for digest in needed}
        return sorted(path for path in self.folder.iterdir() if _OURS.fullmatch(path.name) and path.name not in wanted)


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


def _flush_folder(folder: Path) -> None:
    """Make the names in a folder outlive a power cut."""
    if os.name == "nt":  # has no such thing, and needs none
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
