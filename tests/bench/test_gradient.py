"""Tent, ETA and RDumb against a step worked out by plain arithmetic, and what a benchmark may rely on."""

import copy
import math

import pytest
import torch
from torch import nn

import normadapt as na
from models import CASES, everything, same
from normadapt.baselines import BatchStatistics
from normadapt.bench.gradient import ETA, RDumb, Tent, redundancy_threshold
from normadapt.errors import UnsupportedLayerError

RATE = 1e-3


def tiny(gamma=(1.5, -0.5), beta=(0.2, 0.1)):
    """Two channels, one BatchNorm1d: its output is the logits."""
    model = nn.Sequential(nn.BatchNorm1d(2)).double().eval()
    model[0].running_mean.copy_(torch.tensor([7.0, -7.0]))
    model[0].weight.data.copy_(torch.tensor(gamma, dtype=torch.float64))
    model[0].bias.data.copy_(torch.tensor(beta, dtype=torch.float64))
    return model


X = [[1.0, 4.0], [2.0, 0.0], [6.0, 2.0]]
EPS = 1e-5


def by_hand(x, gamma, beta):
    """Logits and, per item, the entropy and its derivatives by gamma and beta: two classes, plain Python."""
    n = len(x)
    means = [sum(row[c] for row in x) / n for c in (0, 1)]
    variances = [sum((row[c] - means[c]) ** 2 for row in x) / n for c in (0, 1)]
    z = [[(row[c] - means[c]) / math.sqrt(variances[c] + EPS) for c in (0, 1)] for row in x]
    logits = [[gamma[c] * row[c] + beta[c] for c in (0, 1)] for row in z]
    entropies, gradients = [], []
    for item, (a, b) in zip(z, logits, strict=True):
        p = math.exp(a) / (math.exp(a) + math.exp(b))
        q = 1 - p
        entropies.append(-p * math.log(p) - q * math.log(q))
        by_a = -p * q * math.log(p / q)  # dH/da = -p (log p + H) = -p q log(p/q); by b the opposite
        gradients.append([by_a * item[0], -by_a * item[1], by_a, -by_a])
    return logits, entropies, gradients


def assert_stepped(method, gamma, beta, gradient):
    """Adam's first step moves every parameter by the rate against the sign: rate g / (|g| + 1e-8)."""
    before = [*gamma, *beta]
    expected = [b - RATE * g / (abs(g) + 1e-8) for b, g in zip(before, gradient, strict=True)]
    norm = method.model[0]
    assert [*norm.weight.tolist(), *norm.bias.tolist()] == pytest.approx(expected, rel=1e-12)


def test_a_step_of_tent_by_hand():
    gamma, beta = (1.5, -0.5), (0.2, 0.1)
    logits, _, gradients = by_hand(X, gamma, beta)
    model = tiny()
    tent = Tent(model)
    output = tent(torch.tensor(X, dtype=torch.float64))
    assert output.tolist() == [pytest.approx(row, rel=1e-12) for row in logits]  # from before the step
    assert not output.requires_grad
    mean = [sum(g[k] for g in gradients) / 3 for k in range(4)]
    assert_stepped(tent, gamma, beta, mean)
    norm = tent.model[0]
    gradient = [*norm.weight.grad.tolist(), *norm.bias.grad.tolist()]
    assert gradient == pytest.approx(mean, rel=1e-9)
    moved = [*norm.weight.tolist()], [*norm.bias.tolist()]
    again, _, _ = by_hand(X, *moved)
    assert tent(torch.tensor(X, dtype=torch.float64)).tolist() == [pytest.approx(row, rel=1e-12) for row in again]


def test_a_step_of_eta_by_hand():
    gamma, beta = (4.0, -0.5), (0.2, 0.1)
    logits, entropies, gradients = by_hand(X, gamma, beta)
    bound = 0.4 * math.log(2)
    sure = [i for i in range(3) if entropies[i] < bound]
    assert len(sure) == 2  # the case tests the filter
    eta = ETA(tiny(gamma, beta))
    eta(torch.tensor(X, dtype=torch.float64))
    weights = [math.exp(bound - h) for h in entropies]
    mean = [sum(weights[i] * gradients[i][k] for i in sure) / 2 for k in range(4)]
    assert_stepped(eta, gamma, beta, mean)
    norm = eta.model[0]
    assert [*norm.weight.grad.tolist(), *norm.bias.grad.tolist()] == pytest.approx(mean, rel=1e-9)
    first = [math.exp(a) / (math.exp(a) + math.exp(b)) for a, b in logits]
    p = sum(first[i] for i in sure) / 2
    assert eta.kept_mean.tolist() == pytest.approx([p, 1 - p], rel=1e-12)


def test_eta_leaves_out_what_is_like_the_kept():
    eta = ETA(nn.Sequential(nn.BatchNorm1d(3)).eval(), redundancy=0.5)
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]], dtype=torch.float64)
    first = eta.loss(logits[:1])  # nothing kept so far: no filter
    p = [math.exp(9) / (math.exp(9) + 2), 1 / (math.exp(9) + 2), 1 / (math.exp(9) + 2)]
    entropy = -sum(v * math.log(v) for v in p)
    assert float(first) == pytest.approx(math.exp(0.4 * math.log(3) - entropy) * entropy, rel=1e-9)
    assert eta.loss(logits[:1]) is None  # the same again
    assert eta.kept_mean.tolist() == pytest.approx(p, rel=1e-9)
    assert float(eta.loss(logits)) == pytest.approx(float(first), rel=1e-9)  # only the second is new
    mean = [0.9 * p[0] + 0.1 * p[1], 0.9 * p[1] + 0.1 * p[0], p[2]]
    assert eta.kept_mean.tolist() == pytest.approx(mean, rel=1e-9)
    assert eta.loss(torch.zeros(4, 3, dtype=torch.float64)) is None  # nobody is sure


