"""`PrometheusExporter`: what a model at work does, for Prometheus. `METRICS` lists every metric."""

from __future__ import annotations

import atexit
import math
import os
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from normadapt.adapted._adapt import AdaptedModel
from normadapt.errors import ExtraMissingError
from normadapt.monitor.meter import Meter, Reading, check_settings, leading_layers, mean_weights, whole_model_tail
from normadapt.pilot import Pilot
from normadapt.pilot.stages import Stage
from normadapt.reports.history import Numbers

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper ends of the update duration's histogram, seconds."""


class Metric(NamedTuple):
    """One metric; each has the label `model`, too.

    Args:
        name: Without the prefix `normadapt_`, and of a counter without `_total`.
        kind: "counter", "gauge" or "histogram".
        text: What it says.
        labels: Beside `model`.
    """

    name: str
    kind: str
    text: str
    labels: tuple[str, ...] = ()


METRICS = (
    Metric("updates", "counter", "Adapting forward passes that succeeded."),
    Metric("update_duration_seconds", "histogram", "How long an adapting forward pass took, the model's own included."),
    Metric("last_update_timestamp_seconds", "gauge", "Unix time at which the last adapting pass ended."),
    Metric("state_age_seconds", "gauge", "Seconds since the statistics in use last followed data."),
    Metric("streams", "gauge", "Streams that adapted between the last two refreshes with traffic, at most 64."),
    Metric("mix_weight_ratio", "gauge", "Weight on the test statistic, 0 to 1, mean over layers.", ("statistic",)),
    Metric("shift", "gauge", "Largest shift of any layer from the source, in gamma standard deviations."),
    Metric("shift_tail_probability", "gauge", "Bound on the probability of that in any layer if there were no shift."),
    Metric("layer_shift", "gauge", "Shift of the most shifted layers, in gamma standard deviations.", ("layer",)),
    Metric("layer_shift_tail_probability", "gauge", "Probability of a layer's shift if there were none.", ("layer",)),
    Metric("domains", "gauge", "Domains that a stream has met, most of any stream."),
    Metric("domain_shift", "gauge", "Shift of the domain that a stream is in, of the stream where it is largest."),
    Metric("skipped_layers", "gauge", "Layers whose last batch was not used, as by non-finite input."),
    Metric("entropy_nats", "gauge", "Mean entropy of the answers, in nats."),
    Metric("agreement_ratio", "gauge", "Share of answers that are the source's, too, between the last refreshes."),
    Metric("compared_items", "counter", "Items that the source and the adapted model both answered."),
    Metric("agreeing_items", "counter", "Of the compared items, those given the same class."),
    Metric("exporter_failures", "counter", "Refreshes that failed; answers are not touched by them."),
    # With a pilot only:
    Metric("stage", "gauge", "1 for the stage that the pilot is in, 0 for the others.", ("stage",)),
    Metric("share_ratio", "gauge", "Share of items that the adapted model (or, rolled back, a snapshot) answers."),
    Metric("paused", "gauge", "1 while an operator holds everything."),
    Metric("waits_for_operator", "gauge", "1 while only an operator's word leads on."),
    Metric("store_trouble", "gauge", "1 while the store cannot be written."),
    Metric("active_snapshot", "gauge", "Number of the last good snapshot, to which a roll back goes; 0 is the source."),
    Metric("rollbacks", "counter", "Roll backs, by who caused them: guard or operator.", ("cause",)),
    Metric("guard_trips", "counter", "Harm found, by guard.", ("guard",)),
    Metric("guard_log_e_value", "gauge", "Natural logarithm of a guard's evidence of harm.", ("guard",)),
    Metric("guard_log_e_threshold", "gauge", "Where a guard's evidence rolls back, same scale.", ("guard",)),
    Metric("blind_guards", "gauge", "Guards that cannot see harm, as their normal is too near the worst."),
    Metric("answered_items", "counter", "Items answered, by who did: source, adapted or snapshot.", ("arm",)),
)
_CAUSES = ("guard", "operator")
_ARMS = ("source", "adapted", "snapshot")


