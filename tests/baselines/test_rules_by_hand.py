"""Each rule that gives one mean and variance, on small numbers, against plain arithmetic from its formula."""

import math
import statistics

import numpy as np
import pytest
import torch
from torch import nn

import normadapt as na
from normadapt.baselines import DUA, EDTN, EMA, RBN, TBR, TEMA, AlphaBN, Hybrid, MedBN
from normadapt.layers.policy import Answer

EPS = 1e-5
M_S, V_S = [1.0, -2.0], [4.0, 0.25]
FIRST = np.array([[1.0, 0.0], [3.0, -1.0], [8.0, 1.0]])  # (n, C): means 4, 0
SECOND = np.array([[2.0, -4.0], [6.0, -2.0]])  # means 4, -3; variances 4, 1
M1, V1 = [4.0, 0.0], [26 / 3, 2 / 3]  # 9 + 1 + 16 and 0 + 1 + 1, over 3
M2, V2 = [4.0, -3.0], [4.0, 1.0]


def norm(mean=M_S, variance=V_S):
    layer = nn.BatchNorm1d(len(mean), eps=EPS).double().eval().requires_grad_(False)
    layer.running_mean.copy_(torch.tensor(mean))
    layer.running_var.copy_(torch.tensor(variance))
    return layer


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def assert_answers(adapted, x, mean, variance):
    """The answer is x normalized by these, and these are what the layer holds."""
    expected = [[(v - m) / math.sqrt(s + EPS) for v, m, s in zip(row, mean, variance, strict=True)] for row in x]
    assert adapted(tensor(x)).tolist() == [pytest.approx(row, rel=1e-9, abs=1e-12) for row in expected]
    state = adapted.state_dict()
    assert state["running_mean"].tolist() == pytest.approx(list(mean), rel=1e-9, abs=1e-12)
    assert state["running_var"].tolist() == pytest.approx(list(variance), rel=1e-9, abs=1e-12)


def mixed(old, new, weight):
    return [(1 - weight) * a + weight * b for a, b in zip(old, new, strict=True)]


def test_alpha_bn():
    adapted = na.adapt(norm(), policy=AlphaBN(0.25))
    assert_answers(adapted, FIRST, mixed(M_S, M1, 0.25), mixed(V_S, V1, 0.25))
    assert_answers(adapted, SECOND, mixed(M_S, M2, 0.25), mixed(V_S, V2, 0.25))  # no memory
    assert AlphaBN().alpha == 0.1


def test_dua():
    adapted = na.adapt(norm(), policy=DUA())
    weight = 0.1 + 0.005
    mean, variance = mixed(M_S, M1, weight), mixed(V_S, V1, weight)
    assert_answers(adapted, FIRST, mean, variance)
    weight = 0.1 * 0.94 + 0.005
    mean, variance = mixed(mean, M2, weight), mixed(variance, V2, weight)
    assert_answers(adapted, SECOND, mean, variance)
    weight = 0.1 * 0.94 * 0.94 + 0.005
    assert_answers(adapted, FIRST, mixed(mean, M1, weight), mixed(variance, V1, weight))


@pytest.mark.parametrize(("policy", "weight"), [(RBN(), 0.05), (RBN(0.2), 0.2), (EMA(), 0.1)])
def test_moving_averages_from_the_source(policy, weight):
    adapted = na.adapt(norm(), policy=policy)
    mean, variance = mixed(M_S, M1, weight), mixed(V_S, V1, weight)
    assert_answers(adapted, FIRST, mean, variance)
    assert_answers(adapted, SECOND, mixed(mean, M2, weight), mixed(variance, V2, weight))


def test_tbr():
    adapted = na.adapt(norm(), policy=TBR(0.75))
    assert_answers(adapted, FIRST, M1, V1)  # the first batch by itself
    assert_answers(adapted, SECOND, M1, V1)  # the average before this batch
    mean = mixed(M1, M2, 0.25)
    deviation = mixed([math.sqrt(v + EPS) for v in V1], [math.sqrt(v + EPS) for v in V2], 0.25)
    assert_answers(adapted, FIRST, mean, [d * d - EPS for d in deviation])
    assert TBR().decay == 0.95


