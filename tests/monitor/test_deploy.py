"""The dashboard and the alert rules, by Prometheus's own tool where it is there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from normadapt.monitor.metrics import METRICS

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8"))
ALERTS = (DEPLOY / "alerts.yml").read_text(encoding="utf-8")
TESTS = (DEPLOY / "alerts_test.yml").read_text(encoding="utf-8")
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="ALERTS AND QUERIES NOT TESTED: promtool is missing -> apt-get install prometheus"
)

_SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
NAMES = {f"normadapt_{metric.name}{suffix}": metric for metric in METRICS for suffix in _SUFFIXES[metric.kind]}


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert PROMTOOL is not None
    return subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, timeout=60, check=False)


def queries() -> Iterator[tuple[str, str]]:
    """Every query of the dashboard with what it is for."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for annotation in DASHBOARD["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]


def filled(query: str) -> str:
    """As Grafana sends it."""
    query = query.replace("$__rate_interval", "1m").replace("$__range", "3h")
    return query.replace("$job", ".*").replace("$model", ".*")


def metrics_in(text: str) -> set[str]:
    return set(re.findall(r"\bnormadapt_[a-z_]+", text))


def test_every_metric_has_a_name_as_prometheus_wants_it() -> None:
    for metric in METRICS:
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", metric.name)
        assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket"))
        assert metric.text.endswith(".")
        assert metric.kind in _SUFFIXES
        assert set(metric.labels) <= {"layer", "guard", "stage", "statistic", "cause", "arm"}  # no ids, no streams


def test_dashboard_and_alerts_use_metrics_that_exist_and_the_dashboard_all_of_them() -> None:
    shown = set().union(*(metrics_in(query) for _, query in queries()))
    assert shown <= set(NAMES)
    assert {NAMES[name].name for name in shown} == {metric.name for metric in METRICS}
    assert metrics_in(re.sub(r"annotations:\n(?: {10}.*\n?)+", "", ALERTS)) <= set(NAMES)
    assert metrics_in(TESTS) <= set(NAMES)


def test_labels_in_queries_and_legends_are_those_of_the_metrics() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            known = {"job", "instance", "model", "le"}
            for name in metrics_in(target["expr"]):
                known |= set(NAMES[name].labels)
            used = set(re.findall(r"(\w+)=~?\"", target["expr"])) | set(
                re.findall(r"{{(\w+)}}", target["legendFormat"])
            )
            for group in re.findall(r"by \(([^)]*)\)", target["expr"]):
                used |= set(re.findall(r"\w+", group))
            assert used <= known, (panel["title"], used - known)


def test_the_dashboard_fits_its_grid() -> None:
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"], panel["title"]
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
            assert panel["datasource"]["uid"] == "${datasource}"  # whichever the reader has
    assert {entry["name"] for entry in DASHBOARD["templating"]["list"]} == {"datasource", "job", "model"}


def test_every_alert_says_what_and_is_tested_to_fire_and_not_to() -> None:
    names = re.findall(r"- alert: (\w+)", ALERTS)
    assert len(names) == len(set(names)) >= 10
    for name, text in zip(names, re.split(r"- alert: \w+", ALERTS)[1:], strict=True):
        assert re.search(r"severity: (info|warning|critical)\n", text), name
        assert re.search(r"summary: \".+\"\n", text), name
        assert re.search(r"description: \".+\"\n", text), name
        assert re.search(rf"alertname: {name}\n +exp_alerts:\n", TESTS), f"{name} is never seen to fire"
        assert re.search(rf"alertname: {name}\n +exp_alerts: \[\]\n", TESTS), f"{name} is never seen to be quiet"


@needs_promtool
def test_the_alert_rules_are_sound_and_do_what_their_tests_say() -> None:
    checked = promtool("check", "rules", str(DEPLOY / "alerts.yml"))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(re.findall('- alert:', ALERTS))} rules found" in checked.stdout
    tested = promtool("test", "rules", str(DEPLOY / "alerts_test.yml"))
    assert tested.returncode == 0, tested.stdout + tested.stderr


@needs_promtool
def test_the_alerts_tests_notice_rules_that_never_fire(tmp_path: Path) -> None:
    (tmp_path / "alerts_test.yml").write_text(TESTS, encoding="utf-8")
    broken = re.sub(r"expr: (.|\n)*?(?=\n +(for|labels):)", "expr: vector(0) > 1", ALERTS)
    (tmp_path / "alerts.yml").write_text(broken, encoding="utf-8")
    tested = promtool("test", "rules", str(tmp_path / "alerts_test.yml"))
    assert tested.returncode != 0
    for name in re.findall(r"- alert: (\w+)", ALERTS):
        assert name in tested.stdout + tested.stderr, f"nobody notices that {name} never fires"


@needs_promtool
def test_every_query_of_the_dashboard_can_be_parsed(tmp_path: Path) -> None:
    rules = [{"record": f"dashboard:query{place}", "expr": filled(query)} for place, (_, query) in enumerate(queries())]
    file = tmp_path / "queries.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")  # JSON is YAML
    checked = promtool("check", "rules", str(file))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(rules)} rules found" in checked.stdout


@needs_promtool
def test_what_the_exporter_gives_is_sound_to_promtool() -> None:
    prometheus = pytest.importorskip("prometheus_client", reason="METRICS NOT TESTED: pip install prometheus-client")
    import torch

    from normadapt.monitor.metrics import PrometheusExporter
    from pilot.stories import Story

    registry = prometheus.CollectorRegistry()
    told = Story()
    with PrometheusExporter(told.pilot, registry=registry, seconds=3600) as exporter, torch.no_grad():
        told.until("canary", labelled=True)
        exporter.refresh()
        text = prometheus.generate_latest(registry).decode()
    text = re.sub(r"(?m)^.*_created.*\n", "", text)  # prometheus_client's own, in the old format gauges
    assert PROMTOOL is not None
    checked = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
