"""Who looks at the live page, and when they are told that there is something new: one look for all of them.

While nobody looks nothing is read. A client that is slow finds the newest version when it comes to ask, never a queue.
"""

from __future__ import annotations

import asyncio
import gzip
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from normadapt.errors import SpecError, StoreError
from normadapt.monitor.live import Look, Subject
from normadapt.monitor.live_view import live_view

CLIENTS = 1000
"""That may listen at once; a page more is told to come back."""

_LEAST = 0.1  # seconds between two looks
_SHARE = 0.2  # of the time, at most, that goes into looking
_BYTES = 25e6  # a second that all clients together are sent, roughly
_POLL = 0.1  # seconds between two questions whether there is something new
_BEAT = 15.0  # seconds after which a silent stream says that it is alive


class Payload(NamedTuple):
    """What is sent of one stream, made once for all clients.

    Args:
        version: Grows with every look.
        body: JSON, compressed.
        seconds: Of computing that it took; what it waited for does not count.
    """

    version: int
    body: bytes
    seconds: float


class Full(Exception):  # noqa: N818 (the page's own answer follows from it)
    """Too many clients listen."""


class Hub:
    """Clients of one subject.

    Args:
        subject: What is looked at.
        extra: Values that every view carries.
    """

    def __init__(self, subject: Subject, extra: Mapping[str, Any] | None = None) -> None:
        self.subject = subject
        self.looks = 0
        self._extra = dict(extra or {})
        self._began = int(1000 * time.time())  # another process begins with other versions
        self._clients: Counter[str | None] = Counter()
        self._views: dict[str | None, Payload] = {}
        self._last: dict[str | None, Look] = {}
        self._failed: set[str | None] = set()
        self._stamp: object = None
        self._alone = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._awake: asyncio.Event | None = None
        self._news: asyncio.Event | None = None
        self._closed = False
        self._stop = subject.listen(self._wake)

    # -- for the page ----------------------------------------------------------------------------------------------

    @property
    def clients(self) -> int:
        """How many listen."""
        return sum(self._clients.values())

    @property
    def version(self) -> int:
        """Of the newest look."""
        return self._began + self.looks

    async def view(self, stream: str | None) -> Payload:
        """What there is to show of a stream.

        Raises:
            SpecError: If nothing was seen of it.
            StoreError: If the store cannot be read and never could.
        """
        kept = self._views.get(stream)
        if kept is not None:  # what comes after it is announced
            return kept
        async with self._alone:
            return await asyncio.to_thread(self._make, stream, self.version)

    @contextmanager
    def client(self, stream: str | None) -> Iterator[None]:
        """Context in which somebody listens.

        Raises:
            Full: If too many do.
        """
        if self.clients >= CLIENTS or self._closed:
            raise Full
        self._clients[stream] += 1
        self._start()
        if self._awake is not None:
            self._awake.set()
        try:
            yield
        finally:
            self._clients[stream] -= 1
            if not self._clients[stream]:
                del self._clients[stream]
                self._views.pop(stream, None)
                self._failed.discard(stream)
                self._last.pop(stream, None)
            if not self._clients and self._task is not None:
                self._task.cancel()
                self._task = None

    async def versions(self, beat: float = _BEAT) -> AsyncIterator[int | None]:
        """The newest version whenever there is another one; None when nothing has come for a while."""
        told = -1
        while not self._closed and self._news is not None:
            news = self._news
            if self.version != told:
                told = self.version
                yield told
                continue
            try:
                await asyncio.wait_for(news.wait(), beat)
            except TimeoutError:
                yield None

    def hurry(self) -> None:
        """Look at once: something was done. In any thread."""
        self._stamp = None
        self._wake()

    def close(self) -> None:
        """End all streams and listen no more: the server stops."""
        self._closed = True
        self._stop()
        self._tell()
        self.subject.close()

    # -- looking ---------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        if self._task is not None and not self._task.done() and self._loop is loop:
            return
        self._loop, self._awake, self._news = loop, asyncio.Event(), asyncio.Event()
        self._stamp = None
        self._task = loop.create_task(self._watch())

    def _wake(self) -> None:
        """In any thread, and quickly: the model's lock may be held."""
        loop, awake = self._loop, self._awake
        if not self._clients or loop is None or awake is None or awake.is_set() or loop.is_closed():
            return
        loop.call_soon_threadsafe(awake.set)

    def _tell(self) -> None:
        """Let all who wait go on."""
        news, self._news = self._news, asyncio.Event()
        if news is not None:
            news.set()

    async def _watch(self) -> None:
        """Look whenever there is something new, for as long as somebody is there."""
        awake = self._awake
        while awake is not None:
            pause = await self._look_if_new()
            if pause:
                await asyncio.sleep(pause)
            try:
                await asyncio.wait_for(awake.wait(), _POLL)
            except TimeoutError:
                continue
            awake.clear()
            self._stamp = None

    async def _look_if_new(self) -> float:
        """Seconds to wait until the next look."""
        asked = set(self._clients)
        stamp = await asyncio.to_thread(self._ask)
        if stamp == self._stamp and asked <= self._views.keys() | self._failed:
            return 0.0
        self._stamp = stamp
        version, sent, took = self.version + 1, 0, 0.0
        self._failed.clear()
        for stream in asked:
            payload = await asyncio.to_thread(self._quietly, stream, version)
            if payload is None:
                self._failed.add(stream)
                self._views.pop(stream, None)  # whoever asks is told why
            elif stream in self._clients:
                self._views[stream] = payload
                took += payload.seconds
                sent += len(payload.body) * self._clients[stream]
        self.looks += 1
        self._tell()
        return max(_LEAST, took * (1 / _SHARE - 1), sent / _BYTES)

    def _ask(self) -> object:
        try:
            return self.subject.stamp()
        except Exception as error:  # nothing may end the watch
            return repr(error)

    def _quietly(self, stream: str | None, version: int) -> Payload | None:
        """A look that must not end the watch, whatever happens; whoever asks for the view is told what did."""
        with suppress(Exception):
            return self._make(stream, version)
        return None

    def _make(self, stream: str | None, version: int) -> Payload:
        """Look, in a thread; a store that cannot be read leaves the last look, with a note."""
        start = time.thread_time()
        try:
            look = self.subject.look(stream)
        except SpecError:
            raise
        except StoreError as error:
            last = self._last.get(stream)
            if last is None:
                raise
            look = last._replace(note=f"The store cannot be read now; this is the last that was seen of it: {error}")
        else:
            if stream in self._clients:
                self._last[stream] = look
        extra = {**self._extra, "version": version}
        body = gzip.compress(live_view(look, obeys=self.subject.obeys, extra=extra), 1)
        return Payload(version, body, time.thread_time() - start - look.apart)
