"""What a store has for the pages: report and history of a stream, where the trial stands, the audit log."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from normadapt.errors import NormadaptError, SpecError, StoreError
from normadapt.monitor.recorder import HISTORY
from normadapt.pilot.status import STATUS
from normadapt.reports.domain_report import DomainReport
from normadapt.reports.history import History
from normadapt.reports.report import Report
from normadapt.store import Event, Store


class Kept(NamedTuple):
    """What there is to show of a trial, or of a single report.

    Args:
        report: With its history, where one was kept.
        status: What `Pilot.status()` gave when the state was saved last; None without a trial.
        events: The audit log, oldest first; None without a store.
        streams: Names of the streams that have a history, the one seen last at the end.
    """

    report: Report
    status: Mapping[str, Any] | None
    events: tuple[Event, ...] | None
    streams: tuple[str, ...]


def read_store(store: Store, stream: str | None = None, *, events: int | None = None) -> Kept:
    """What a pilot's store has.

    Args:
        store: The store.
        stream: Which stream; by default the one seen last.
        events: The newest so many; None for all.

    Raises:
        SpecError: If there is no history of that stream.
        StoreError: If the store cannot be read, or a history in it is none.
    """
    document = store.read_state(HISTORY)
    status, log = store.read_state(STATUS), store.history(events)
    if document is None:
        if stream is not None:
            raise SpecError(f"--stream: no history of {stream!r} was kept; there is none of any stream")
        model = store.snapshots()[0].model_name if store.snapshots() else "nothing"
        return Kept(Report(model, "policy unknown", "default", False, False, ()), status, log, ())
    names = tuple(document["streams"])
    try:
        report = Report.from_dict(document["report"])
        name = stream if stream is not None else names[-1] if names else report.stream
        if name not in names:
            if stream is None:
                return Kept(report, status, log, names)
            known = ", ".join(map(repr, names)) or "none"
            raise SpecError(f"--stream: no history of {stream!r} was kept; there are {known}")
        history = History.from_dict(document["streams"][name])
        domains = tuple(map(DomainReport.from_dict, document.get("domains", {}).get(name, ())))
    except NormadaptError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"the history in {store.path} cannot be read: {error!r}") from error
    report = report.with_history(history) if name == report.stream else of_stream(report, history, domains)
    return Kept(report, status, log, names)


def of_stream(report: Report, history: History, domains: tuple[DomainReport, ...]) -> Report:
    """The report on another stream of the same model, as far as its history tells."""
    report = replace(report, stream=history.stream, history=history, domains=domains, notes=())
    if not len(history):
        return report
    count = int(history.items.sum())
    sites = tuple(
        replace(
            site,
            count=count,
            effective_count=None,
            shift=_known(history.shift[place, -1]) or 0.0,
            tail_probability=None if math.isnan(history.tail[place, -1]) else float(10 ** history.tail[place, -1]),
            mean_weight=_known(history.mean_weight[place, -1]),
            variance_weight=_known(history.variance_weight[place, -1]),
            status="from its history",
            excluded=0,
            mean_weight_interval=None,
            variance_weight_interval=None,
            risk=None,
            shift_interval=None,
        )
        for place, site in enumerate(report.sites)
    )
    return replace(report, sites=sites)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def read_source(path: Path, stream: str | None = None) -> Kept:
    """What there is to show in a store's folder, or in a file of `Report.to_dict` or `normadapt run`.

    Raises:
        SpecError: If it is neither.
        StoreError: If the store cannot be read.
    """
    if path.is_dir():
        with Store(path, create=False) as store:
            return read_store(store, stream)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        report = Report.from_dict(values.get("report", values))
    except (OSError, ValueError, AttributeError) as error:
        raise SpecError(f"{path}: expected a store's folder, or a report as JSON: {error}") from error
    if stream is not None and stream != report.stream:
        raise SpecError(f"--stream: {path} is of the stream {report.stream!r}; got {stream!r}")
    return Kept(report, None, None, (report.stream,) if report.history is not None else ())


def write_report(source: Path, out: Path, *, stream: str | None = None, title: str | None = None) -> None:
    """The page of what there is in a store's folder or a report's file.

    Raises:
        SpecError, StoreError: As `read_source`.
        ExtraMissingError: If Plotly is not installed.
    """
    kept = read_source(source, stream)
    kept.report.to_html(out, title=title, status=kept.status, events=kept.events)
