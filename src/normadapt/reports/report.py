"""What an adapted model says about itself: plain numbers, read-only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from normadapt.reports.domain_report import DomainReport
from normadapt.reports.history import History

_LONGEST_NAME = 36


class Interval(NamedTuple):
    """The ends of a 95 % interval."""

    low: float
    high: float


class RiskParts(NamedTuple):
    """Estimated squared error of a site's statistics in squared units of its output, per channel: a sum of three.

    Args:
        bias_squared: From what the weight leaves of the shift.
        variance: From the sampling of the evidence.
        skewness: Of higher order: from the correlation of the evidence with its own estimated error.
    """

    bias_squared: float
    variance: float
    skewness: float


@dataclass(frozen=True)
class SiteReport:
    """One normalization layer of an adapted model.

    Args:
        name: Its dotted name in the model.
        kind: Its class.
        channels: Number of channels.
        count: Finite instances seen in this stream.
        effective_count: Independent instances that the evidence in use is worth; None when the policy does not say.
        shift: Root mean square over channels of the shift from the source, location and half-log-variance together,
            in units of the layer's output (gamma standard deviations), sampling noise subtracted.
        tail_probability: Probability of at least this shift if there were none (the smaller of location's and
            scale's, times two); None when the policy does not test.
        mean_weight: Weight on the test mean, averaged over channels by gamma^2; None when the policy does not say.
        variance_weight: Likewise on the test variance.
        mean_weight_interval, variance_weight_interval: 95 % intervals of the weights, studentized with skewness and
            kurtosis of the instances; None while too few instances are known.
        risk: Parts of the estimated squared error; None when the policy does not say.
        shift_interval: 95 % interval of the shift, from the noise of its location and scale together; None when the
            policy does not say.
        status: "source", "tracking", "skipped: non-finite input", ...; ", per instance" behind it where the instances
            of the last batch had statistics of their own, as those of several domains have.
        excluded: Instances left out because their activations were not finite.
    """

    name: str
    kind: str
    channels: int
    count: int
    effective_count: float | None
    shift: float
    tail_probability: float | None
    mean_weight: float | None
    variance_weight: float | None
    status: str
    excluded: int
    mean_weight_interval: Interval | None = None
    variance_weight_interval: Interval | None = None
    risk: RiskParts | None = None
    shift_interval: Interval | None = None


@dataclass(frozen=True)
class Report:
    """All sites of an adapted model in one stream; `print` it for a table.

    Args:
        model_name: Class of the adapted model.
        policy: The policy, as it prints itself.
        stream: Name of the stream reported on.
        profiled: Whether a source profile is in use.
        adapting: Whether the model is adapting.
        sites: One report per normalization layer, in the model's order.
        domains: The domains that the stream has met; () where the policy knows none.
        notes: What else there is to say, a sentence each: how far a start is, what was guessed, what is in doubt.
        history: How it came to this, from a `monitor.Recorder`; None without one.
    """

    model_name: str
    policy: str
    stream: str
    profiled: bool
    adapting: bool
    sites: tuple[SiteReport, ...]
    domains: tuple[DomainReport, ...] = ()
    notes: tuple[str, ...] = ()
    history: History | None = field(default=None, repr=False, compare=False)

    def with_history(self, history: History | None) -> Report:
        """The same report with another history."""
        return replace(self, history=history)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: dicts, lists, strings, numbers and None, ready for JSON; without a history it has no key."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["sites"] = [_plain(site) for site in self.sites]
        values["domains"] = [domain.to_dict() for domain in self.domains]
        values["notes"] = list(self.notes)
        del values["history"]
        return values if self.history is None else {**values, "history": self.history.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """What `to_dict` gave.

        Raises:
            ValueError: If it is nothing of the kind.
        """
        try:
            history = values.get("history")
            return cls(
                model_name=str(values["model_name"]),
                policy=str(values["policy"]),
                stream=str(values["stream"]),
                profiled=bool(values["profiled"]),
                adapting=bool(values["adapting"]),
                sites=tuple(_site(site) for site in values["sites"]),
                domains=tuple(DomainReport.from_dict(domain) for domain in values.get("domains", ())),
                notes=tuple(map(str, values.get("notes", ()))),
                history=None if history is None else History.from_dict(history),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no report of normadapt: {error!r} -> pass what Report.to_dict() gave") from error

    def to_html(
        self,
        path: Path | str,
        *,
        title: str | None = None,
        lead: str | None = None,
        status: Mapping[str, Any] | None = None,
        events: Sequence[Any] | None = None,
    ) -> Path:
        """Write one page for the browser that needs nothing else: what happened in words, then the figures.

        Args:
            path: The file.
            title: What stands at the top; by default the model.
            lead: A sentence under it, what was run; by default policy, profile and stream.
            status: What `Pilot.status()` gave, for where the trial stands.
            events: What `Store.history()` gave, for the audit log.

        Returns:
            The file's path.

        Raises:
            ExtraMissingError: If Plotly is not installed.
        """
        from normadapt.monitor.report_page import page  # Plotly is read only now

        file = Path(path)
        file.write_text(page(self, title=title, lead=lead, status=status, events=events), encoding="utf-8")
        return file

    def __str__(self) -> str:
        profile = "with a source profile" if self.profiled else "without a source profile"
        state = "" if self.adapting else ", paused"
        head = f"{self.model_name}, {self.policy}, {profile}, stream {self.stream!r}{state}"
        rows = [_HEADINGS, *(_row(site) for site in self.sites)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS))]
        lines = ["  ".join(_align(cell, w, i) for i, (cell, w) in enumerate(zip(r, widths, strict=True))) for r in rows]
        lines = [line.rstrip() for line in lines]
        rule = "-" * max(map(len, lines))
        present = {True: "-> ", False: "   "}
        domains = [present[domain.is_present] + str(domain) for domain in self.domains]
        said = [*domains, *([""] if domains else []), *self.notes, *([""] if self.notes else [])]
        return "\n".join([head, "", *said, lines[0], rule, *lines[1:]])


def _plain(site: SiteReport) -> dict[str, Any]:
    named = {"mean_weight_interval", "variance_weight_interval", "shift_interval", "risk"}
    values = {key: getattr(site, key) for key in site.__dataclass_fields__}
    return {k: v._asdict() if k in named and v is not None else v for k, v in values.items()}


def _site(values: Mapping[str, Any]) -> SiteReport:
    told = dict(values)
    for key in ("mean_weight_interval", "variance_weight_interval", "shift_interval"):
        if told.get(key) is not None:
            told[key] = Interval(**told[key])
    if told.get("risk") is not None:
        told["risk"] = RiskParts(**told["risk"])
    return SiteReport(**told)


_HEADINGS = ("layer", "kind", "ch", "seen", "eff. n", "shift", "tail prob.", "w(mean)", "w(var)", "risk", "status")


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column in (0, 1, len(_HEADINGS) - 1) else cell.rjust(width)


def _row(site: SiteReport) -> tuple[str, ...]:
    name = site.name if len(site.name) <= _LONGEST_NAME else "..." + site.name[3 - _LONGEST_NAME :]
    status = f"{site.status} ({site.excluded} left out)" if site.excluded else site.status
    return (
        name,
        site.kind,
        str(site.channels),
        str(site.count),
        _number(site.effective_count, "{:.1f}"),
        format_shift(site.shift, site.shift_interval),
        format_probability(site.tail_probability),
        format_weight(site.mean_weight, site.mean_weight_interval),
        format_weight(site.variance_weight, site.variance_weight_interval),
        _number(None if site.risk is None else sum(site.risk), "{:.1e}"),
        status,
    )


def format_shift(shift: float, interval: Interval | None) -> str:
    """A shift for a table, with its interval where there is one: "0.310 (0.254-0.367)"."""
    return f"{shift:.3f}" if interval is None else f"{shift:.3f} ({interval.low:.3f}-{interval.high:.3f})"


def format_weight(weight: float | None, interval: Interval | None) -> str:
    """A weight for a table, with its interval where there is one: "0.73 (0.61-0.80)"."""
    if weight is None:
        return "-"
    return f"{weight:.2f}" if interval is None else f"{weight:.2f} ({interval.low:.2f}-{interval.high:.2f})"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def format_probability(value: float | None) -> str:
    """A probability for a table: three digits, powers of ten when small, "-" for none."""
    if value is None or math.isnan(value):
        return "-"
    if value < 1e-99:
        return "<1e-99"
    return f"{value:.3f}" if value >= 1e-3 else f"{value:.0e}"
