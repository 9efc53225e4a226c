"""BBN and BDN on small numbers, against plain arithmetic from their formulas."""

import numpy as np
import pytest
import torch
from torch import nn

import normadapt as na
from normadapt.baselines import BBN, BDN

EPS = 1e-5
M_S, V_S = np.array([1.0, -2.0]), np.array([4.0, 0.25])


class Classifier(nn.Module):
    """One layer of two channels, on series; the class (of three) is by the sign of what comes out of it."""

    def __init__(self, layers=1):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(2, eps=EPS) for _ in range(layers))
        for norm in self.norms:
            norm.running_mean = torch.tensor(M_S)
            norm.running_var = torch.tensor(V_S)
        self.double().eval().requires_grad_(False)

    def forward(self, x):
        for norm in self.norms:
            x = norm(x)
        z = x.mean(2)
        return torch.stack((z[:, 0], -z[:, 0], 10 * z[:, 1] - 20), 1)


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def batch(seed, shift=(0.0, 0.0), n=6):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 2, 4)) * np.sqrt(V_S)[:, None] * 1.5 + (M_S + shift)[:, None]


class Reference:
    """BBN with explicit loops over instances and classes, for one layer."""

    def __init__(self, eta):
        self.eta = eta
        self.means, self.variances = np.tile(M_S, (3, 1)), np.tile(V_S, (3, 1))

    def whole(self):
        between = ((self.means - self.means.mean(0)) ** 2).sum(0) / (3 - 1)
        return self.means.mean(0), self.variances.mean(0) + between

    def scores(self, x):
        mean, variance = self.whole()
        z = ((x - mean[:, None]) / np.sqrt(variance + EPS)[:, None]).mean(2)
        return np.stack((z[:, 0], -z[:, 0], 10 * z[:, 1] - 20), 1)

    def update(self, x, labels):
        for k in range(3):
            mine = [instance for instance, label in zip(x, labels, strict=True) if label == k]
            d = self.eta * sum((i.mean(1) - self.means[k] for i in mine), np.zeros(2))
            square = sum((((i - self.means[k][:, None]) ** 2).mean(1) - self.variances[k] for i in mine), np.zeros(2))
            self.variances[k] = np.maximum(self.variances[k] + self.eta * square - d * d, 0)
            self.means[k] = self.means[k] + d


@pytest.mark.parametrize("eta", [0.01, 0.2])
def test_bbn(eta):
    adapted, reference = na.adapt(Classifier(), policy=BBN(eta)), Reference(eta)
    seen = set()
    for seed in range(4):
        x = batch(seed, (1.0, 0.5))
        labels = reference.scores(x).argmax(1)  # of the first pass
        seen |= set(labels.tolist())
        reference.update(x, labels)
        np.testing.assert_allclose(adapted(tensor(x)).numpy(), reference.scores(x), rtol=1e-9)
    assert seen == {0, 1, 2}
    mean, variance = reference.whole()
    np.testing.assert_allclose(adapted.state_dict()["norms.0.running_mean"], mean, rtol=1e-9)
    np.testing.assert_allclose(adapted.state_dict()["norms.0.running_var"], variance, rtol=1e-9)


@pytest.mark.parametrize(("classes", "eta"), [(2, 0.01), (10, 0.01), (100, 0.05), (1000, 0.5)])
def test_bbn_takes_its_weight_from_the_number_of_classes(classes, eta):
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, classes)).double().eval()
    adapted = na.adapt(model, policy=BBN())
    adapted(tensor([[3.0]]))
    assert adapted.state_dict()["0.running_mean"].tolist() == pytest.approx([3 * eta / classes])


def test_a_frequent_class_weighs_no_more_than_a_rare_one():
    """Where one class has converged, any number of its instances changes nothing."""
    adapted = na.adapt(Classifier(), policy=BBN(0.1))
    high, low = batch(0, (40.0, 0.0)), batch(1, (-40.0, 0.0))
    for _ in range(30):
        adapted(tensor(np.concatenate((high, low))))
    before = adapted.state_dict()["norms.0.running_mean"].clone()
    for _ in range(30):
        adapted(tensor(high))
    torch.testing.assert_close(adapted.state_dict()["norms.0.running_mean"], before, rtol=0, atol=0.01)


