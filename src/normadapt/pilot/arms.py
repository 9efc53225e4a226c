"""From a request to the answers of both models: what is asked of whom, and which answers belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from normadapt.adapted._adapt import AdaptedModel
from normadapt.adapted.settings import DEFAULT_STREAM
from normadapt.pilot.routing import Id, IdsError, Route, read_ids
from normadapt.pilot.rows import are_rows, count_rows, take_rows


class Request(NamedTuple):
    """A call of the model.

    Args:
        args: The model's own.
        kwargs: The model's own.
        count: Items (type: a tuple's own `count` is hidden).
        ids: A name for each, or None.
        stream: Name of the stream.
        complaints: What was wrong with the stream; the request is answered without it.
        no_ids: Why its ids could not be used, if they could not; the request is answered without them.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    count: int  # type: ignore[assignment]
    ids: Sequence[Id] | None
    stream: str
    complaints: tuple[str, ...]
    no_ids: str = ""


class Pair(NamedTuple):
    """Answers to the same items.

    Args:
        places: Which items of the request.
        adapted: The arm's answer.
        source: The source's, or None where it was not asked.
        inputs: The model's first argument, these items alone.
        first: Whether it is the request's first: what belongs to the whole request goes with it.
    """

    places: Sequence[int]
    adapted: Any
    source: Any
    inputs: Any
    first: bool


def read_request(args: tuple[Any, ...], kwargs: Mapping[str, Any], ids: Any, stream: Any) -> Request:
    """A call as a request; strange ids and streams are complained of, not refused.

    A call without a tensor (n, ...) is one item.
    """
    rows = count_rows(args, kwargs)
    count = 1 if rows is None else rows
    complaints, no_ids = [], ""
    try:
        ids = None if ids is None else read_ids(ids, count)
    except Exception as error:  # whatever a stranger's object does when it is looked into
        no_ids = str(error) if isinstance(error, IdsError) else repr(error)
        ids = None
    if stream is not None and not isinstance(stream, str):
        complaints.append("strange stream")
        stream = None
    return Request(args, kwargs, count, ids, stream or DEFAULT_STREAM, tuple(complaints), no_ids)


class Arms:
    """Both models behind one: the source, and the adapted model as it is let in.

    Args:
        adapted: The adapted model, which answers as the source, too.
    """

    def __init__(self, adapted: AdaptedModel) -> None:
        self.adapted = adapted

    def stream(self, name: str) -> Any:
        """Context in which both answer for a stream."""
        return self.adapted.stream(name)

    def source(self, request: Request, places: Sequence[int] | None = None) -> Any:
        """The source's answer to all items, or to some."""
        args, kwargs = _cut(request, places)
        with self.adapted.as_source():
            return self.adapted(*args, **kwargs)

    def ours(self, request: Request, places: Sequence[int], *, adapting: bool) -> Any:
        """The adapted model's answer to these items, the only ones that it sees."""
        args, kwargs = _cut(request, places)
        if adapting:
            return self.adapted(*args, **kwargs)
        with self.adapted.paused():
            return self.adapted(*args, **kwargs)

    def pairs(self, request: Request, way: Route, ours: Any, theirs: Any) -> Iterator[Pair]:
        """The answers as pairs: items that both models answered, then those that the arm answered alone.

        Args:
            request: The request.
            way: Who was asked.
            ours: The arm's answer to `way.asked`.
            theirs: The source's answer to the whole request, or None: then it is asked here. It is asked again where
                rows of an answer are not the request's items, so that only answers to the same inputs are compared.
        """
        fed = request.args[0] if request.args else next(iter(request.kwargs.values()), None)
        if theirs is not None and not are_rows(theirs, request.count) and len(way.asked) < request.count:
            same = take_rows(fed, way.asked, request.count)
            yield Pair(way.asked, ours, self.source(request, way.asked), same, True)
            return
        if theirs is not None:
            yield Pair(
                way.asked,
                ours,
                take_rows(theirs, way.asked, request.count),
                take_rows(fed, way.asked, request.count),
                True,
            )
            return
        if way.paired and not are_rows(ours, request.count):
            yield Pair(way.asked, ours, self.source(request), fed, True)
            return
        known = set(way.paired)
        alone = [place for place in way.asked if place not in known]
        if way.paired:
            source = self.source(request, way.paired)
            ours_too = take_rows(ours, way.paired, request.count)
            yield Pair(way.paired, ours_too, source, take_rows(fed, way.paired, request.count), True)
        if alone:
            answered = take_rows(ours, alone, request.count)
            yield Pair(alone, answered, None, take_rows(fed, alone, request.count), not way.paired)


def _cut(request: Request, places: Sequence[int] | None) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if places is None:
        return request.args, request.kwargs
    args = tuple(take_rows(value, places, request.count) for value in request.args)
    return args, {key: take_rows(value, places, request.count) for key, value in request.kwargs.items()}
