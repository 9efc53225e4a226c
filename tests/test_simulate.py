from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET

import pytest
import torch

from normadapt.simulate import EXPERIMENTS, Experiment, Figure, Series, Simulation, run_simulation
from normadapt.simulate.charts import chart, linear_ticks, log_ticks, tick_text
from normadapt.simulate.coverage import _rows as coverage_rows
from normadapt.simulate.distribution import _binomial_exact, _exact, _point, distribution
from normadapt.simulate.draws import BERNOULLI, CONTAMINATED, EXPONENTIAL, LAWS, NORMAL, Law, gamma, statistics
from normadapt.simulate.page import page
from normadapt.simulate.results import Finding, silent
from normadapt.simulate.risk import _compare, _location, _second_order
from normadapt.simulate.skewness import _row
from normadapt.simulate.tail import _rows


@pytest.fixture(scope="module")
def laws_of_means() -> Experiment:
    return distribution(0, False, silent)


@pytest.mark.parametrize("law", [*LAWS.values(), gamma(3)], ids=lambda law: law.name)
def test_laws_have_the_cumulants_they_say(law: Law) -> None:
    n, samples = 40, 20_000
    s = statistics(law, n, (samples,), torch.Generator().manual_seed(3))
    for values, expected in zip(s, (0.0, 1.0, law.skewness, law.excess_kurtosis), strict=True):
        assert abs(values.mean() - expected) < 4.5 * values.std() / samples**0.5


def test_the_exact_cumulants_of_two_laws() -> None:
    assert (EXPONENTIAL.skewness, EXPONENTIAL.excess_kurtosis, EXPONENTIAL.gamma_shape) == (2, 6, 1)
    assert BERNOULLI.skewness == pytest.approx(1.5)
    # 0.9 N(0, 1) + 0.1 N(0, 25): E x^4 = 3 (0.9 + 62.5) over 3.4^2
    assert CONTAMINATED.excess_kurtosis == pytest.approx(3 * 63.4 / 3.4**2 - 3)