def test_tbr_is_batch_renormalization():
    """As the paper writes it: the batch's own normalization, corrected by r and d."""
    adapted = na.adapt(norm(), policy=TBR(0.75))
    adapted(tensor(FIRST))
    output = adapted(tensor(SECOND)).numpy()
    ours, theirs = np.sqrt(np.array(V2) + EPS), np.sqrt(np.array(V1) + EPS)
    r, d = ours / theirs, (np.array(M2) - np.array(M1)) / theirs
    np.testing.assert_allclose(output, (SECOND - M2) / ours * r + d, rtol=1e-9)


def test_med_bn():
    adapted = na.adapt(norm(), policy=MedBN())
    # medians 3 and 0; squares about them: 4, 0, 25 and 0, 1, 1
    assert_answers(adapted, FIRST, [3.0, 0.0], [29 / 3, 2 / 3])
    # of two the lower: 2 and -4; squares about them 0, 16 and 0, 4
    assert_answers(adapted, SECOND, [2.0, -4.0], [8.0, 2.0])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_med_bn_over_positions(dims):
    layer = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](2).eval()
    x = torch.randn(3, 2, *(3,) * dims, generator=torch.Generator().manual_seed(dims))
    adapted = na.adapt(layer, policy=MedBN())
    adapted(x)
    for channel in (0, 1):
        values = x[:, channel].flatten().tolist()
        median = statistics.median_low(values)
        assert float(adapted.state_dict()["running_mean"][channel]) == median
        square = sum((v - median) ** 2 for v in values) / len(values)
        assert float(adapted.state_dict()["running_var"][channel]) == pytest.approx(square, rel=1e-5)


def test_med_bn_leaves_out_what_is_not_finite():
    adapted = na.adapt(norm(), policy=MedBN())
    adapted(tensor([*FIRST.tolist(), [float("nan"), 5.0]]))
    assert adapted.state_dict()["running_mean"].tolist() == [3.0, 0.0]


def test_hybrid():
    """Three layers: the first takes all channels from the batch, the middle one half of them, the last none."""
    mean, variance = [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]
    model = nn.Sequential(*(norm(mean, variance) for _ in range(3)))
    adapted = na.adapt(model, policy=Hybrid())
    # Channel by channel the batch has means 3, .1, 0, 2 and deviations 1, 1, 5, 2.
    x = np.array([[2.0, -0.9, -5.0, 0.0], [4.0, 1.1, 5.0, 4.0]])
    output = adapted(tensor(x))
    state = adapted.state_dict()
    assert state["0.running_mean"].tolist() == pytest.approx([3.0, 0.1, 0.0, 2.0])
    assert state["0.running_var"].tolist() == pytest.approx([1.0, 1.0, 25.0, 4.0])
    # The middle layer then sees means 0 and deviations 1, but for the eps: nothing to tell its channels apart but that.
    deviation = [math.sqrt(v / (v + EPS)) for v in (1.0, 1.0, 25.0, 4.0)]
    lowest = sorted(range(4), key=lambda c: (1 - deviation[c]) ** 2)[:2]
    assert lowest == [2, 3]
    expected = [deviation[c] ** 2 if c in lowest else 1.0 for c in range(4)]
    assert state["1.running_var"].tolist() == pytest.approx(expected, rel=1e-9)
    assert state["2.running_var"].tolist() == variance
    z = (x - [3.0, 0.1, 0.0, 2.0]) / np.sqrt(np.array([1.0, 1.0, 25.0, 4.0]) + EPS)
    z = z / np.sqrt(np.array(expected) + EPS) / math.sqrt(1 + EPS)
    np.testing.assert_allclose(output.numpy(), z, rtol=1e-6, atol=1e-9)


