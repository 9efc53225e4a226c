"""What the command line prints says what the results say, and fits an 80-column terminal."""

import re

import pytest
from rich.console import Console

from normadapt.demo import METHODS, DemoResult, Row
from normadapt.reports.domain_report import DomainReport
from normadapt.reports.report import Report, SiteReport
from normadapt.tables import demo_findings, demo_notes, demo_table, report_table


def row(stream="noise", size=16, source=0.5, ours=0.6, error=0.01, images=1000):
    accuracy = dict.fromkeys(METHODS, 0.4) | {"source": source, "normadapt": ours}
    return Row(stream, size, images, accuracy, ours - source, error)


def site(name="features.1", kind="BatchNorm2d", status="tracking", excluded=0):
    return SiteReport(name, kind, 1280, 100000, 1000.5, 12.345, 1e-93, 1.0, 1.0, status, excluded)


DOMAINS = (
    DomainReport(0, "source", 1204, 0, 1204, 0.0, 0.0, look="as the source", is_source=True),
    DomainReport(
        3, "line 3, at night", 100_000, 1204, 101_204, 2.124, 0.99, ("low contrast, bright 0.5",),
        "contrast 0.4 of source, brighter", is_present=True,
    ),
)  # fmt: skip


def report(*sites, domains=(), notes=()):
    return Report("Net", "Domains(max_weight=0.5)", "default", False, True, sites, domains, notes)


def rendered(renderable, width=80, **options):
    console = Console(width=width, **options)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def result(*rows):
    return DemoResult(rows, report(site()), 7, 12.3)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row(ours=0.6)], "noise: gains 10.0 at 16."),
        ([row(ours=0.45)], "noise: loses 5.0 at 16."),
        ([row(ours=0.515)], "noise: no difference beyond chance."),
        ([row(ours=0.485)], "noise: no difference beyond chance."),
        (
            [row(size=1, ours=0.45), row(size=16, ours=0.5), row(size=64, ours=0.6)],
            "noise: gains 10.0 at 64; loses 5.0 at 1; no difference beyond chance at batch size 16.",
        ),
        ([row(size=1), row(size=16), row(size=64)], "noise: gains 10.0 at 1, 10.0 at 16 and 10.0 at 64."),
    ],
)
def test_findings_follow_from_gain_and_error(rows, said):
    assert [text.plain for text in demo_findings(result(*rows))] == [said]


def test_losses_are_red_and_gains_green():
    (gain,), (loss,) = demo_findings(result(row(ours=0.6))), demo_findings(result(row(ours=0.4)))
    assert "green" in str(gain.spans)
    assert "red" in str(loss.spans)
    assert "32m+10.0" in rendered(demo_table(result(row(ours=0.6))), force_terminal=True, color_system="standard")
    assert "31m-10.0" in rendered(demo_table(result(row(ours=0.4))), force_terminal=True, color_system="standard")


def test_the_best_of_a_row_is_bold_ties_included():
    tied = rendered(demo_table(result(row(source=0.6, ours=0.6))), force_terminal=True, color_system="standard")
    assert len(re.findall(r"\x1b\[1m *60\.0", tied)) == 2
    assert not re.findall(r"\x1b\[1m *40\.0", tied)


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_cut_or_wrapped_at(width):
    text = rendered(demo_table(result(row("contrast x0.3", 1, 0, 1), row("contrast x0.3", 16), row("blur"))), width)
    text += rendered(report_table(report(site(), site("layer4.1.bn2"), domains=DOMAINS)), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for whole in (
        "contrast x0.3",
        "100.0",
        "+100.0",
        "normadapt",
        "layer4.1.bn2",
        "tracking",
        "tail p",
        "1e-93",
        "100,000",
    ):
        assert whole in text
    assert len([line for line in text.splitlines() if " 100000 " in line]) == 2


def test_the_report_names_kinds_and_what_was_left_out():
    alike, mixed = rendered(report_table(report(site()))), report(site(), site("bn", "BatchNorm1d", "source", 3))
    assert "all layers BatchNorm2d" in " ".join(alike.split())
    text = rendered(report_table(mixed), 120)
    assert "BatchNorm1d" in text
    assert "source (3 left out)" in text


def test_the_report_shows_the_domains_and_marks_the_present_one():
    text = rendered(report_table(report(site(), domains=DOMAINS, notes=("64 inputs more are needed.",))), 120)
    first, second = (next(line for line in text.splitlines() if name in line) for name in ("source  ", "at night"))
    assert not first.startswith("->")
    for words in ("as the source", "1,204", "no shift"):
        assert words in first
    assert second.startswith("->")
    for words in ("contrast 0.4 of source, brighter, like low contrast, bright 0.5", "100,000", "2.12", "sure"):
        assert words in second
    assert "64 inputs more are needed." in text
    assert "domain" not in rendered(report_table(report(site())), 120).partition("stream")[2]


def test_notes_count_the_images():
    notes = demo_notes(result(row(size=1, images=500), row(size=16, images=3000), row(size=64, images=3000)))
    assert "500 images a stream at batch size 1; 3,000 images a stream at batch size 16 and 64" in notes
    assert "Seed 7, 12 s" in notes
