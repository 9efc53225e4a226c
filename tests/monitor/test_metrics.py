from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monitor import watched
from normadapt.baselines import BatchStatistics
from normadapt.errors import ExtraMissingError
from normadapt.monitor.meter import _STREAMS, Meter
from normadapt.monitor.metrics import METRICS, PrometheusExporter
from normadapt.pilot import Disagreement, NonFinite, Pilot, Plan
from pilot.stories import Story

prometheus = pytest.importorskip("prometheus_client", reason="METRICS NOT TESTED: pip install prometheus-client")


def model(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)]
    for _ in range(layers - 1):
        parts += [nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(144, 3)).eval()


def batch(n: int = 8, shift: float = 0.0) -> Tensor:
    return torch.randn(n, 1, 8, 8) + shift


def exporter_of(watched: Any, **options: Any) -> PrometheusExporter:
    """One with a registry of its own, whose thread the test does not wait for."""
    return PrometheusExporter(watched, **{"registry": prometheus.CollectorRegistry(), "seconds": 3600, **options})


def value(exporter: PrometheusExporter, name: str, **labels: str) -> float | None:
    return exporter.registry.get_sample_value(f"normadapt_{name}", {"model": exporter.model, **labels})


def series(exporter: PrometheusExporter, name: str) -> dict[tuple[str, ...], float]:
    found = {}
    for family in exporter.registry.collect():
        for sample in family.samples:
            if sample.name == f"normadapt_{name}":
                labels = {key: text for key, text in sample.labels.items() if key != "model"}
                found[tuple(labels.values())] = sample.value
    return found


def test_what_it_says_is_what_the_report_says() -> None:
    adapted = watched.adapted(model())
    exporter = exporter_of(adapted)
    for _ in range(20):
        adapted(batch(shift=2.0))
    exporter.refresh()
    report = adapted.report()
    assert value(exporter, "updates_total") == 20
    assert value(exporter, "update_duration_seconds_count") == 20
    for site in report.sites:
        assert value(exporter, "layer_shift", layer=site.name) == pytest.approx(site.shift, rel=1e-6)
        tail = value(exporter, "layer_shift_tail_probability", layer=site.name)
        assert tail == pytest.approx(max(site.tail_probability or 0.0, 1e-300), rel=1e-6)
    assert value(exporter, "shift") == pytest.approx(max(site.shift for site in report.sites), rel=1e-6)
    weights = [site.mean_weight for site in report.sites]
    assert None not in weights
    expected = sum(w for w in weights if w is not None) / len(weights)
    assert value(exporter, "mix_weight_ratio", statistic="mean") == pytest.approx(expected, rel=1e-6)
    assert value(exporter, "shift_tail_probability") == pytest.approx(
        min(1.0, 2 * min(max(site.tail_probability or 0.0, 1e-300) for site in report.sites)), rel=1e-6
    )
    assert 0 <= (value(exporter, "state_age_seconds") or 0.0) < 60
    assert value(exporter, "exporter_failures_total") == 0


def test_domains_are_counted_and_the_present_one_has_its_shift() -> None:
    adapted = watched.adapted(model())
    exporter = exporter_of(adapted)
    for shift in (0.0, 3.0):
        for _ in range(20):
            adapted(batch(shift=shift))
    with adapted.stream("calm"):
        adapted(batch())
    exporter.refresh()
    present = adapted.domain
    assert present is not None
    assert not present.is_source
    assert value(exporter, "domains") == len(adapted.domains) >= 2
    assert value(exporter, "domain_shift") == pytest.approx(present.shift, rel=1e-6)
    other = exporter_of(watched.adapted(model(), BatchStatistics()))
    other._meter.adapted(batch())
    other.refresh()
    assert series(other, "domains") == {}


def test_entropy_is_that_of_the_last_answers() -> None:
    adapted = watched.adapted(model())
    exporter = exporter_of(adapted)
    outputs = [adapted(batch(n)) for n in (8, 3, 300)]
    exporter.refresh()
    kept = [outputs[0], outputs[1], outputs[2][::2]]  # of many answers, evenly spaced ones
    probabilities = torch.cat(kept).detach().softmax(1)
    assert value(exporter, "entropy_nats") == pytest.approx(
        float(torch.special.entr(probabilities).sum(1).mean()), rel=1e-5
    )


def test_a_policy_that_tests_nothing_has_a_shift_and_no_tail() -> None:
    adapted = watched.adapted(model(), BatchStatistics())
    exporter = exporter_of(adapted)
    adapted(batch(shift=2.0))
    exporter.refresh()
    assert (value(exporter, "shift") or 0.0) > 0
    assert value(exporter, "shift_tail_probability") is None
    assert series(exporter, "mix_weight_ratio") == {}