class Side(nn.Module):
    """Two layers over the same input: what the second sees does not depend on the first."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return torch.cat((self.first(x), self.second(x)), 1)


def test_hybrid_takes_the_channels_that_moved_least():
    three = nn.ModuleList([norm(), norm(), norm()])

    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = three

        def forward(self, x):
            return torch.cat([layer(x) for layer in self.layers], 1)

    adapted = na.adapt(Beside(), policy=Hybrid())
    adapted(tensor(FIRST))
    state = adapted.state_dict()
    # W = (1 - 4)^2 + (2 - sqrt(26/3))^2 = 9.9 and (-2 - 0)^2 + (.5 - sqrt(2/3))^2 = 4.1: the second channel
    assert state["layers.0.running_mean"].tolist() == M1
    assert state["layers.1.running_mean"].tolist() == [M_S[0], M1[1]]
    assert state["layers.1.running_var"].tolist() == pytest.approx([V_S[0], V1[1]])
    assert state["layers.2.running_mean"].tolist() == M_S


def test_hybrid_rounds_the_number_of_channels_down():
    """Half of three channels is one."""
    model = nn.Sequential(*(norm([0.0] * 3, [1.0] * 3) for _ in range(3)))
    adapted = na.adapt(model, policy=Hybrid())
    adapted(tensor([[0.0, 0.0, 0.0], [4.0, 2.0, 9.0]]))
    moved = adapted.state_dict()["1.running_var"] != 1
    assert int(moved.sum()) == 1


def test_edtn():
    """The source weighs .1, .1 sqrt 9.9 and .99 in three layers; deviations are mixed, not variances."""
    three = nn.ModuleList([norm(), norm(), norm()])

    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = three

        def forward(self, x):
            return torch.cat([layer(x) for layer in self.layers], 1)

    adapted = na.adapt(Beside(), policy=EDTN())
    adapted(tensor(FIRST))
    state = adapted.state_dict()
    for layer, weight in enumerate((0.1, 0.1 * math.sqrt(9.9), 0.99)):
        deviation = mixed([math.sqrt(v + EPS) for v in V1], [math.sqrt(v + EPS) for v in V_S], weight)
        assert state[f"layers.{layer}.running_mean"].tolist() == pytest.approx(mixed(M1, M_S, weight), rel=1e-9)
        expected = [d * d - EPS for d in deviation]
        assert state[f"layers.{layer}.running_var"].tolist() == pytest.approx(expected, rel=1e-9)


def test_edtn_with_one_layer_is_its_first():
    adapted = na.adapt(norm(), policy=EDTN())
    adapted(tensor(FIRST))
    assert adapted.state_dict()["running_mean"].tolist() == pytest.approx(mixed(M1, M_S, 0.1))


def test_hybrid_with_one_layer_is_its_first():
    assert_answers(na.adapt(norm(), policy=Hybrid()), FIRST, M1, V1)


def distance(m_t, v_t, m_s, v_s):
    """By plain arithmetic: a quarter of the sum over channels of v_s/v_t + v_t/v_s - 2 + gap^2 (1/v_s + 1/v_t)."""
    total = 0.0
    for mt, vt, ms, vs in zip(m_t, v_t, m_s, v_s, strict=True):
        a, b = vs + EPS, vt + EPS
        total += a / b + b / a - 2 + (ms - mt) ** 2 * (1 / a + 1 / b)
    return total / 4


def tema_mixture(m_s, v_s, m_t, v_t, weight):
    """`weight` is on the source here, as in the paper."""
    mean = [weight * a + (1 - weight) * b for a, b in zip(m_s, m_t, strict=True)]
    variance = [
        weight * a + (1 - weight) * b + weight * (1 - weight) * (c - d) ** 2
        for a, b, c, d in zip(v_s, v_t, m_s, m_t, strict=True)
    ]
    return mean, variance


@pytest.mark.parametrize("momentum", [0.5, None])
def test_tema(momentum):
    """Two layers side by side: the farther one has z = 1 and l = 1/2, the other l = 0, whatever was before."""
    other = [3.0, 1.0], [9.0, 0.5]
    adapted = na.adapt(Side(norm(), norm(*other)), policy=TEMA(momentum))
    sources = {"first": (M_S, V_S), "second": other}
    averages = {name: ([0.0, 0.0], [1.0, 1.0]) for name in sources}
    running = dict.fromkeys(sources, 0.25)
    for x, mean, variance in ((FIRST, M1, V1), (SECOND, M2, V2)):
        m = momentum or 0.01  # fewer than four instances
        output = adapted(tensor(x))
        expected = []
        averages = {k: (mixed(t[0], mean, m), mixed(t[1], variance, m)) for k, t in averages.items()}
        d = {name: distance(*averages[name], *sources[name]) for name in sources}
        weights = {name: 0.5 if name == max(d, key=d.get) else 0.0 for name in sources}
        running = {name: 0.9 * running[name] + 0.1 * weights[name] for name in sources}
        for name in sources:
            used = tema_mixture(*sources[name], *averages[name], weights[name])
            assert adapted.state_dict()[f"{name}.running_mean"].tolist() == pytest.approx(used[0], rel=1e-9)
            assert adapted.state_dict()[f"{name}.running_var"].tolist() == pytest.approx(used[1], rel=1e-9)
            expected.append((x - used[0]) / np.sqrt(np.array(used[1]) + EPS))
        np.testing.assert_allclose(output.numpy(), np.concatenate(expected, 1), rtol=1e-8, atol=1e-12)
        states = [record.state for record in adapted._streams["default"].records]
        assert [s.source_weight for s in states] == pytest.approx(list(running.values()))  # for the next first pass
    assert [site.count for site in adapted.report().sites] == [5, 5]  # in two passes, counted once


def test_the_distances_of_tema_are_summed_over_channels():
    """A wide layer of which each channel has moved less is farther than a narrow one."""

    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.wide = norm([0.0], [1.0]), norm([0.0] * 4, [1.0] * 4)

        def forward(self, x):
            return torch.cat((self.narrow(x[:, :1]), self.wide(x[:, 1:])), 1)

    adapted = na.adapt(Apart(), policy=TEMA(momentum=1.0))
    x = np.array([[-1.0], [1.0]]) * np.array([[2.0, 1.6, 1.6, 1.6, 1.6]])  # variances 4 and 2.56
    adapted(tensor(x))
    state = adapted.state_dict()
    assert state["narrow.running_var"].tolist() == pytest.approx([4.0])  # l = 0: the average alone
    assert state["wide.running_var"].tolist() == pytest.approx([(1 + 2.56) / 2] * 4)


@pytest.mark.parametrize(("n", "momentum"), [(1, 0.01), (2, 0.01), (4, 0.1), (16, 0.1), (63, 0.1), (64, 1.0), (200, 1)])
def test_tema_takes_its_momentum_from_the_batch_size(n, momentum):
    adapted = na.adapt(norm(), policy=TEMA())
    adapted(tensor([[8.0, 8.0]] * n))
    # one layer: z = 0 and the weight on the source stays 1/4; t = momentum 8
    expected = [0.25 * m + 0.75 * momentum * 8 for m in M_S]
    assert adapted.state_dict()["running_mean"].tolist() == pytest.approx(expected)


def test_tema_standardizes_and_clips():
    """d = 0, 0, 0, 4 has mean 1 and deviation sqrt 3: z = -.577 and 1.73, clipped to 1."""
    policy = TEMA()
    layer = norm()
    state = na.adapt(layer, policy=policy)._streams["default"].records[0].state
    states = [state._replace(distance=d) for d in (0.0, 0.0, None, 0.0, 4.0)]
    z = -1 / math.sqrt(3)
    present = [(z + 1) / 4, (z + 1) / 4, 0.25, (z + 1) / 4, 0.5]
    found, memory = policy.answered(states, Answer(None, None, None, 0, ()))
    assert memory is None
    assert [s.source_weight for s in found] == pytest.approx(present)
    later, _ = policy.answered(found, Answer(None, None, None, 1, ()))
    assert [s.source_weight for s in later] == pytest.approx([0.9 * 0.25 + 0.1 * weight for weight in present])
    assert [s.source_weight for s in states] == [0.25] * 5  # nothing was changed in place


def test_tema_measures_in_the_first_pass_only():
    """The second layer's average is of what the first layer lets through under the running average of the weights."""
    adapted = na.adapt(nn.Sequential(norm(), norm()), policy=TEMA(momentum=1.0))
    output = adapted(tensor(FIRST)).numpy()
    mean, variance = tema_mixture(M_S, V_S, M1, V1, 0.25)
    seen = (FIRST - mean) / np.sqrt(np.array(variance) + EPS)
    first, second = (record.state for record in adapted._streams["default"].records)
    np.testing.assert_allclose(second.mean.numpy(), seen.mean(0), rtol=1e-9)
    np.testing.assert_allclose(second.variance.numpy(), seen.var(0), rtol=1e-9)
    assert {round(first.source_weight, 12), round(second.source_weight, 12)} == {0.225, 0.275}
    x = FIRST  # the second pass: the present weights, the averages of the first
    for state in (first, second):
        weight = 0.5 if state.source_weight > 0.25 else 0.0
        used = tema_mixture(M_S, V_S, state.mean.tolist(), state.variance.tolist(), weight)
        x = (x - used[0]) / np.sqrt(np.array(used[1]) + EPS)
    np.testing.assert_allclose(output, x, rtol=1e-9)
    output = adapted(tensor(SECOND)).numpy()  # its first pass begins with the running average
    mean, variance = tema_mixture(M_S, V_S, M2, V2, first.source_weight)
    seen = (SECOND - mean) / np.sqrt(np.array(variance) + EPS)
    np.testing.assert_allclose(adapted._streams["default"].records[1].state.mean.numpy(), seen.mean(0), rtol=1e-9)