class PrometheusExporter:
    """Keeps Prometheus metrics of a model or a pilot up to date; begins at once, `close` ends it.

    A pass costs a counter and a histogram; all else is summed up in a thread of its own every `seconds`, so that no
    request waits for it, and a failure there is a metric. Streams have no label: where several adapt, shift and tail
    are those of the worst, weights the mean. With `PROMETHEUS_MULTIPROC_DIR` set before prometheus_client is imported,
    the metrics of several processes are put together: counters and histograms add up, a gauge is that of the
    process alive that set it last. At its end a process takes its gauges back; one that was killed must be told
    of with `prometheus_client.multiprocess.mark_process_dead(pid)`.

    Args:
        watched: The model, or the pilot whose model it is.
        registry: Where the metrics go; by default prometheus_client's own.
        top: Layers with numbers of their own: those with the largest shift. In several processes a layer once shown
            stays, because series cannot be taken back there, and no more than four times `top` are ever shown.
        seconds: Between two refreshes.
        model: Value of the label `model`; by default the model's class. Tells several models in one registry apart.

    Raises:
        ExtraMissingError: If prometheus-client is not installed.
        TypeError, ValueError: If an argument is not what it should be, `model` is taken in this registry, or
            `PROMETHEUS_MULTIPROC_DIR` is no folder or was set too late.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import normadapt as na
        >>> from prometheus_client import CollectorRegistry
        >>> adapted = na.adapt(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)))
        >>> registry = CollectorRegistry()  # or none, and prometheus_client.start_http_server(9000)
        >>> with PrometheusExporter(adapted, registry=registry, model="doc") as exporter:
        ...     _ = adapted(torch.randn(8, 1, 8, 8))
        ...     registry.get_sample_value("normadapt_updates_total", {"model": "doc"})
        1.0
    """

    def __init__(
        self,
        watched: AdaptedModel | Pilot,
        *,
        registry: Any = None,
        top: int = 5,
        seconds: float = 5.0,
        model: str | None = None,
    ) -> None:
        client = _client()
        check_settings(top, seconds)
        if model is not None and not isinstance(model, str):
            raise ValueError(f"model must be a string; got {model!r}")
        self.registry = client.REGISTRY if registry is None else registry
        self.top = top
        self._several = _several_processes(client)
        self._layers: list[str] = []
        self._counted: dict[tuple[str, ...], float] = {}
        self._closed = False
        self._meter = Meter(watched, self._passed)
        self.model = self._meter.adapted.fingerprint.model_name if model is None else model
        try:
            self._instruments = _instruments_of(self.registry, client)
            if self.model in self._instruments.models:
                raise ValueError(
                    f"the registry has metrics of a model {self.model!r} already -> give this one another name with "
                    "model=..., or close() the other exporter"
                )
        except ValueError:
            self._meter.close()
            raise
        self._instruments.models.add(self.model)
        self._updates = self._of("updates")
        self._duration = self._of("update_duration_seconds")
        self._of("exporter_failures")
        for name in ("compared_items", "agreeing_items"):
            self._of(name)
        if self._meter.pilot is not None:
            answered = self._meter.pilot.status()["answered"]
            self._counted = {("answered_items", arm): answered[arm] for arm in _ARMS}
            for arm in _ARMS:
                self._of("answered_items", arm)
            for cause in _CAUSES:  # at 0 from the start, so that the first one is an increase
                self._of("rollbacks", cause)
            for guard in self._meter.pilot.watch.guards:
                self._of("guard_trips", guard.name)
        self.refresh()
        self._meter.every(seconds, self.refresh)
        if self._several:
            atexit.register(_leave, weakref.ref(self))

    # -- numbers -------------------------------------------------------------------------------------------------

    def _passed(self, seconds: float) -> None:
        self._updates.inc()
        self._duration.observe(seconds)

    def _of(self, name: str, *labels: str) -> Any:
        return self._instruments.by_name[name].labels(self.model, *labels)

    def _set(self, name: str, value: float | None, *labels: str) -> None:
        if value is not None and not math.isnan(value):
            self._of(name, *labels).set(value)

    def _raise_to(self, name: str, total: float, *labels: str) -> None:
        """Count what was not counted yet; a total that fell began anew."""
        before = self._counted.get((name, *labels), 0)
        if total != before:
            self._of(name, *labels).inc(total - before if total > before else total)
        self._counted[(name, *labels)] = total

    def compare(self, items: int, agreeing: int) -> None:
        """Tell how many items both models answered and how many of them alike, where no pilot does."""
        self._meter.compare(items, agreeing)

    def refresh(self) -> None:
        """Sum up now; what goes wrong is counted, never raised."""
        try:
            with self._meter.turn:
                if not self._closed:
                    self._show(self._meter.read())
        except Exception:
            self._of("exporter_failures").inc()

    def _show(self, told: Reading) -> None:
        self._raise_to("exporter_failures", self._meter.failures)
        self._raise_to("compared_items", told.compared)
        self._raise_to("agreeing_items", told.agreeing)
        self._set("agreement_ratio", told.agreement)
        self._set("entropy_nats", told.entropy)
        if told.last_update is not None:
            self._set("last_update_timestamp_seconds", told.last_update)
            self._set("state_age_seconds", max(0.0, time.time() - told.last_update))
            self._set("streams", told.streams)
            self._set("skipped_layers", told.skipped)
            if told.domains:
                self._set("domains", told.domains)
                self._set("domain_shift", told.domain_shift)
        if told.layers is not None:
            for statistic, weight in mean_weights(told.layers).items():
                self._set("mix_weight_ratio", weight, statistic)
            known = told.layers.shift[np.isfinite(told.layers.shift)]
            self._set("shift", float(known.max()) if len(known) else None)
            self._set("shift_tail_probability", whole_model_tail(told.layers.tail))
            self._show_layers(told.layers.shift, told.layers.tail)
        if told.status is not None:
            self._show_pilot(told.status, told)

    def _show_layers(self, shift: Numbers, tail: Numbers) -> None:
        names = [self._meter.layers[place] for place in leading_layers(shift, self.top)]
        if self._several:
            names = [*self._layers, *(name for name in names if name not in self._layers)][: 4 * self.top]
        for name in self._layers:
            if name not in names:
                for metric in ("layer_shift", "layer_shift_tail_probability"):
                    self._instruments.by_name[metric].remove(self.model, name)
        self._layers = names
        for place, name in enumerate(self._meter.layers):
            if name in names:
                self._set("layer_shift", float(shift[place]), name)
                self._set("layer_shift_tail_probability", float(10 ** tail[place]), name)

    def _show_pilot(self, status: Mapping[str, Any], told: Reading) -> None:
        for stage in Stage:
            self._set("stage", float(status["stage"] == stage.value), stage.value)
        self._set("share_ratio", status["share"])
        self._set("paused", float(status["paused"]))
        self._set("waits_for_operator", float(status["waits_for_operator"]))
        self._set("store_trouble", float(status["store"]["trouble"] is not None))
        self._set("active_snapshot", status["snapshot"])
        self._set("blind_guards", len(status["blind"]))
        for guard, state in status["guards"].items():
            if not state["hard"]:
                self._set("guard_log_e_value", state["log_value"], guard)
                self._set("guard_log_e_threshold", state["threshold"], guard)
        for cause, count in told.rollbacks.items():
            self._raise_to("rollbacks", count, cause)
        for guard, count in told.trips.items():
            self._raise_to("guard_trips", count, guard)
        for arm in _ARMS:
            self._raise_to("answered_items", status["answered"][arm], arm)

    # -- where they are read, and the end ------------------------------------------------------------------------

    def app(self) -> Any:
        """An ASGI application with the metrics, to mount at `/metrics`; of all processes where there are several.

        For WSGI use `prometheus_client.make_wsgi_app(exporter.readable())`, for a port of its own
        `prometheus_client.start_http_server(9000, registry=exporter.readable())`.
        """
        return _client().make_asgi_app(registry=self.readable())

    def readable(self) -> Any:
        """The registry to read from: `registry`, or one that puts the metrics of several processes together."""
        if not self._several:
            return self.registry
        from prometheus_client import CollectorRegistry
        from prometheus_client.multiprocess import MultiProcessCollector

        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return together

    def close(self) -> None:
        """Look on no more, and take the metrics out of the registry (with several processes they stay in the files)."""
        with self._meter.turn:
            self._meter.close()
            if self._closed:
                return
            self._closed = True
            self._instruments.models.discard(self.model)
            if not self._several:
                for metric in METRICS:
                    self._instruments.by_name[metric.name].remove_by_labels({"model": self.model})

    def __enter__(self) -> PrometheusExporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Instruments:
    """prometheus_client's objects for all of `METRICS` in one registry, and the models that have series there."""

    def __init__(self, registry: Any, client: ModuleType) -> None:
        self.models: set[str] = set()
        self.by_name: dict[str, Any] = {}
        for metric in METRICS:
            options: dict[str, Any] = {"namespace": "normadapt", "registry": registry}
            if metric.kind == "gauge":
                options["multiprocess_mode"] = "livemostrecent"
            elif metric.kind == "histogram":
                options["buckets"] = BUCKETS
            make = getattr(client, metric.kind.capitalize())
            self.by_name[metric.name] = make(metric.name, metric.text, ("model", *metric.labels), **options)