def test_no_more_layers_than_asked_for_whichever_lead() -> None:
    adapted = watched.adapted(model(layers=8))
    exporter = exporter_of(adapted, top=3)
    seen = set()
    for place in range(12):
        adapted(batch(shift=3.0 * (place % 3), n=1 + 5 * (place % 4)) * (1 + place % 5))
        exporter.refresh()
        shown = {labels[0] for labels in series(exporter, "layer_shift")}
        by_shift = sorted(adapted.report().sites, key=lambda site: -site.shift)
        assert shown == {site.name for site in by_shift[:3]}
        assert {labels[0] for labels in series(exporter, "layer_shift_tail_probability")} <= shown
        seen |= shown
    assert len(seen) > 3  # others led at times, and left no series behind


def test_of_several_streams_the_worst_is_shown_and_none_has_a_label() -> None:
    adapted = watched.adapted(model())
    exporter = exporter_of(adapted)
    for _ in range(20):
        for name, shift in (("calm", 0.0), ("dark", -3.0)):
            with adapted.stream(name):
                adapted(batch(shift=shift))
    exporter.refresh()
    with adapted.stream("dark"):
        dark = max(site.shift for site in adapted.report().sites)
    assert value(exporter, "shift") == pytest.approx(dark, rel=1e-6)
    assert value(exporter, "streams") == 2
    lines = len(prometheus.generate_latest(exporter.registry).splitlines())
    for place in range(_STREAMS + 10):
        with adapted.stream(f"tenant {place}"):
            adapted(batch())
    exporter.refresh()
    assert value(exporter, "streams") == _STREAMS
    assert len(prometheus.generate_latest(exporter.registry).splitlines()) == lines


def test_input_that_is_not_used_is_told_and_does_not_make_the_state_young() -> None:
    adapted = watched.adapted(model())
    exporter = exporter_of(adapted)
    adapted(batch())
    exporter.refresh()
    before = value(exporter, "last_update_timestamp_seconds")
    adapted(batch() * float("nan"))
    exporter.refresh()
    assert value(exporter, "skipped_layers") == 2
    assert value(exporter, "last_update_timestamp_seconds") == before
    assert value(exporter, "updates_total") == 2


def test_a_failed_refresh_costs_no_answer_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = watched.adapted(model())
    exporter = exporter_of(adapted)
    expected = adapted(batch())
    monkeypatch.setattr(Meter, "read", lambda _: 1 / 0)
    exporter.refresh()
    assert value(exporter, "exporter_failures_total") == 1
    monkeypatch.undo()
    monkeypatch.setattr(exporter._meter, "_passed", lambda _: 1 / 0)
    assert adapted(batch()).shape == expected.shape
    exporter.refresh()
    assert value(exporter, "exporter_failures_total") == 2


def test_two_models_share_a_registry_under_two_names() -> None:
    first, second = watched.adapted(model()), watched.adapted(model())
    one = exporter_of(first, model="one")
    two = exporter_of(second, model="two", registry=one.registry)
    with pytest.raises(ValueError, match=r"model 'two' already -> .*model="):
        exporter_of(first, model="two", registry=one.registry)
    first(batch())
    second(batch())
    second(batch())
    assert value(one, "updates_total") == 1
    assert value(two, "updates_total") == 2
    two.close()
    two.close()
    two.refresh()
    second(batch())
    assert value(two, "updates_total") is None
    assert value(one, "updates_total") == 1
    exporter_of(second, model="two", registry=one.registry)


@pytest.mark.parametrize("wrong", [{"top": -1}, {"top": 1.5}, {"seconds": 0}, {"seconds": "5"}, {"model": 7}])
def test_settings_that_cannot_be_meant_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        exporter_of(watched.adapted(model()), **wrong)


def test_something_else_than_a_model_is_refused() -> None:
    with pytest.raises(TypeError, match="adapt"):
        exporter_of(model())


def test_without_prometheus_client_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ExtraMissingError, match=r"^[^\n]*pip install 'normadapt\[metrics\]'$"):
        PrometheusExporter(watched.adapted(model()))


def test_a_folder_for_several_processes_that_comes_too_late_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no folder"):
        exporter_of(watched.adapted(model()))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="before Python starts"):
        exporter_of(watched.adapted(model()))


def test_it_refreshes_by_itself_and_ends_with_the_model() -> None:
    adapted = watched.adapted(model())
    exporter = exporter_of(adapted, seconds=0.02)
    adapted(batch())
    limit = time.monotonic() + 5
    while value(exporter, "shift") is None and time.monotonic() < limit:
        time.sleep(0.01)
    assert value(exporter, "shift") is not None
    gone = weakref.ref(exporter)
    del exporter, adapted
    while gone() is not None and time.monotonic() < limit:
        gc.collect()
        time.sleep(0.02)
    assert gone() is None


# -- with a pilot ------------------------------------------------------------------------------------------------------


def story(folder: Path | None = None) -> Any:
    return Story(store=folder)


