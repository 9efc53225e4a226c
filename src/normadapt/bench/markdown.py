"""The results as Markdown, for docs/BENCHMARKS.md."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from normadapt.bench.about import About
from normadapt.bench.bootstrap import Interval
from normadapt.bench.results import ALL, Results
from normadapt.bench.streams import PER_SHIFT, STREAMS, scale_at
from normadapt.bench.summary import Summary, summarize
from normadapt.bench.targets import Target, reservation, targets


def markdown(results: Results, about: About) -> str:
    """The whole document: targets, a table per suite, speed, and how all of it was measured."""
    plan = results.plan
    failed = sorted({f"{e.method} ({e.error})" for e in results.entries if e.error is not None})
    parts = [
        "# Benchmarks",
        _head(results, about),
        "## The targets",
        "They were set before the rule was written. Figures are points of accuracy; in brackets where it was closest. "
        + reservation(results),
        _targets(targets(results)),
    ]
    for scope in results.scopes:
        parts += _scope(results, scope)
    if failed:
        parts += ["## Failures", "\n".join(f"- {line}" for line in failed)]
    parts += ["## How it was measured", _method(results)]
    if plan.split == "dev":
        parts.insert(2, "**This is the development split: hyper-parameters were chosen on it. Do not report it.**")
    return "\n\n".join(parts) + "\n"


def _head(results: Results, about: About) -> str:
    plan = results.plan
    versions = ", ".join(f"{name} {version}" for name, version in about.versions.items())
    reused = f" ({about.computed:,} cells computed, the rest reused)" if about.computed < len(results.entries) else ""
    return (
        f"Written by the command below on {about.date}; every figure here comes from it. "
        f"Split `{plan.split}`, seed {plan.seed}, scale {plan.scale:g}. {versions}. {about.machine}; "
        f"{about.seconds / 60:.0f} minutes{reused}.\n\n    {about.command} --markdown docs/BENCHMARKS.md"
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first columns are aligned left, all others right."""
    rules = ["---" if i < left else "---:" for i in range(len(headings))]
    lines = [headings, rules, *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _targets(found: Iterable[Target]) -> str:
    verdicts = {True: "reached", False: "**missed**", None: "not run"}
    rows = [(t.name, t.setting, t.wanted, t.measured, verdicts[t.reached]) for t in found]
    return table(("target", "setting", "wanted", "measured", "verdict"), rows, left=5)


def _scope(results: Results, scope: str) -> list[str]:
    sizes = results.plan.batch_sizes
    found = summarize(results, scope)
    main = [s for s in found if results.methods[s.method].role != "ablation"]
    tasks = [task for task in results.tasks if task.suite == scope]
    parts = [f"## {scope[0].upper() + scope[1:] if scope == ALL else f'`{scope}`'}"]
    if scope == ALL:
        counted = [suite for suite in results.suites if suite not in results.negative]
        parts.append(
            f"The mean of the means of {', '.join(f'`{suite}`' for suite in counted)}; negative controls are not in it."
        )
    else:
        parts.append(_tasks_line(tasks[0].negative, {task.name: task.shifts for task in tasks}))
    parts.append(_lead(results, scope, main))
    parts.append(_averages(results, main))
    parts += ["### By stream", "% right, mean over batch sizes and tasks.", _by_stream(results, main)]
    if any(s.recovery for s in main):
        parts += ["### Batches to recover after a jump", _recovery(main, sizes)]
    parts += [
        "### Cost",
        "Median processor time of a batch, relative to the plain model in eval mode on the same batches.",
        _costs(main, sizes),
    ]
    ablations = [s for s in found if results.methods[s.method].role in ("ablation", "ours")]
    if any(results.methods[s.method].role == "ablation" for s in ablations):
        parts += ["### Ours with a step removed", _averages(results, ablations, paired=True)]
    return parts


def _tasks_line(negative: bool, shifts: Mapping[str, tuple[str, ...]]) -> str:
    first = "A negative control: adapting cannot gain anything here. " if negative else ""
    lines = [f"`{name}`: {', '.join(each)}" for name, each in shifts.items()]
    same = len(set(shifts.values())) == 1
    if same and len(lines) > 1:
        return f"{first}Tasks {', '.join(f'`{n}`' for n in shifts)}; shifts: {', '.join(next(iter(shifts.values())))}."
    return f"{first}{'; '.join(lines)}."


def _lead(results: Results, scope: str, found: Iterable[Summary]) -> str:
    """A sentence with the figures that matter most."""
    places = results.scope(scope)
    ours = results.ours([place for suite in places for place in suite])
    best = results.best(places)
    own = next((s for s in found if s.method == ours), None)
    if own is None or own.accuracy is None or best is None:
        return ""
    by_size = "; ".join(
        f"n = {n}: {name} {100 * value:.1f} (ours {100 * own.by_size[n]:.1f})"
        for n in results.plan.batch_sizes
        if n in own.by_size and (found_at := results.best(places, lambda p, n=n: p.n == n)) is not None  # type: ignore[misc]
        for name, value in [found_at]
    )
    return (
        f"{own.method} averages {100 * own.accuracy:.2f} %, the best single setting of a baseline, {best[0]}, "
        f"{100 * best[1]:.2f} % ({100 * (own.accuracy - best[1]):+.2f} points for ours). "
        f"Best baseline at each batch size: {by_size}."
    )


def _averages(results: Results, found: Sequence[Summary], *, paired: bool = False) -> str:
    """`paired`: rows without a profile are compared with ours without one."""
    sizes = results.plan.batch_sizes
    headings = ["method", "average", "against ours", *(f"n = {n}" for n in sizes)]
    headings += ["regret", "worst regret", "gain share", "of ceiling", "clean loss"]
    rules = [s for s in found if results.methods[s.method].role != "limit"]
    best = {n: max((s.by_size[n] for s in rules if n in s.by_size), default=None) for n in sizes}
    rows = []
    for s in found:
        if s.accuracy is None:
            rows.append([s.method, f"failed at {s.failed} places", *[""] * (len(headings) - 2)])
            continue
        place = s.worst_place
        where = "" if place is None else f" ({place.task} {place.stream}, {place.n})"
        rows.append(
            [
                _name(results, s.method),
                f"{100 * s.accuracy:.2f}",
                _interval(s.against_plain if paired and not results.methods[s.method].uses_profile else s.against_ours),
                *(_bold(s.by_size.get(n), best[n]) for n in sizes),
                _points(s.regret),
                _points(s.worst) + where,
                _share(s.share),
                _share(s.ceiling_share),
                _points(max(s.clean_loss.values(), default=None)),
            ]
        )
    return table(headings, rows)


def _name(results: Results, method: str) -> str:
    return f"**{method}**" if results.methods[method].role == "ours" else method


def _by_stream(results: Results, found: Sequence[Summary]) -> str:
    streams = [s for s in results.plan.streams if any(s in summary.by_stream for summary in found)]
    rules = [s for s in found if results.methods[s.method].role != "limit"]
    best = {name: max((s.by_stream[name] for s in rules if name in s.by_stream), default=None) for name in streams}
    rows = [
        [
            _name(results, s.method),
            *(_bold(s.by_stream.get(name), best[name] if s in rules else None) for name in streams),
        ]
        for s in found
        if s.accuracy is not None
    ]
    return table(["method", *streams], rows)


def _recovery(found: Sequence[Summary], sizes: Sequence[int]) -> str:
    rows = [[s.method, *(_batches(s.recovery.get(n)) for n in sizes)] for s in found if s.recovery]
    return table(["method", *(f"n = {n}" for n in sizes)], rows)


def _costs(found: Sequence[Summary], sizes: Sequence[int]) -> str:
    rows = [[s.method, *(f"{s.cost[n]:.2f}" if n in s.cost else "-" for n in sizes)] for s in found if s.cost]
    return table(["method", *(f"n = {n}" for n in sizes)], rows)


def _batches(value: float | None) -> str:
    return "-" if value is None else "never" if math.isinf(value) else f"{value:.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}".replace("-0.00", "0.00")


def _bold(value: float | None, best: float | None) -> str:
    if value is None:
        return "-"
    shown = f"{100 * value:.1f}"
    return f"**{shown}**" if best is not None and shown == f"{100 * best:.1f}" else shown


def _interval(found: Interval | None) -> str:
    if found is None:
        return ""
    return f"{100 * found.value:+.2f} [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"


def _method(results: Results) -> str:
    plan = results.plan
    streams = "\n".join(f"- **{name}**: {STREAMS[name]}." for name in plan.streams)
    lengths: dict[int, list[int]] = {}
    for n in plan.batch_sizes:
        lengths.setdefault(round(PER_SHIFT * scale_at(n, plan.scale)), []).append(n)
    length = ", ".join(f"{count} at n = {' and '.join(map(str, sizes))}" for count, sizes in lengths.items())
    return f"""Every method answers the same streams, with a fresh model where a stream says so. Instances of
each shift in each stream: {length}. Instances of a domain come without replacement until all have been seen.

{streams}

- **report and dev**: the two splits draw from different seeds, and `fashion-c` has other corruptions in each: the 15 of
  ImageNet-C in report, its four extra ones in dev. Hyper-parameters of ours were chosen on dev only, the baselines'
  are their papers', and where a baseline has a knob several settings are shown.
- **RBN** is EMA(0.05) under the name of its paper, whose other parts are not about statistics: the same figures.
- **average**: mean over tasks, streams and batch sizes, each cell counted equally; Domains + profile only where
  source data are available. No method sees a label.
- **against ours**: accuracy minus ours (with a profile where it ran so) with a 95 % interval: a bootstrap of blocks of
  50 consecutive instances, or an eighth of a short stream, at least a batch, both methods on the same blocks.
- **regret**: best accuracy of any rule in a cell, ours included, minus its own; the mean over cells and the largest.
- **limit**: each domain's true statistics, measured layer by layer from all its instances. **ceiling**: the statistics
  of all instances of the domain that the stream has shown so far, the present batch included, with the domains' names
  known. It takes nothing from the source: where a domain has shown few instances or few classes, rules can be above it.
- **gain share**: the method's average minus Source's, over the limit's minus Source's; not given where that is below
  two points. **of ceiling**: the same over the ceiling's minus Source's.
- **RDumb** begins anew every 1,000 batches: on shorter streams it is ETA.
- **clean loss**: Source minus the method on clean data, at the batch size where it is largest; below 0 is a gain.
- **batches to recover**: on the continual stream, after a jump to a shift where Source stays below 0.9 of the limit's
  accuracy: batches that pass before the method's accuracy in a window (a batch, or 25 instances) first reaches 0.9 of
  the limit's; all jumps are laid over one another."""
