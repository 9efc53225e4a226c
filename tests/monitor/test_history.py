from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from monitor import watched
from normadapt.adapted import window_report
from normadapt.baselines import BatchStatistics
from normadapt.monitor import HISTORY, Recorder
from normadapt.monitor.columns import Columns
from normadapt.monitor.reduction import answers_of
from normadapt.pilot import Disagreement, NonFinite, Pilot, Plan
from normadapt.reports.history import History
from normadapt.reports.report import Report
from normadapt.store import Store


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 3)).eval()


def batch(n: int = 8, shift: float = 0.0) -> Tensor:
    return torch.randn(n, 1, 8, 8) + shift


def test_a_column_table_keeps_its_means_whatever_the_length() -> None:
    rows = np.random.default_rng(0).normal(size=(1000, 3))
    rows[::7, 1] = float("nan")
    table = Columns(3, 16)
    for place, row in enumerate(rows):
        table.add(row, float(place), 2)
    assert table.count <= 16
    assert table.rows[: table.count].sum() == 1000
    assert table.items[: table.count].sum() == 2000
    full = table.rows[0]
    assert (table.rows[: table.count - 1] == full).all()
    for place, mean in enumerate(table.means().T):
        part = rows[int(place * full) : int((place + 1) * full)]
        np.testing.assert_allclose(mean, np.nanmean(part, 0))
        assert table.times[place] == place * full


def test_the_last_column_is_what_the_report_says() -> None:
    adapted = watched.adapted(model())
    recorder = Recorder(adapted)
    for place in range(70):
        adapted(batch(shift=2.0 if place > 30 else 0.0))
    history, report = recorder.history(), adapted.report()
    assert len(history) == 70
    assert history.items.sum() == 560
    for place, site in enumerate(report.sites):
        assert history.sites[place] == site.name
        assert history.shift[place, -1] == pytest.approx(site.shift, rel=1e-6)
        assert history.mean_weight[place, -1] == pytest.approx(site.mean_weight, rel=1e-6)
        assert history.variance_weight[place, -1] == pytest.approx(site.variance_weight, rel=1e-6)
        assert site.tail_probability is not None
        assert 10 ** history.tail[place, -1] == pytest.approx(max(site.tail_probability, 1e-300), rel=1e-6)
    assert history.shift[0, -1] > 2 * history.shift[0, 20]


def test_answers_are_counted_by_pass() -> None:
    probabilities = [torch.softmax(torch.randn(n, 3), 1) for n in (4, 1, 7)]
    told = answers_of([probabilities[0], None, *probabilities[1:], torch.full((2, 3), float("nan"))])
    assert [shares is None for _, shares in told] == [False, True, False, False, True]
    for found, p in zip([told[0], *told[2:4]], probabilities, strict=True):
        assert found[0] == pytest.approx(float(torch.distributions.Categorical(probs=p).entropy().mean()), rel=1e-5)
        np.testing.assert_allclose(found[1], np.bincount(p.argmax(1), minlength=3) / len(p))


def test_classes_and_entropy_are_of_the_answers() -> None:
    adapted, outputs = watched.adapted(model()), []
    with Recorder(adapted) as recorder:
        for _ in range(5):
            outputs.append(adapted(batch()))
    history = recorder.history()
    assert history.classes is not None
    shares = np.bincount(torch.cat(outputs).argmax(1), minlength=3) / 40
    np.testing.assert_allclose(history.classes.mean(1), shares)
    np.testing.assert_allclose(history.classes.sum(0), 1)
    assert history.agreement is None
    assert history.class_names == ("0", "1", "2")


def test_a_rule_that_says_nothing_still_has_a_shift() -> None:
    adapted = watched.adapted(model(), BatchStatistics())
    with Recorder(adapted) as recorder:
        adapted(batch(64, 2.0))
    history, report = recorder.history(), adapted.report()
    assert history.shift[0, 0] == pytest.approx(report.sites[0].shift, rel=1e-5)
    assert np.isnan(history.tail).all()
    assert np.isnan(history.mean_weight).all()


@pytest.mark.filterwarnings("ignore:.*statistics of its own")
def test_channels_show_the_largest_shift_and_its_instances() -> None:
    adapted = watched.adapted(model())
    means: list[Tensor] = []
    with Recorder(adapted) as recorder, adapted.observe(lambda _, seen: means.append(seen.moments[0].mean)):
        for _ in range(20):
            adapted(batch(8, 1.5))
    channels = recorder.history().channels[0]
    seen = torch.cat(means)
    source = adapted.sources[0]
    shift = ((seen.mean(0) - source.mean) / (source.variance + source.eps).sqrt()).abs()
    assert [channel.index for channel in channels] == shift.argsort(descending=True).tolist()
    first = channels[0]
    assert sum(first.counts) == 160
    assert first.cumulants[0] == pytest.approx(float(seen[:, first.index].mean()), rel=1e-5)
    assert first.cumulants[1] == pytest.approx(float(seen[:, first.index].std(correction=0)), rel=1e-4)
    assert first.scatter is not None
    assert first.scatter < first.source[1]
    in_use = adapted.freeze()[1].running_mean[first.index]
    assert first.in_use[0] == pytest.approx(float(in_use), rel=1e-5)


