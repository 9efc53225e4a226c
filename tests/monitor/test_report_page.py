from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import normadapt as na
from monitor import watched
from normadapt.cli import app
from normadapt.errors import ExtraMissingError, SpecError
from normadapt.monitor import Recorder, report_page
from normadapt.monitor.kept import read_source
from normadapt.monitor.log_words import happening, happenings, in_words
from normadapt.monitor.page_data import page_data
from normadapt.monitor.words import findings
from normadapt.pilot import Disagreement, NonFinite, Pilot, Plan
from normadapt.reports.domain_report import DomainReport
from normadapt.reports.history import History, Mark
from normadapt.reports.report import Report, SiteReport


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 3))
    for _ in range(50):
        net(batch(32))
    return net.eval()


def batch(n: int = 16, shift: float = 0.0) -> Tensor:
    return torch.randn(n, 1, 8, 8) + shift


def recorded(*shifts: float) -> Report:
    adapted = watched.adapted(model())
    with Recorder(adapted) as recorder:
        for shift in shifts:
            output = adapted(batch(shift=shift))
            recorder.compare(output.roll(1, 0) if shift else output, output)
    return recorder.report()


def made_up(shift: list[list[float]], tail: list[list[float]], **more: Any) -> Report:
    layers, width = np.array(shift).shape
    names = tuple(f"layer{place}" for place in range(layers))
    blank = np.full((layers, width), 0.5)
    history = History(
        "default",
        names,
        1.7e9 + 60.0 * np.arange(width),
        np.ones(width),
        np.full(width, 10.0),
        np.array(shift),
        np.array(tail),
        blank,
        blank,
        np.full(width, 0.7),
        **more,
    )
    sites = tuple(SiteReport(n, "BatchNorm2d", 4, 10, 5.0, 0.1, 0.5, 0.5, 0.5, "tracking", 0) for n in names)
    return Report("Net", "Domains()", "default", False, True, sites, history=history)