def test_redundancy_by_class_count():
    assert redundancy_threshold(10) == pytest.approx(0.4)
    assert redundancy_threshold(1000) == pytest.approx(0.05)
    assert redundancy_threshold(100) == pytest.approx(math.sqrt(0.4 * 0.05))
    assert redundancy_threshold(2) == pytest.approx(0.4)


METHODS = [Tent, ETA]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [n for n in CASES if n not in ("keywords", "tuple", "2d-no-affine", "look-alike")])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_kind_of_site_answers_by_batch_statistics(method, name, mode):
    case = CASES[name]
    model = case.model()
    before = copy.deepcopy(everything(model))
    with mode():
        learner = method(model)
        for n in (8, 1, 3, 0)[: 3 if name == "instance" else 4]:  # torch's InstanceNorm refuses an empty batch
            x = case.target(n, seed=n)
            fresh = method(model)
            if n:
                expected = na.adapt(model, policy=BatchStatistics())(x)
                torch.testing.assert_close(fresh(x), expected, rtol=1e-4, atol=1e-4)
            output = learner(x)
            assert output.shape == (n, 4)
            assert bool(output.isfinite().all())
    assert same(everything(model), before)
    learned = [not torch.equal(p, q) for p, q in zip(learner.model.parameters(), model.parameters(), strict=True)]
    assert any(learned) or method is ETA


def test_only_scales_and_shifts_learn_and_learning_lowers_the_entropy():
    case = CASES["2d"]
    model, x = case.model(), case.target(32)
    tent = Tent(model, learning_rate=0.01)
    twin = copy.deepcopy(tent)
    losses = [float(tent.loss(tent(x))) for _ in range(20)]
    assert losses[-1] < losses[0]
    for (name, ours), theirs in zip(tent.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs) != name.startswith(("1.", "5.")), name
    assert float(twin.loss(twin.train()(x))) == losses[0]  # a copy made before learned nothing; train() changes nothing
    assert [float(twin.loss(twin(x))) for _ in range(19)] == losses[1:]


def test_a_batch_that_is_not_finite_makes_no_step():
    model = tiny()
    tent = Tent(model)
    tent(torch.tensor([[float("nan"), 1.0], [2.0, 3.0]], dtype=torch.float64))
    assert torch.equal(tent.model[0].weight, model[0].weight)
    tent(torch.tensor(X, dtype=torch.float64))
    assert not torch.equal(tent.model[0].weight, model[0].weight)
    assert bool(tent.model[0].weight.isfinite().all())


@pytest.mark.parametrize("method", METHODS)
def test_wrong_arguments(method):
    with pytest.raises(ValueError, match="learning_rate must "):
        method(tiny(), learning_rate=0.0)
    with pytest.raises(UnsupportedLayerError, match="affine=False"):
        method(CASES["2d-no-affine"].model())
    with pytest.raises(UnsupportedLayerError, match="learn"):
        method(CASES["look-alike"].model())  # its scale is a buffer
    with pytest.raises(TypeError, match="logits"):
        method(nn.Sequential(nn.BatchNorm2d(2)))(torch.zeros(2, 2, 3, 3))
    with pytest.raises(ValueError, match="redundancy must "):
        ETA(tiny(), redundancy=0.0)


@pytest.mark.parametrize("name", ["1d-series", "instance"])
def test_the_gradient_goes_through_the_batch_statistics(name):
    """Central differences of the loss by an early scale: later statistics held constant would give another slope."""
    case = CASES[name]
    model, x = case.model().double(), case.target(6).double()
    tent = Tent(model)
    tent(x)
    early = float(tent.model[1].weight.grad[0])

    def loss(move):
        moved = copy.deepcopy(model)
        moved[1].weight.data[0] += move
        logits = na.adapt(moved, policy=BatchStatistics())(x)
        return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean().item()

    step = 1e-5
    assert early == pytest.approx((loss(step) - loss(-step)) / (2 * step), rel=1e-4)


class Tied(nn.Module):
    """Reaches a parameter by a list of its own, where nobody who replaces parameters finds it."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 4)
        self.weights = [self.head.weight]

    def forward(self, x):
        return self.norm(x) @ self.weights[0].T


def test_the_originals_parameters_get_no_gradient():
    model = Tied().eval()
    before = copy.deepcopy(everything(model))
    tent = Tent(model)
    tent(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    assert same(everything(model), before)
    assert not torch.equal(tent.model.norm.weight, model.norm.weight)


def test_rdumb_is_eta_that_begins_anew():
    case = CASES["2d"]
    model = case.model()
    model[-1].weight.data *= 30  # sure enough to learn from
    rdumb = RDumb(model, 0.1, 2.0, every=3)
    for i in range(7):
        if i % 3 == 0:
            eta = ETA(model, 0.1, 2.0)
        batch = case.target(8, seed=i)
        assert torch.equal(rdumb(batch), eta(batch))
    assert any(bool((a != b).any()) for a, b in zip(rdumb._learning, rdumb._begun, strict=True))
    assert RDumb(model).every == 1000
    with pytest.raises(ValueError, match="every must be"):
        RDumb(model, every=0)