def test_statistics_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def counting(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        seen.append(shape)
        return torch.arange(shape[0], dtype=torch.float64).unsqueeze(1).expand(shape).clone()

    monkeypatch.setattr("normadapt.simulate.draws._BLOCK", 30)
    law = Law("count", 0, 0, counting)
    s = statistics(law, 10, (7,), torch.Generator())
    assert seen == [(10, 3), (10, 3), (10, 1)]
    assert s.mean.tolist() == [4.5] * 7
    assert s.variance.tolist() == pytest.approx([55 / 6] * 7)
    assert s.k3.abs().max() < 1e-9


def test_saddlepoint_is_uniform_and_edgeworth_is_not(laws_of_means: Experiment) -> None:
    rows = [row for row in laws_of_means.rows if row["law"] == "mean of exponentials"]
    for row in rows:
        if row["method"] == "Lugannani-Rice" and row["where"] != "centre":
            assert abs(row["relative_error"]) < 0.06 / row["n"]
    far = {row["method"]: row["relative_error"] for row in rows if (row["n"], row["where"]) == (10, 1e-8)}
    assert far["Edgeworth, 2 terms"] < -0.9
    centre = {row["method"]: row["absolute_error"] for row in rows if (row["n"], row["where"]) == (10, "centre")}
    assert centre["normal"] > 5 * centre["Edgeworth, 1 term"] > 10 * centre["Edgeworth, 2 terms"]


def test_the_exact_law_is_exact(laws_of_means: Experiment) -> None:
    mpmath = pytest.importorskip("mpmath")
    row = next(
        row
        for row in laws_of_means.rows
        if (row["n"], row["where"], row.get("method")) == (5, 1e-8, "Barndorff-Nielsen")
    )
    exact = row["value"] / (1 + row["relative_error"])
    assert exact == pytest.approx(1e-8, rel=1e-9)
    z = _point(5, 1e-8)
    with mpmath.workdps(30):
        reference = float(mpmath.gammainc(5, 5 + mpmath.sqrt(5) * mpmath.mpf(z.item()), regularized=True))
        total = sum(mpmath.binomial(40, k) * mpmath.mpf(0.2) ** k * mpmath.mpf(0.8) ** (40 - k) for k in range(28, 41))
    assert _exact(5, z).item() == pytest.approx(reference, rel=1e-11)
    assert _binomial_exact()[28].item() == pytest.approx(float(total), rel=1e-11)


def test_normal_data_need_no_skewness_and_miss_as_often_as_they_should() -> None:
    rows = coverage_rows(NORMAL, 20, 400, torch.Generator().manual_seed(1))
    rates = {row["method"]: row for row in rows if row["source"] == "known"}
    for method in ("Student", "Cornish-Fisher, known skewness", "Cornish-Fisher, shared skewness"):
        for side in ("above", "below"):
            assert abs(rates[method][side] - 0.025) < 0.003
    assert rates["normal"]["above"] > 0.028


def test_cornish_fisher_mends_the_heavy_side_of_skewed_data() -> None:
    rows = coverage_rows(EXPONENTIAL, 20, 200, torch.Generator().manual_seed(2))
    rates = {row["method"]: row["below"] for row in rows if row["source"] == "known"}
    assert rates["normal"] > 0.07
    assert abs(rates["Cornish-Fisher, shared skewness"] - 0.025) < 0.01


def test_the_corrected_weight_is_near_the_simulated_optimum() -> None:
    s = statistics(EXPONENTIAL, 64, (2_000, 64), torch.Generator().manual_seed(4))
    row = _row(EXPONENTIAL, 64, 1.0, s)
    assert abs(row["optimum"] - 0.95601) < 4 * row["standard_error"]  # oracle MC_bnloss
    assert row["corrected"] == pytest.approx(0.956522, abs=1e-6)
    assert row["loss_corrected"] < row["loss_plain"]
    opposite = _row(EXPONENTIAL, 64, -1.0, s)
    assert opposite["optimum"] > 1 > opposite["plain"]
    assert min(row["loss_plain"], row["loss_corrected"], row["loss_batch"]) >= row["loss_optimum"]


def test_the_tail_safe_weight_is_exact_for_normal_data() -> None:
    for row in _rows(NORMAL, 8, 0.5 / 8**0.5, None):
        assert row["weight"] == 1 or row["harm"] == pytest.approx(row["nominal"], rel=1e-6)


def test_harm_is_the_same_exact_and_simulated() -> None:
    errors = statistics(EXPONENTIAL, 16, (200_000,), torch.Generator().manual_seed(5)).mean.sort().values
    for exact, simulated in zip(_rows(EXPONENTIAL, 16, 0.1, None), _rows(EXPONENTIAL, 16, 0.1, errors), strict=True):
        spread = math.sqrt(exact["harm"] * (1 - exact["harm"]) / 200_000)
        assert abs(exact["harm"] - simulated["harm"]) < 4 * spread + 1e-9


def test_the_oracle_is_the_floor_of_the_batch_and_the_source() -> None:
    s = statistics(NORMAL, 8, (300, 16), torch.Generator().manual_seed(6))
    for shift in (0.0, 0.3, 1.0):
        truth = torch.full((16,), shift, dtype=torch.float64)
        risks = {row["rule"]: row["risk"] for row in _compare(_location(s, truth, 8), truth, 8, {})}
        assert risks["oracle"] <= min(risks["batch"], risks["source"], risks["fixed, n/(n + 16)"]) + 1e-12
        assert risks["source"] == pytest.approx(shift**2)
        assert 8 * risks["batch"] == pytest.approx(1, abs=0.1)


def test_the_second_order_risk_of_the_plug_in_rule() -> None:
    generator = torch.Generator().manual_seed(7)
    for sign in (1, -1):
        row = _second_order(sign, 50_000, generator)
        assert abs(row["measured"] - row["formula"]) < 0.03  # the next order, n^-2 of the batch's
        assert row["measured"] * sign < 0.0


def test_same_seed_same_numbers() -> None:
    first, again = (run_simulation(["distribution"], seed=1).to_dict() for _ in range(2))
    assert first["experiments"] == again["experiments"]
    rows = [statistics(EXPONENTIAL, 5, (3,), torch.Generator().manual_seed(s)).mean.tolist() for s in (1, 1, 2)]
    assert rows[0] == rows[1] != rows[2]


def test_progress_and_names() -> None:
    steps: list[tuple[int, int, str]] = []
    found = run_simulation(["distribution"], progress=lambda *step: steps.append(step))
    assert [step[0] for step in steps] == list(range(1, steps[0][1] + 1))
    assert {step[2] for step in steps} == {"distribution"}
    assert list(found.seconds) == ["distribution"]
    assert list(EXPERIMENTS) == ["risk", "distribution", "coverage", "skewness", "tail"]
    with pytest.raises(ValueError, match=r"experiments must be among risk, .*; got nonsense"):
        run_simulation(["risk", "nonsense"])


def test_page_is_whole_well_formed_and_fetches_nothing(laws_of_means: Experiment) -> None:
    html = Simulation((laws_of_means,), 0, False, {}).to_html("1.2.3")
    assert "normadapt 1.2.3" in html
    assert not re.search(r"https?:|<script|<link|@import|url\(|src=", html)
    for svg in re.findall(r"<svg.*?</svg>", html, re.S):
        ET.fromstring(svg)
    assert html.count("<figure>") == len(laws_of_means.figures)
    for finding in laws_of_means.findings:
        assert finding.verdict in html
    json.dumps(laws_of_means.to_dict(), allow_nan=False)


def test_texts_are_escaped() -> None:
    line = Series("<b>", (1.0, 2.0), (1.0, 2.0))
    figure = Figure("a < b", "x & y", "<x>", "<y>", (line,))
    experiment = Experiment("e", "<t>", (figure,), (Finding(1, "<q>", "<m>", True, "<v>"),), ())
    html = page([experiment], "0")
    for raw in ("<b>", "a < b", "x & y", "<x>", "<y>", "<t>", "<q>", "<m>", "<v>"):
        assert raw not in html


def paths(figure: Figure) -> list[list[tuple[float, float]]]:
    """The points of every line that the chart draws."""
    svg = ET.fromstring(chart(figure).split("</svg>")[0] + "</svg>")
    found = []
    for path in svg.findall("g/path"):
        numbers = re.findall(r"(-?[\d.]+) (-?[\d.]+)", path.get("d", ""))
        found.append([(float(x), float(y)) for x, y in numbers])
    return found


def test_lines_run_where_the_numbers_are() -> None:
    line = Series("line", (0.0, 1.0, 2.0), (0.0, 5.0, 10.0))
    ((a, b, c),) = paths(Figure("", "", "", "", (line,)))
    assert b == pytest.approx(((a[0] + c[0]) / 2, (a[1] + c[1]) / 2), abs=0.1)
    assert a[1] > c[1]  # upwards
    powers = Series("powers", (1.0, 10.0, 100.0), (1e-3, 1e-2, 1e-1))
    ((a, b, c),) = paths(Figure("", "", "", "", (powers,), log_x=True, log_y=True))
    assert b == pytest.approx(((a[0] + c[0]) / 2, (a[1] + c[1]) / 2), abs=0.1)


def test_lines_are_cut_at_the_top_and_broken_at_gaps() -> None:
    steep = Series("steep", (0.0, 1.0), (0.0, 10.0))
    ((start, end),) = paths(Figure("", "", "", "", (steep,), y_max=5.0))
    full = paths(Figure("", "", "", "", (steep,)))[0]
    assert end[0] - start[0] == pytest.approx(0.525 * (full[1][0] - full[0][0]), abs=0.2)
    gap = Series("gap", (0.0, 1.0, 2.0, 3.0, 4.0), (1.0, 2.0, math.nan, 2.0, 1.0))
    drawn = chart(Figure("", "", "", "", (gap,)))
    assert drawn.count("M") >= 2
    assert "nan" not in drawn


def test_ticks() -> None:
    assert linear_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert linear_ticks(-0.7, 0.7) == pytest.approx([-0.5, 0, 0.5])
    assert log_ticks(4, 256) == pytest.approx([5, 10, 20, 50, 100, 200])
    assert log_ticks(1e-9, 0.5) == pytest.approx([1e-9, 1e-7, 1e-5, 1e-3, 1e-1])
    assert [tick_text(v) for v in (0, -0.5, 1e-8, 200)] == ["0", "−0.5", "1e−8", "200"]
    for low, high in ((0.0, 1e-12), (3.0, 3.1), (-5e7, 1e9)):
        assert 2 <= len(linear_ticks(low, high)) <= 8


def test_coverage_says_what_it_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normadapt.simulate.coverage._GROUPS", (100, 100))
    found = EXPERIMENTS["coverage"](0, False, silent)
    finding = found.findings[0]
    rate = next(
        row["below"]
        for row in found.rows
        if (row["law"], row["n"], row["source"], row["method"]) == ("exponential", 20, "known", "normal")
    )
    assert f"{rate:.1%} (normal)" in finding.measured
    assert finding.matters


SIZES = {
    "risk": ("_REPLICATIONS", 20),
    "coverage": ("_GROUPS", 20),
    "skewness": ("_DRAWS", 300_000),
    "tail": ("_SAMPLES", 5_000),
}


def test_every_experiment_and_every_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (constant, size) in SIZES.items():
        monkeypatch.setattr(f"normadapt.simulate.{name}.{constant}", (size, size))
    monkeypatch.setattr("normadapt.simulate.risk.COUNTS", (4, 16))
    found = run_simulation(seed=3)
    assert {finding.claim for finding in found.findings()} == {1, 2, 3, 4, 5, 6}
    assert found.to_html("0").count("<figure>") == sum(len(e.figures) for e in found.experiments)
    for experiment in found.experiments:
        for figure in experiment.figures:
            assert any(math.isfinite(v) for line in figure.series for v in line.y), figure.title
            assert not re.search(r"\bnan\b", figure.text), figure.title
            assert all(len(line.x) == len(line.y) for line in figure.series)
        for row in experiment.rows:
            assert not any(isinstance(v, float) and math.isnan(v) for v in row.values()), row