def data_in(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    values: dict[str, Any] = json.loads(found[1])
    return values


def test_the_words_say_since_when_and_where() -> None:
    report = made_up(
        [[0.0] * 50 + [0.9] * 50, [0.0] * 60 + [0.5] * 40], [[-0.1] * 50 + [-30.0] * 50, [-0.1] * 60 + [-9.0] * 40]
    )
    found = findings(report)
    assert found.shifted
    assert found.headline == "The stream is clearly shifted from the source, since instance 500."
    assert found.layers == (0, 1)
    assert "Both layers are shifted; layer layer0 is shifted most, by 0.90 sd" in found.sentences[0]
    timed = findings(report, {"stage": "full"})
    assert "since 14 Nov 2023, 23:03 UTC" in timed.headline


def test_the_words_say_when_it_was_over_and_that_nothing_was() -> None:
    over = findings(made_up([[0.9] * 5 + [0.0] * 5], [[-30.0] * 5 + [-0.1] * 5]))
    assert over.headline == "The stream is not shifted now; it was until instance 50."
    assert over.shifted is False
    calm = findings(made_up([[0.9, 0.02, 0.02]], [[-0.5, -20.0, -0.3]]))  # sure but small, large but by chance
    assert calm.headline == "The stream is not shifted from the source."


def test_one_calm_column_does_not_end_a_shift() -> None:
    shift, tail = [0.5] * 20, [-20.0] * 20
    shift[12] = 0.0
    assert findings(made_up([shift], [tail])).began == 0


def test_the_words_say_what_adapting_did_to_the_answers() -> None:
    agreement = np.array([1.0] * 6 + [0.5] * 2)
    marks = (Mark(1.7e9, "stage", "shadow"), Mark(1.7e9 + 90, "rollback", "rolled back: noise"))
    told = " ".join(findings(made_up([[0.5] * 8], [[-9.0] * 8], agreement=agreement, marks=marks)).sentences)
    assert "Adapting changed 12.5% of the answers, 50.0% in the last quarter." in told
    assert "entropy stayed near 0.70 nats" in told
    assert "rolled back once" in told


LOOK, LIKE = "contrast 0.4 of source", ("low contrast, bright 0.5",)
DOMAINS = (
    DomainReport(0, "source", 10, 0, 10, 0.0, 0.0, look="as the source", is_source=True),
    DomainReport(1, "line <3>", 1204, 10, 1214, 2.1, 1.0, LIKE, LOOK, is_present=True),
)


def test_the_words_say_which_domain_it_is_in() -> None:
    report = replace(made_up([[0.5] * 8], [[-9.0] * 8]), domains=DOMAINS, notes=("It has seen 12 of 64 inputs.",))
    told = " ".join(findings(report).sentences)
    looks = "contrast 0.4 of source, like low contrast, bright 0.5"
    assert f"Its inputs are now of “line <3>” ({looks}), one of 2 domains that it has met." in told
    assert "It has seen 12 of 64 inputs." in told
    assert "several domains" not in told
    back = tuple(replace(domain, is_present=domain.is_source, seen=10 * domain.is_source) for domain in DOMAINS)
    mixed = replace(report.sites[0], status="tracking, per instance")
    told = " ".join(findings(replace(report, domains=back, sites=(mixed,), history=None)).sentences)
    assert "Its inputs are now of the source’s domain. The last batch held several domains" in told


def test_the_page_shows_the_domains_and_marks_the_present_one() -> None:
    text = report_page.page(replace(made_up([[0.5] * 8], [[-9.0] * 8]), domains=DOMAINS))
    first, second = (next(line for line in text.splitlines() if f"<td>{name}" in line) for name in ("source", "line"))
    assert "now" not in first
    assert 'class="here"' in second
    assert "<td>line &lt;3&gt; <b>now</b></td><td>contrast 0.4 of source, like low contrast, bright 0.5</td>" in second
    assert "<td>1,204</td><td>10</td><td>1,214</td><td>2.10</td><td>sure</td>" in second
    assert "domains-title" not in report_page.page(made_up([[0.5] * 8], [[-9.0] * 8]))


def test_the_page_has_words_figures_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    report = recorded(*[0.0] * 20, *[3.0] * 30)
    file = report.to_html(tmp_path / "report.html", title="A <b>camera</b>")
    text = file.read_text(encoding="utf-8")
    assert "A &lt;b&gt;camera&lt;/b&gt;" in text
    assert "shifted from the source" in text
    ours = text.replace(report_page.plotly_script(), "")
    assert not re.search(r"""(?:src|href)\s*=|url\(|@import|fetch\(|https?://""", ours)
    assert "</script" not in report_page.plotly_script().lower()
    assert file.stat().st_size < 6e6


def test_the_figures_show_what_the_history_has() -> None:
    report = recorded(*[0.0] * 20, *[3.0] * 30)
    values = page_data(report)
    assert json.loads(json.dumps(values, allow_nan=False))["first"] == values["shifted"][0]
    history = values["history"]
    assert report.history is not None
    np.testing.assert_allclose(history["shift"], report.history.shift, atol=5e-4)
    assert history["starts"][:3] == [0, 16, 32]
    assert history["stop"] == 800
    assert history["agreement"][0] == 1.0
    panel = history["channels"][0][0]
    assert sum(panel["counts"]) == panel["count"] >= 256
    assert sum(panel["law"]) * 9.0 / 60 == pytest.approx(1, abs=0.05)  # a density
    assert abs(panel["mean"] - panel["before"][0]) > 2 * abs(panel["mean"] - panel["after"][0])


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    report = made_up([[0.5, 0.5]], [[-9.0, -9.0]], marks=(Mark(1.7e9, "note", evil),))
    event = {"time": 1.7e9, "kind": evil, "facts": {"x": evil}}
    text = report.to_html(tmp_path / "r.html", title=evil, lead=evil, events=[event]).read_text(encoding="utf-8")
    assert evil not in text
    assert data_in(text)["history"]["marks"][0]["text"] == evil


def test_a_report_without_a_history_and_a_rule_without_tails_still_have_a_page(tmp_path: Path) -> None:
    adapted = watched.adapted(model(), na.baselines.BatchStatistics())
    adapted(batch())
    text = adapted.report().to_html(tmp_path / "a.html").read_text(encoding="utf-8")
    assert data_in(text)["history"] is None
    assert "not recorded" in text
    with Recorder(adapted) as recorder:
        adapted(batch(64, 3.0))
    values = page_data(recorder.report())
    assert values["history"]["tail"] == [[None], [None]]
    assert findings(recorder.report()).shifted


def test_without_plotly_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def gone(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(report_page, "import_module", gone)
    with pytest.raises(ExtraMissingError, match=r"pip install 'normadapt\[report\]'"):
        recorded(0.0).to_html(tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()


def test_the_command_makes_a_page_of_a_store_and_of_a_file(tmp_path: Path) -> None:
    store, out = tmp_path / "store", tmp_path / "out" / "page.html"
    net = model()
    plan = Plan(guards=(Disagreement(), NonFinite()))
    with Pilot(net, watched.profile_of(net), store=store, plan=plan) as pilot:
        Recorder(pilot)
        for place in range(12):
            pilot(batch(shift=3.0), stream="left" if place < 6 else "right")
        pilot.rollback("anna", reason="smoke")
    outcome = CliRunner().invoke(app, ["report", str(store), "--out", str(out)])
    assert outcome.exit_code == 0, outcome.output
    assert str(out) in outcome.stdout.replace("\n", "")
    text = out.read_text(encoding="utf-8")
    assert "Audit log" in text
    assert "by anna" in text
    assert "“rolled back”" in text
    assert data_in(text)["history"]["time"] is True
    kept = read_source(store, "left")
    assert kept.streams == ("left", "right")
    assert kept.report.stream == "left"
    assert kept.report.history is not None
    assert kept.report.sites[0].count == 96
    assert kept.report.sites[0].shift == pytest.approx(kept.report.history.shift[0, -1])
    with pytest.raises(SpecError, match="'left', 'right'"):
        read_source(store, "middle")
    file = tmp_path / "report.json"
    file.write_text(json.dumps({"report": kept.report.to_dict()}))
    assert CliRunner().invoke(app, ["report", str(file), "--out", str(out)]).exit_code == 0
    assert read_source(file).report.sites == kept.report.sites
    file.write_text("[]")
    outcome = CliRunner().invoke(app, ["report", str(file), "--out", str(out)])
    assert outcome.exit_code == 2
    assert "expected a store's folder, or a report as JSON" in " ".join(outcome.output.split())


def test_each_stream_of_a_store_has_its_domains(tmp_path: Path) -> None:
    net, seen = model(), {}
    plan = Plan(guards=(Disagreement(), NonFinite()))
    with Pilot(net, watched.profile_of(net), store=tmp_path, plan=plan) as pilot:
        Recorder(pilot)
        for name, shift in (("left", 3.0), ("right", -3.0)):
            for _ in range(6):
                pilot(batch(shift=shift), stream=name)
            with pilot.adapted.stream(name):
                seen[name] = pilot.adapted.domains
    assert read_source(tmp_path, "left").report.domains == seen["left"] != seen["right"]
    assert read_source(tmp_path).report.domains == seen["right"]


def test_a_store_without_a_history_has_its_log(tmp_path: Path) -> None:
    with Pilot(model(), store=tmp_path / "s", plan=Plan(guards=(Disagreement(), NonFinite()))) as pilot:
        pilot(batch())
    kept = read_source(tmp_path / "s")
    assert kept.streams == ()
    text = report_page.page(kept.report, status=kept.status, events=kept.events)
    assert "No history was kept" in text
    assert "transition" in text


def test_events_are_told_in_words() -> None:
    def told(kind: str, **facts: object) -> str:
        return in_words(happening({"time": 0.0, "kind": kind, "facts": facts}))

    moved = told(
        "transition",
        **{"from": "canary", "to": "rolled_back", "share": 0.25, "serving": "snapshot 3", "by": "", "reason": "noise"},
    )
    assert moved == "canary to rolled back, 25% to snapshot 3: noise"
    assert told("rollback", **{"from": 4, "to": 3, "by": "anna", "reason": ""}) == "head from snapshot 4 to 3 by anna"
    assert told("blind guards", guards=["a", "b"], level=math.pi) == "guards a b, level 3.142"
    assert told("created") == "–"


def test_all_times_are_of_the_pilots_clock() -> None:
    def told(time: float, kind: str, **facts: float) -> dict[str, Any]:
        return {"time": time, "kind": kind, "facts": facts}

    log = [told(0.0, "created"), told(10.0, "stage", at=1000.0), told(10.1, "commit"), told(20.0, "rollback")]
    log += [told(20.01, "trip", at=5000.0), told(20.5, "command")]
    np.testing.assert_allclose(
        [event.time for event in happenings(log)], [990, 1000, 1000.1, 4999.99, 5000, 5000.49], atol=1e-9
    )
    assert [event.time for event in happenings(log[:1])] == [0.0]
    assert "at" not in in_words(happening(log[4]))


def test_a_drills_page_tells_the_times_of_its_figures(tmp_path: Path) -> None:
    now = [1.0e9]
    plan = Plan(guards=(Disagreement(), NonFinite()))
    with Pilot(model(), store=tmp_path / "s", plan=plan, clock=lambda: now[0]) as pilot:
        Recorder(pilot)
        for _ in range(4):
            pilot(batch())
            now[0] += 3600
        pilot(batch())
        pilot.rollback("anna")
    kept = read_source(tmp_path / "s")
    text = report_page.page(kept.report, status=kept.status, events=kept.events)
    row = next(line for line in text.splitlines() if "by anna" in line and "transition" in line)
    assert "9 Sep 2001, 05:46:40 UTC" in row
    marks = data_in(text)["history"]["marks"]
    assert marks[-1]["at"] == 1000 * (1_000_000_000 + 4 * 3600)


def test_nothing_adapted_is_no_calm_stream() -> None:
    found = findings(watched.adapted(model()).report())
    assert (found.headline, found.shifted) == ("Nothing was adapted yet.", None)
