"""IABN and UnMixTNS on small numbers, against plain arithmetic from their formulas."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import normadapt as na
from normadapt.baselines import IABN, UnMixTNS

EPS = 1e-5
M_S, V_S = [1.0, -2.0], [4.0, 0.25]


def norm(kind=nn.BatchNorm1d):
    layer = kind(2, eps=EPS).double().eval().requires_grad_(False)
    layer.running_mean.copy_(torch.tensor(M_S))
    layer.running_var.copy_(torch.tensor(V_S))
    return layer


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def shrunk(z, t):
    return math.copysign(max(abs(z) - t, 0.0), z)


X = [  # (n, C, L = 4): one instance near the source, one far in mean and variance, one nearly constant
    [[1.0, 3.0, -1.0, 2.0], [-2.0, -2.5, -1.5, -2.2]],
    [[20.0, 40.0, 30.0, 14.0], [-9.0, -8.0, -7.0, -9.5]],
    [[1.0, 1.0, 1.0, 1.01], [5.0, 5.0, 5.0, 5.01]],
]


@pytest.mark.parametrize("k", [0.0, 0.25, 3.0, 4.0])
def test_iabn(k):
    adapted = na.adapt(norm(), policy=IABN(k))
    output = adapted(tensor(X)).tolist()
    moved = 0
    for instance, answers in zip(X, output, strict=True):
        for c in (0, 1):
            x = instance[c]
            mean = sum(x) / 4
            unbiased = sum((v - mean) ** 2 for v in x) / 3
            width = V_S[c] + EPS
            mu = M_S[c] + shrunk(mean - M_S[c], k * math.sqrt(width / 4))
            variance = max(V_S[c] + shrunk(unbiased - V_S[c], k * width * math.sqrt(2 / 3)), 0.0)
            moved += mu != M_S[c] or variance != V_S[c]
            assert answers[c] == pytest.approx([(v - mu) / math.sqrt(variance + EPS) for v in x], rel=1e-9, abs=1e-9)
    assert 0 < moved <= 6
    assert adapted.state_dict()["running_mean"].tolist() == M_S  # a paused model uses the source
    with adapted.paused():
        assert torch.equal(adapted(tensor(X)), norm()(tensor(X)))


def test_iabn_on_single_positions_is_the_source():
    x = tensor([[50.0, -3.0], [4.0, 80.0]])
    assert torch.equal(na.adapt(norm(), policy=IABN())(x), norm()(x))
    assert torch.equal(na.adapt(norm(), policy=IABN())(x.unsqueeze(2)), norm()(x.unsqueeze(2)))


class Reference:
    """UnMix-TNS with explicit loops over instances and components, from the components of the adapted model."""

    def __init__(self, adapted, momentum=0.1, temperature=0.07):
        state = adapted._streams["default"].records[0].state
        self.means, self.variances = state.means.numpy().copy(), state.variances.numpy().copy()
        self.momentum, self.temperature = momentum, temperature

    def __call__(self, x):
        """Answers (n, C, L) to x, and the components are moved."""
        count, components = len(x), len(self.means)
        means, variances = x.mean(2), ((x - x.mean(2, keepdims=True)) ** 2).mean(2)
        answers = np.empty_like(x)
        pulls = np.zeros_like(self.means), np.zeros_like(self.variances)
        for i in range(count):
            cosines = [
                float(means[i] @ mu / (math.sqrt(means[i] @ means[i]) * math.sqrt(mu @ mu))) for mu in self.means
            ]
            powers = [math.exp((c - max(cosines)) / self.temperature) for c in cosines]
            p = [v / sum(powers) for v in powers]
            m = np.stack([(1 - p[k]) * self.means[k] + p[k] * means[i] for k in range(components)])
            w = np.stack([(1 - p[k]) * self.variances[k] + p[k] * variances[i] for k in range(components)])
            mu = m.mean(0)
            variance = w.mean(0) + (m**2).mean(0) - mu**2
            answers[i] = (x[i] - mu[:, None]) / np.sqrt(variance + EPS)[:, None]
            for k in range(components):
                pulls[0][k] += p[k] * (means[i] - self.means[k]) / count
                pulls[1][k] += p[k] * (variances[i] - self.variances[k]) / count
        rate = 1 - (1 - self.momentum) ** (count / 64)
        self.means, self.variances = self.means + rate * pulls[0], self.variances + rate * pulls[1]
        return answers


@pytest.mark.parametrize("policy", [UnMixTNS(), UnMixTNS(components=2, temperature=0.5, momentum=0.6, seed=7)])
def test_unmix_tns(policy):
    adapted = na.adapt(norm(), policy=policy)
    reference = Reference(adapted, policy.momentum, policy.temperature)
    assert reference.means.shape == (policy.components, 2)
    np.testing.assert_allclose(reference.variances, np.tile(np.array(V_S) / 2, (policy.components, 1)))
    for batch in (X, X[1:2], X[:2]):
        x = np.array(batch)
        np.testing.assert_allclose(adapted(tensor(batch)).numpy(), reference(x), rtol=1e-8, atol=1e-10)
    mean, square = reference.means.mean(0), (reference.variances + reference.means**2).mean(0)
    np.testing.assert_allclose(adapted.state_dict()["running_mean"].numpy(), mean, rtol=1e-9)
    np.testing.assert_allclose(adapted.state_dict()["running_var"].numpy(), square - mean**2, rtol=1e-9)


def test_the_components_of_unmix_tns_scatter_about_the_source():
    layer = nn.BatchNorm1d(20_000).double().eval()
    layer.running_mean.fill_(3.0)
    layer.running_var.fill_(4.0)
    state = na.adapt(layer, policy=UnMixTNS(components=4))._streams["default"].records[0].state
    # (mu_k - m_s) / sqrt(v_s) has variance K/(2 (K - 1)) = 2/3; so on average the mixture has the source's variance.
    z = (state.means - 3) / 2
    assert float(z.mean()) == pytest.approx(0, abs=0.02)
    assert float(z.square().mean()) == pytest.approx(2 / 3, rel=0.02)
    mixture = state.variances.mean(0) + state.means.var(0, correction=0)
    assert float(mixture.mean()) == pytest.approx(4.0, rel=0.02)


def test_the_draws_of_unmix_tns_follow_the_seed_and_differ_between_layers():
    def draws(seed):
        adapted = na.adapt(nn.Sequential(norm(), norm()), policy=UnMixTNS(seed=seed))
        return [record.state.means for record in adapted._streams["default"].records]

    torch.manual_seed(1)
    one = draws(0)
    torch.manual_seed(2)
    again, other = draws(0), draws(1)
    assert torch.equal(one[0], again[0])
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0], one[1])


def test_unmix_tns_is_exact_far_from_zero():
    """Means of a million against a variance of one: no cancellation."""
    layer = norm()
    layer.running_mean.add_(1e6)
    near, far = na.adapt(norm(), policy=UnMixTNS(temperature=1e9)), na.adapt(layer, policy=UnMixTNS(temperature=1e9))
    x = tensor(X)
    torch.testing.assert_close(far(x + 1e6), near(x), rtol=1e-5, atol=1e-5)