def test_a_variance_stays_above_zero():
    adapted = na.adapt(Classifier(), policy=BBN(1.0))
    for seed in range(5):
        assert bool(adapted(tensor(batch(seed, n=20))).isfinite().all())
        assert bool((adapted.state_dict()["norms.0.running_var"] >= 0).all())


def test_an_instance_that_turns_up_empty_on_the_way_has_no_class():
    """It is measured at the first layer, and lost before the second: the others keep their own classes."""

    class Breaks(nn.Module):
        def forward(self, x):
            return torch.where(x.abs() > 1000, float("nan"), x)

    model = nn.Sequential(nn.BatchNorm1d(1), Breaks(), nn.BatchNorm1d(1), nn.Linear(1, 2, bias=False)).double().eval()
    model[-1].weight.data = tensor([[1.0], [-1.0]])
    adapted = na.adapt(model, policy=BBN(0.5))
    adapted(tensor([[5.0], [1e6], [-3.0]]))
    state = adapted._streams["default"].records[1].state
    np.testing.assert_allclose(state.means[0] > 0, [True])
    np.testing.assert_allclose(state.means[1] < 0, [True])


def wasserstein(mean, variance, whole):
    return ((mean - whole[0]) ** 2 + (np.sqrt(variance) - np.sqrt(whole[1])) ** 2).sum()


def test_bdn():
    """One layer, which is also the one that tells domains apart; two domains that come mixed."""
    eta = 0.2
    adapted, common, domains = na.adapt(Classifier(), policy=BDN(eta)), Reference(eta), [Reference(eta), Reference(eta)]
    spread = set()
    for seed in range(5):
        x = np.concatenate((batch(seed), batch(seed + 10, (60.0, 8.0), 4)))[np.random.default_rng(seed).permutation(10)]
        labels = common.scores(x).argmax(1)
        common.update(x, labels)  # the second pass
        means, variances = x.mean(2), x.var(2)
        found = [
            int(np.argmin([wasserstein(m, v, domain.whole()) for domain in domains]))
            for m, v in zip(means, variances, strict=True)
        ]
        if max(found) == len(domains) - 1:
            domains.append(Reference(eta))
        expected = np.empty((10, 3))
        for d in set(found):
            mine = [i for i in range(10) if found[i] == d]
            domains[d].update(x[mine], labels[mine])
            expected[mine] = domains[d].scores(x[mine])
        spread.add(len(set(found)))
        np.testing.assert_allclose(adapted(tensor(x)).numpy(), expected, rtol=1e-7, atol=1e-7)
    assert max(spread) > 1
    state = adapted._streams["default"].records[0].state
    assert len(state.domains.means) == len(domains)
    assert np.array_equal(state.domains.means[-1], np.tile(M_S, (3, 1)))  # one keeps the source's values
    assert np.array_equal(state.domains.variances[-1], np.tile(V_S, (3, 1)))
    assert [site.count for site in adapted.report().sites] == [50]


def test_bdn_keeps_so_many_domains_and_no_more():
    adapted = na.adapt(Classifier(), policy=BDN(0.5, most=2))
    for turn, shift in enumerate((0.0, 500.0, -500.0, 4000.0, -4000.0) * 2):
        adapted(tensor(batch(turn, (shift, 0.0))))
    assert len(adapted._streams["default"].records[0].state.domains.means) == 3  # and the source's


@pytest.mark.parametrize(("layers", "place"), [(1, 0), (3, 1), (5, 1), (6, 2)])
def test_the_layer_that_tells_domains_apart_lies_a_third_of_the_way_down(layers, place):
    notes = []

    class Spy(BDN):
        def step(self, state, evidence, source):
            state, statistics = super().step(state, evidence, source)
            if evidence.pass_index == 1:
                notes.append(statistics.carry.domains is not None)
            return state, statistics

    na.adapt(Classifier(layers), policy=Spy())(tensor(batch(0)))
    assert notes == [index >= place for index in range(layers)]