def test_a_trial_is_told_from_shadow_to_roll_back(tmp_path: Path) -> None:
    told = story(tmp_path)
    pilot = told.pilot
    exporter = exporter_of(pilot)
    assert value(exporter, "stage", stage="off") == 1  # until the first request
    assert value(exporter, "rollbacks_total", cause="guard") == 0
    told.until("full", labelled=True)
    exporter.refresh()
    assert series(exporter, "stage") == {
        (stage,): float(stage == "full") for stage in ("off", "shadow", "canary", "full", "rolled_back")
    }
    assert value(exporter, "share_ratio") == 1
    status = pilot.status()
    assert value(exporter, "active_snapshot") == status["snapshot"]
    assert value(exporter, "guard_log_e_value", guard="disagreement") == status["guards"]["disagreement"]["log_value"]
    assert value(exporter, "guard_log_e_threshold", guard="disagreement") == pilot.watch.threshold
    assert value(exporter, "guard_log_e_value", guard="non_finite") is None  # a hard guard weighs nothing
    compared, agreeing = value(exporter, "compared_items_total"), value(exporter, "agreeing_items_total")
    assert compared
    assert agreeing
    assert agreeing <= compared <= status["answered"]["items"]
    assert value(exporter, "agreement_ratio") == pytest.approx(agreeing / compared)
    told.send(change=lambda x: x * float("nan"))
    exporter.refresh()
    assert value(exporter, "stage", stage="rolled_back") == 1
    assert value(exporter, "stage", stage="full") == 0
    assert value(exporter, "rollbacks_total", cause="guard") == 1
    assert value(exporter, "guard_trips_total", guard="non_finite") == 1
    pilot.promote("me", force=True)
    pilot.rollback("me")
    exporter.refresh()
    assert value(exporter, "rollbacks_total", cause="guard") == 1
    assert value(exporter, "rollbacks_total", cause="operator") == 1
    assert value(exporter, "waits_for_operator") == 1
    answered = pilot.status()["answered"]
    for arm in ("source", "adapted", "snapshot"):
        assert value(exporter, "answered_items_total", arm=arm) == answered[arm]
    pilot.close()
    again = story(tmp_path)
    later = exporter_of(again.pilot)  # what was counted by another process is not counted twice
    assert value(later, "rollbacks_total", cause="guard") == 0
    assert value(later, "answered_items_total", arm="source") == 0


def test_a_request_does_not_wait_for_whoever_reads_status() -> None:
    """The model used beside its pilot while others read: nobody may lock the other out."""
    pilot = Pilot(model(), plan=Plan(guards=(Disagreement(), NonFinite())))
    exporter = exporter_of(pilot)
    stop = threading.Event()

    def refresh() -> None:
        while not stop.is_set():
            exporter.refresh()

    def beside() -> None:
        with torch.no_grad():
            for _ in range(100):
                pilot.adapted(batch(2))

    def ask() -> None:
        with torch.no_grad():
            for _ in range(100):
                pilot(batch(2))

    workers = [threading.Thread(target=work, daemon=True) for work in (beside, ask)]
    reader = threading.Thread(target=refresh, daemon=True)
    for thread in (*workers, reader):
        thread.start()
    for thread in workers:
        thread.join(20)
        assert not thread.is_alive()
    stop.set()
    reader.join(5)
    exporter.refresh()
    assert value(exporter, "updates_total") == 200
    assert value(exporter, "exporter_failures_total") == 0


# -- reading -----------------------------------------------------------------------------------------------------------


def get(app: Any, path: str = "/metrics") -> tuple[int, dict[str, str], str]:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "root_path": "", "headers": []}
    asyncio.run(app({**scope, "query_string": b"", "http_version": "1.1", "scheme": "http"}, receive, send))
    headers = {key.decode().lower(): text.decode() for key, text in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(m.get("body", b"") for m in sent[1:]).decode()


def test_its_application_gives_every_metric_with_help_and_type() -> None:
    told = story()
    exporter = exporter_of(told.pilot)
    told.send()
    exporter.refresh()
    status, headers, text = get(exporter.app())
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    for metric in METRICS:
        name = f"normadapt_{metric.name}" + ("_total" if metric.kind == "counter" else "")
        assert f"# TYPE {name} {metric.kind}\n" in text
        assert f"# HELP {name} {metric.text}\n" in text


def test_it_mounts_in_an_application_of_the_users() -> None:
    fastapi = pytest.importorskip("fastapi", reason="MOUNTING NOT TESTED: pip install fastapi")
    exporter = exporter_of(watched.adapted(model()))
    application = fastapi.FastAPI()
    application.mount("/metrics", exporter.app())
    status, _, text = get(application, "/metrics/")
    assert status == 200
    assert 'normadapt_updates_total{model="Sequential"} 0.0' in text