_KNOWN: weakref.WeakKeyDictionary[Any, _Instruments] = weakref.WeakKeyDictionary()
_KNOWN_LOCK = threading.Lock()


def _instruments_of(registry: Any, client: ModuleType) -> _Instruments:
    with _KNOWN_LOCK:
        if registry not in _KNOWN:
            _KNOWN[registry] = _Instruments(registry, client)
        return _KNOWN[registry]


def _client() -> ModuleType:
    try:
        import prometheus_client
    except ImportError as error:
        raise ExtraMissingError(
            "PrometheusExporter needs prometheus-client -> pip install 'normadapt[metrics]'"
        ) from error
    return prometheus_client


def _several_processes(client: ModuleType) -> bool:
    """Whether metrics of several processes are put together; refuses what would silently give wrong ones."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if not folder:
        return False
    if not Path(folder).is_dir():
        raise ValueError(
            f"PROMETHEUS_MULTIPROC_DIR is {folder!r}, which is no folder -> make it, empty, before the start"
        )
    if getattr(client.values.ValueClass, "_multiprocess", True) is False:
        raise ValueError(
            "PROMETHEUS_MULTIPROC_DIR was set after prometheus_client was imported, which keeps this process's metrics "
            "to itself -> set it before Python starts"
        )
    return True


def _leave(exporter: weakref.ref[PrometheusExporter]) -> None:
    """At a process's end: what it says is true no longer."""
    known = exporter()
    if known is None:
        return
    from prometheus_client.multiprocess import mark_process_dead

    known.refresh()
    known.close()
    mark_process_dead(os.getpid())  # type: ignore[no-untyped-call]
