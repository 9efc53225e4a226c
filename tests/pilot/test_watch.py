"""All guards together, on simulated pairs of models: nothing where nothing is wrong, and every fault by a guard."""

import importlib.util
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import normadapt as na
from normadapt.errors import PlanError
from normadapt.pilot.guards import (
    ClassConcentration,
    ConfidenceCollapse,
    Disagreement,
    LabelledError,
    Latency,
    NonFinite,
    Score,
    VarianceRatio,
)
from normadapt.pilot.signals import labelled_signals
from normadapt.pilot.watch import Trip, Watch

ALPHA = 1e-3
COMPARING = [Disagreement(), ClassConcentration(), ConfidenceCollapse()]
EVERY = [*COMPARING, LabelledError(), NonFinite(), VarianceRatio(), Latency(seconds=1.0, requests=4)]


class Models:
    """A source and an adapted model that mostly say the same about the same input, as logits (n, K)."""

    def __init__(self, seed=0, classes=10, signal=6.0):
        self.generator = torch.Generator().manual_seed(seed)
        self.classes, self.signal = classes, signal

    def noise(self, n, scale):
        return scale * torch.randn(n, self.classes, generator=self.generator)

    def pair(self, n, run=1, signal=None):
        """Outputs for n items whose class changes every `run` items."""
        labels = torch.randint(self.classes, (n // run + 1,), generator=self.generator).repeat_interleave(run)[:n]
        shared = (signal or self.signal) * nn.functional.one_hot(labels, self.classes) + self.noise(n, 1.5)
        return shared + self.noise(n, 0.5), shared + self.noise(n, 0.5)


def trained(models, guards=COMPARING, items=3000, run=1, **options):
    watch = Watch(guards, ALPHA, **options)
    for _ in range(items // 50):
        rows = watch.measure(*models.pair(50, run))
        assert watch.update(rows) is None
        watch.learn(rows)
    watch.freeze_baselines()
    return watch


def items_until_trip(watch, outputs, size=4, most=1500):
    """Items until a guard trips, and which; (None, None) if none does."""
    for seen in range(size, most + 1, size):
        trip = watch.update(watch.measure(*outputs(size)))
        if trip is not None:
            return seen, trip.guard
    return None, None


def only(kind, models, **options):
    return trained(models, [kind], **options)


@pytest.mark.parametrize(("classes", "run"), [(10, 1), (10, 50), (2, 1), (2, 50)])
def test_nothing_trips_where_nothing_is_wrong(classes, run):
    models = Models(classes=classes)
    watch = trained(models, run=run)
    assert watch.blind == ()
    assert items_until_trip(watch, lambda n: models.pair(n, run), size=50, most=3000) == (None, None)
    assert watch.level < 1


def test_runs_of_one_class_that_the_shadow_phase_never_saw_are_no_harm():
    models = Models()
    watch = trained(models, run=1)
    assert items_until_trip(watch, lambda n: models.pair(n, run=100), size=100, most=3000) == (None, None)


def test_inputs_that_are_harder_for_both_models_are_no_collapse_of_confidence():
    models = Models()
    watch = only(ConfidenceCollapse(), models)
    hard_for_both = models.pair(1000, signal=3.0)
    assert hard_for_both[1].softmax(1).amax(1).median() < 0.8 * models.pair(1000)[1].softmax(1).amax(1).median()
    twin = watch.measure(hard_for_both[0], hard_for_both[0])
    assert watch.update(twin) is None


def collapsed(models, signal):
    def outputs(n):
        source, _ = models.pair(n)
        adapted = models.noise(n, 0.5)
        adapted[:, 3] += signal
        return source, adapted

    return outputs


@pytest.mark.parametrize("signal", [2.0, 6.0, 15.0], ids=["less sure", "as sure", "surer"])
def test_a_collapse_to_one_class_is_found_within_a_few_items(signal):
    models = Models()
    watch = trained(models)
    seen, _ = items_until_trip(watch, collapsed(models, signal))
    assert seen <= 24


@pytest.mark.parametrize("signal", [6.0, 15.0])
def test_the_concentration_guard_alone_finds_a_collapse(signal):
    models = Models()
    seen, _ = items_until_trip(only(ClassConcentration(), models), collapsed(models, signal))
    assert seen <= 100


@pytest.mark.parametrize("run", [1, 50])
def test_the_concentration_guard_finds_a_collapse_under_runs_of_one_class(run):
    models = Models()
    watch = only(ClassConcentration(), models, run=run)

    def outputs(n):
        source, _ = models.pair(n, run)
        return source, collapsed(models, 6.0)(n)[1]

    assert items_until_trip(watch, outputs, size=50)[0] <= 500


@pytest.mark.parametrize("factor", [0.1, 10.0], ids=["down", "up"])
def test_a_collapse_of_confidence_is_found_in_both_directions(factor):
    models = Models()
    watch = only(ConfidenceCollapse(), models)

    def outputs(n):
        source, adapted = models.pair(n)
        return source, adapted * factor

    assert items_until_trip(watch, outputs)[0] <= 40


def test_a_slow_drift_of_disagreement_is_found():
    models = Models()
    watch = trained(models)
    shares = iter(i / 400 for i in range(400))

    def outputs(n):
        source, adapted = models.pair(n)
        changed = torch.rand(n, generator=models.generator) < next(shares)
        adapted[changed] = adapted[changed].roll(1, 1)
        return source, adapted

    seen, guard = items_until_trip(watch, outputs)
    assert guard == "disagreement"
    assert 20 < seen < 700


def test_a_trip_lasts_until_a_restart_and_a_healthy_model_goes_on():
    models = Models()
    watch = trained(models)
    items_until_trip(watch, collapsed(models, 6.0))
    trip = watch.update(watch.measure(*models.pair(4)))
    assert trip is not None
    assert trip.log_value >= trip.threshold == pytest.approx(math.log(3 / ALPHA))
    assert "normal is at most" in trip.reason
    json.dumps(trip.to_dict(), allow_nan=False)
    watch.restart()
    assert watch.level <= 0
    assert items_until_trip(watch, models.pair, size=50, most=2000) == (None, None)
    assert items_until_trip(watch, collapsed(models, 6.0))[0] <= 40


def test_hard_guards_trip_at_once_and_before_the_baselines_are_known():
    models = Models()
    watch = Watch(EVERY, ALPHA)
    source, adapted = models.pair(3)
    adapted[1] = math.nan
    trip = watch.update(watch.measure(source, adapted))
    assert trip == Trip("non_finite", None, None, 3, "1 of 3 outputs are not finite")
    assert watch.update({"variance_ratio": [0.9, 1.1]}) is None
    for bad in ([1e-4, 1.0], [1.0, 1e4], [math.nan, math.nan]):
        assert watch.update({"variance_ratio": bad}).guard == "variance_ratio"
    assert watch.update(watch.measure(*models.pair(3))) is None
    assert watch.update({"disagreement": [1.0] * 1000}) is None  # nothing is known of what is normal


def test_nan_outputs_count_as_bad_where_no_hard_guard_looks():
    models = Models()
    watch = trained(models)

    def outputs(n):
        source, adapted = models.pair(n)
        return source, adapted * math.nan

    assert items_until_trip(watch, outputs)[0] <= 12


def test_one_slow_request_is_a_pause_and_most_of_them_are_trouble():
    watch = Watch([Latency(seconds=1.0, requests=4)], ALPHA)
    assert [watch.update({"latency": [s]}) for s in (9.0, 0.1, 0.1, 9.0)] == [None] * 4
    assert watch.update({"latency": [9.0]}) is None
    assert "3 of the last 4" in watch.update({"latency": [9.0]}).reason
    watch.restart()
    assert watch.update({"latency": [9.0]}) is None


def test_labels_need_no_shadow_phase():
    watch = Watch([LabelledError()], ALPHA)
    watch.freeze_baselines()
    assert watch.blind == ()
    for _ in range(300):
        assert watch.update(labelled_signals(watch.guards, [True, False], [True, False])) is None
    trip = None
    for _ in range(60):
        trip = trip or watch.update(labelled_signals(watch.guards, [True], [False]))
    assert trip.guard == "labelled_error"


def test_a_guard_that_has_learned_nothing_is_named_and_never_trips():
    watch = Watch([*COMPARING, Score(function=lambda o, i: o[:, 0])], ALPHA)
    watch.freeze_baselines()
    assert set(watch.blind) == {"disagreement", "class_concentration", "confidence_collapse", "score"}
    models = Models()
    assert items_until_trip(watch, collapsed(models, 6.0), size=50) == (None, None)
    assert all(told["blind"] for told in watch.status().values())
    json.dumps(watch.status(), allow_nan=False)


def test_outputs_without_probabilities_leave_the_hard_guards():
    watch = Watch(EVERY, ALPHA)
    for _ in range(100):
        rows = watch.measure({"boxes": torch.ones(2, 4)}, {"boxes": torch.ones(2, 4)})
        assert watch.update(rows) is None
        watch.learn(rows)
    watch.freeze_baselines()
    assert set(watch.blind) == {"disagreement", "class_concentration", "confidence_collapse"}
    assert watch.update(watch.measure(None, {"boxes": torch.full((2, 4), math.nan)})).guard == "non_finite"


def test_empty_batches_and_unpaired_items_change_nothing():
    models = Models()
    watch = trained(models)
    before = watch.to_dict()
    assert watch.update(watch.measure(torch.empty(0, 10), torch.empty(0, 10))) is None
    assert watch.update(watch.measure(None, models.pair(5)[1])) is None
    assert watch.update({}) is None
    assert watch.to_dict() == before


def test_a_score_that_needs_no_source_works_on_unpaired_items():
    watch = Watch([Score(function=lambda outputs, inputs: (inputs > 2).float(), paired=False)], ALPHA)
    for _ in range(20):
        watch.learn(watch.measure(None, torch.zeros(50, 2), torch.zeros(50)))
    watch.freeze_baselines()
    assert watch.update(watch.measure(None, torch.zeros(20, 2), torch.full((20,), 3.0))).guard == "score"


def test_statistics_are_looked_at_now_and_then():
    adapted = na.adapt(nn.Sequential(nn.BatchNorm1d(2)).eval())
    watch = Watch([VarianceRatio(every=16)], ALPHA)
    output = torch.zeros(6, 2)
    looks = [bool(watch.measure(None, output, adapted=adapted, items=6)["variance_ratio"]) for _ in range(7)]
    assert looks == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("cusum", [False, True])
@pytest.mark.parametrize("after", [10, 70])
def test_splitting_and_resuming_change_nothing_to_the_bit(after, cusum):
    guards = EVERY
    models = Models()
    stream = []
    for i in range(120):
        source, adapted = models.pair(7)
        adapted[torch.rand(7, generator=models.generator) < 0.05 * (i % 9 == 0)] *= -1
        stream.append((source, adapted))
    whole, resumed = Watch(guards, ALPHA, cusum=cusum), Watch(guards, ALPHA, cusum=cusum)
    for i, (source, adapted) in enumerate(stream):
        if i == after:
            resumed = Watch.from_dict(json.loads(json.dumps(resumed.to_dict(), allow_nan=False)))
        if i == 60:
            whole.freeze_baselines()
            resumed.freeze_baselines()
        for watch, size in ((whole, 7), (resumed, 3)):
            for part in zip(source.split(size), adapted.split(size), strict=True):
                rows = watch.measure(*part, items=size)
                rows.update(labelled_signals(guards, [True] * len(part[0]), [True] * len(part[0])))
                watch.update(rows)
                if not watch.frozen:
                    watch.learn(rows)
    left, right = whole.to_dict(), resumed.to_dict()
    assert left["states"] == right["states"]


def test_a_guard_resumes_in_the_middle_of_a_block_and_of_a_turn_to_the_bit():
    draw = np.random.default_rng(5)
    bursts = [float(draw.random() < rate) for _ in range(60) for rate in [draw.choice([0.5, 0.0, 0.0, 0.0])] * 50]
    for after in (20, 70, 130):
        whole, halted = Watch([Disagreement()], ALPHA), Watch([Disagreement()], ALPHA)
        for watch in (whole, halted):
            watch.learn({"disagreement": bursts})
            watch.freeze_baselines()
            watch.update({"disagreement": bursts[:after]})
        assert whole.states["disagreement"].hypothesis.block is not None
        resumed = Watch.from_dict(json.loads(json.dumps(halted.to_dict())))
        for watch in (whole, resumed):
            watch.update({"disagreement": bursts[after : after + 300]})
        assert whole.to_dict() == resumed.to_dict()


def test_a_restart_forgets_the_classes_of_recent_items():
    watch = Watch([ClassConcentration()], ALPHA)
    judge = watch.states["class_concentration"].judge
    rows = {"class_concentration": [3.0] * 40, "class_concentration/source": [float(i % 10) for i in range(40)]}
    assert judge.judge(rows)[-1] > 0.6
    watch.restart()
    assert judge.judge({"class_concentration": [3.0], "class_concentration/source": [9.0]}) == [0.5]


def test_a_trip_tells_differences_on_their_own_scale_and_how_it_is_lately():
    watch = Watch([LabelledError()], ALPHA)
    watch.freeze_baselines()
    trip = watch.update(labelled_signals(watch.guards, [False] * 2000, [False] * 2000))
    while trip is None:
        trip = watch.update(labelled_signals(watch.guards, [True, False], [False, False]))
    words = "error rate beyond the source's: +0.500 over the last 50 items"
    assert words in trip.reason
    assert "normal is at most +0.020 by the plan" in trip.reason
    told = watch.status()["labelled_error"]
    assert told["recent"] == 0.75
    assert (told["scale"], told["measures"]) == (0.5, "error rate beyond the source's")


def test_the_count_of_streams_is_bounded_and_each_is_looked_at_by_itself():
    adapted = na.adapt(nn.Sequential(nn.BatchNorm1d(2)).eval())
    watch = Watch([VarianceRatio(every=16)], ALPHA)

    def looks(stream):
        return bool(watch.measure(None, torch.zeros(8, 2), adapted=adapted, items=8, stream=stream)["variance_ratio"])

    assert [(looks("a"), looks("b")) for _ in range(5)] == [
        (True, True),
        (False, False),
        (True, True),
        (False, False),
        (True, True),
    ]
    resumed = Watch.from_dict(json.loads(json.dumps(watch.to_dict())))
    assert resumed.to_dict() == watch.to_dict()
    for i in range(1500):
        assert looks(f"stream {i}")
    assert len(watch.to_dict()["unlooked"]) == 1000


def test_a_state_of_other_guards_is_refused():
    state = Watch(COMPARING, ALPHA).to_dict()
    with pytest.raises(ValueError, match="other guards"):
        Watch.from_dict(state, [Disagreement(margin=0.2)])
    with pytest.raises(ValueError, match="not the state"):
        Watch.from_dict({"alpha": ALPHA})
    unnamed = [Score(function=lambda o, i: o[:, 0])]
    state = json.loads(json.dumps(Watch(unnamed, ALPHA).to_dict()))
    with pytest.raises(ValueError, match="function"):
        Watch.from_dict(state)
    assert Watch.from_dict(state, unnamed).guards == tuple(unnamed)


def test_a_watch_is_checked_when_it_is_made():
    with pytest.raises(PlanError, match="no guard"):
        Watch([], ALPHA)
    with pytest.raises(PlanError, match="two guards are named 'disagreement'"):
        Watch([Disagreement(), Disagreement(margin=0.2)], ALPHA)
    for alpha in (0.0, 1.0, math.nan):
        with pytest.raises(PlanError, match="alpha"):
            Watch(COMPARING, alpha)
    watch = Watch(COMPARING, ALPHA)
    watch.freeze_baselines()
    watch.freeze_baselines()
    with pytest.raises(ValueError, match="frozen"):
        watch.learn({})


def test_changing_over_to_the_cusum_keeps_the_baselines():
    models = Models()
    watch = trained(models)
    before = {name: state.hypothesis for name, state in watch.states.items()}
    watch.restart(cusum=True)
    for _ in range(100):
        assert watch.update(watch.measure(*models.pair(50))) is None
    assert {name: state.hypothesis for name, state in watch.states.items()} == before
    assert items_until_trip(watch, collapsed(models, 6.0))[0] <= 24


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[2] / "benchmarks" / "guards.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_guards", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_vectorised_arithmetic_of_the_benchmark_is_the_codes(benchmark):
    assert benchmark.agreement(np.random.default_rng(0)) < 1e-9


def test_no_false_roll_back_in_a_small_run_of_the_benchmark(benchmark):
    generator = np.random.default_rng(3)
    for rho in (0.0, 0.05, 0.1):
        known = benchmark.hypotheses(benchmark.bursts(generator, 100, 3000, 0.05, rho), 0.05, 4)
        values = benchmark.guard_values(benchmark.bursts(generator, 100, 3000, 0.05, rho), known)
        assert float((values >= math.log(4 / ALPHA)).any(1).mean()) == 0


def test_harm_is_found_in_a_small_run_of_the_benchmark(benchmark):
    for row in benchmark.detection(np.random.default_rng(0), 60)[:3]:
        assert row.verdict in ("reached", "MISSED")
        assert row.value <= 1.15 * row.target, row  # few runs: the benchmark itself has no such tolerance


@pytest.mark.parametrize("size", [1, 16])
def test_guards_cost_little_beside_a_forward_pass(size):
    models = Models()
    watch = trained(models, EVERY)
    pairs = [models.pair(size) for _ in range(100)]
    best = math.inf
    for _ in range(5):
        start = time.thread_time()
        for source, adapted in pairs:
            watch.update(watch.measure(source, adapted, seconds=0.01, items=size))
        best = min(best, (time.thread_time() - start) / (100 * size))
    assert best <= 8 * 50e-6  # benchmarks/guards.py has the target itself; this finds a slip on any machine