def test_a_history_goes_to_json_and_back() -> None:
    adapted = watched.adapted(model())
    with Recorder(adapted) as recorder:
        for _ in range(9):
            output = adapted(batch())
            recorder.compare(output, output)
        recorder.mark("the lamp was replaced")
        adapted(batch())
    history = recorder.history()
    back = History.from_dict(json.loads(json.dumps(history.to_dict(), allow_nan=False)))
    np.testing.assert_allclose(back.shift, history.shift, rtol=1e-3)
    np.testing.assert_allclose(back.times, history.times, atol=1e-3)
    assert back.agreement is not None
    assert back.agreement[:9].tolist() == [1.0] * 9
    assert math.isnan(back.agreement[9])
    assert back.marks[0].text == "the lamp was replaced"
    assert back.channels[1][0].counts == history.channels[1][0].counts
    report = adapted.report().with_history(history)
    read = Report.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False)))
    assert read.sites == report.sites
    assert read.history is not None
    assert read.history.sites == history.sites


@pytest.mark.parametrize("broken", [{}, {"format": 2}, {"format": 1, "sites": 3}])
def test_what_is_no_history_is_refused(broken: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"no history|format"):
        History.from_dict(broken)


def test_thinning_keeps_sums_and_means() -> None:
    adapted = watched.adapted(model())
    with Recorder(adapted) as recorder:
        for _ in range(50):
            adapted(batch())
    history = recorder.history()
    thin = history.thinned(7)
    assert len(thin) <= 7
    assert thin.items.sum() == history.items.sum()
    np.testing.assert_allclose((thin.shift * thin.batches).sum(1), history.shift.sum(1))
    assert thin.thinned(7) is thin


def test_streams_are_kept_apart_and_every_counts_what_it_skips() -> None:
    adapted = watched.adapted(model())
    with Recorder(adapted, every=3) as recorder:
        for _ in range(10):
            with adapted.stream("left"):
                adapted(batch(4))
        adapted(batch(5))
    assert recorder.streams == ("left", "default")
    assert recorder.history().items.sum() == 5
    left = recorder.history("left")
    assert len(left) == 4
    assert left.items.sum() == 40
    with pytest.raises(KeyError, match="left"):
        recorder.history("right")


def test_no_more_columns_than_asked_for_and_small_json() -> None:
    adapted = watched.adapted(model())
    with Recorder(adapted, columns=16) as recorder:
        for _ in range(100):
            adapted(batch(1))
    assert len(recorder.history()) <= 16
    assert recorder.history().items.sum() == 100
    assert recorder.failures == 0


def test_a_policy_is_asked_once_for_each_column(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    made = window_report.diagnostics_of
    monkeypatch.setattr(window_report, "diagnostics_of", lambda *of: (asked.append(1), made(*of))[1])
    adapted = watched.adapted(model())
    with Recorder(adapted, columns=8) as recorder:
        for _ in range(128):
            adapted(batch(8, 2.0))
    history = recorder.history()
    # 8 passes one by one, then 4 columns at each of four strides; rows wait 32 passes before they are columns
    assert len(asked) <= 2 * (8 + 4 * 4 + 32)
    assert np.isfinite(history.shift).all()
    assert recorder.failures == 0


def test_a_pilots_history_outlives_the_process(tmp_path: Path) -> None:
    plan = Plan(guards=(Disagreement(), NonFinite()))
    with Pilot(model(), store=tmp_path, plan=plan) as pilot:
        Recorder(pilot)
        for _ in range(6):
            pilot(batch())
        before = pilot.now()
    with Store(tmp_path, create=False) as store:
        kept = store.read_state(HISTORY)
    assert kept is not None
    first = History.from_dict(kept["streams"]["default"])
    assert first.items.sum() == 48
    assert first.agreement is not None
    assert any(mark.text == "shadow" for mark in first.marks)
    assert first.times[-1] == pytest.approx(before, abs=5)
    assert Report.from_dict(kept["report"]).sites[0].name == "1"
    with Pilot(model(), store=tmp_path, plan=plan) as pilot, Recorder(pilot) as recorder:
        pilot(batch())
        second = recorder.history()
        assert second.items.sum() == 56
        assert len(second) == 7
        assert [mark.text for mark in second.marks] == ["shadow", "process restarted"]


def test_recorders_refuse_what_they_cannot_use() -> None:
    with pytest.raises(TypeError, match=r"adapt\(\)"):
        Recorder(model())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every"):
        Recorder(watched.adapted(model()), every=0)
    with pytest.raises(ValueError, match="columns"):
        Recorder(watched.adapted(model()), columns=9)


def test_saving_waits_for_nobody(tmp_path: Path) -> None:
    """A pass of the model itself, which saves, while another thread is within the pilot: neither waits for ever."""
    plan = Plan(guards=(NonFinite(), Disagreement()))
    within, go_on = threading.Event(), threading.Event()

    def hold(stream: str, compared: object) -> None:
        within.set()
        go_on.wait(20)

    with Pilot(model(), store=tmp_path / "store", plan=plan) as pilot:
        recorder = Recorder(pilot)
        pilot.observe(hold)
        asking = threading.Thread(target=lambda: pilot(batch(), ids=range(8)), daemon=True)
        asking.start()
        assert within.wait(20)

        def save() -> None:
            recorder._next_save = 0.0
            pilot.adapted(batch())

        direct = threading.Thread(target=save, daemon=True)
        direct.start()
        direct.join(10)
        waited = direct.is_alive()
        go_on.set()
        asking.join(20)
        direct.join(20)
        assert not waited
        assert recorder.failures == 0
        pilot(batch(), ids=range(8))
    with Store(tmp_path / "store", create=False) as store:
        kept = store.read_state(HISTORY)
    assert kept is not None
    assert kept["streams"]
