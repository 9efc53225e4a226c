"""Rules that keep statistics of every predicted class, so that frequent classes weigh no more than rare ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from normadapt.layers.moments import Evidence
from normadapt.layers.policy import Answer, Policy, Source, State, Statistics

_ETA, _ETA_A_CLASS = 0.01, 0.0005  # .01, .05 and .5 for 10, 100 and 1,000 classes


class Balanced(NamedTuple):
    """Means and variances (..., K, C) of K classes; (0, C) before the first, where they stand for the source's."""

    means: Tensor
    variances: Tensor

    def begun(self, source: Source, *shape: int) -> Balanced:
        """With so many classes, all at the source if nothing was seen."""
        if self.means.numel():
            return self
        values = (source.mean, source.variance)
        return Balanced(*(value.expand(*shape, len(value)) for value in values))

    def whole(self) -> tuple[Tensor, Tensor]:
        """Mean and variance (..., C) of all classes together, each as heavy; between them the unbiased variance."""
        mean, variance = self.means.mean(-2), self.variances.mean(-2)
        return mean, variance if self.means.shape[-2] == 1 else variance + self.means.var(-2)

    def moved(self, labels: Tensor, evidence: Evidence, eta: float) -> Balanced:
        """After instances with the labels (n,), for statistics (K, C)."""
        hot = (labels.unsqueeze(1) == torch.arange(len(self.means), device=labels.device)).double()  # (n, K); -1: none
        count = hot.sum(0).unsqueeze(1)
        mean_i, variance_i = evidence.instances.mean, evidence.instances.variance
        step = eta * (hot.T @ mean_i - count * self.means)
        squares = variance_i + (mean_i - hot @ self.means).square()
        variances = self.variances + eta * (hot.T @ squares - count * self.variances) - step.square()
        return Balanced(self.means + step, variances.clamp_min(0))


class Told(NamedTuple):
    """What a pass tells the next one.

    Args:
        classes: K.
        labels: Predicted class of each row of the batch (n,); -1 where unknown.
        domains: Domain of each row (n,), None while they are not looked for.
    """

    classes: int
    labels: Tensor
    domains: Tensor | None = None

    def here(self, evidence: Evidence) -> Told | None:
        """The same for the evidence's instances; None where its rows are not the batch's."""
        kept = evidence.kept
        if len(self.labels) != (evidence.count if kept is None else len(kept)):
            return None
        if kept is None:
            return self
        return self._replace(labels=self.labels[kept], domains=None if self.domains is None else self.domains[kept])


def _eta(eta: float | None, classes: int) -> float:
    return max(_ETA, _ETA_A_CLASS * classes) if eta is None else eta


def _predicted(answer: Answer, kept: Tensor | None) -> Told | None:
    """The classes that an answer predicts for the rows that are kept; None where it gives none for them."""
    p = answer.probabilities
    if p is None or (kept is not None and int(kept.sum()) != len(p)):
        return None
    device = answer.sources[0].mean.device
    labels = p.argmax(1).to(device)
    if kept is not None:
        labels = labels.new_full((len(kept),), -1).masked_scatter(kept.to(device), labels)
    return Told(p.shape[1], labels)


@dataclass(frozen=True)
class BBN(Policy):
    r"""Balanced batch normalization, TRIBE's: statistics of every predicted class, averaged over the classes.

    For the instances i of class k in a batch, with their means m_i and variances v_i over positions,

    $$ d_k = \eta \sum_i (m_i - m_k), \qquad
    v_k \leftarrow v_k + \eta \sum_i [v_i + (m_i - m_k)^2 - v_k] - d_k^2, \qquad m_k \leftarrow m_k + d_k $$
    $$ \mu = \overline{m_k}, \qquad v = \overline{v_k} + \mathrm{var}_k\, m_k $$

    All classes start at the source. Left open, decided here: the first of two passes answers with the statistics as
    they are, the second takes its predictions as classes, updates and gives the answer; the variance between classes is
    the unbiased one, as in its authors' code; a v_k below 0 becomes 0; TRIBE's gamma is 0, and its networks beside the
    model are not part of the rule.

    Args:
        eta: Weight of one instance in its class, in [0, 1]; None for the paper's by the number K of classes: .01 up
            to 20 classes, .0005 K beyond.

    References:
        Su, Xu and Jia (2024), "Towards real-world test-time adaptation: tri-net self-training with balanced
        normalization", AAAI.
    """

    eta: float | None = None

    passes: ClassVar[int] = 2
    needs_predictions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], or be None for one by the number of classes; got {self.eta!r}")

    def init(self, source: Source) -> State:
        """Nothing seen."""
        return _nothing(source)

    def step(self, state: Balanced, evidence: Evidence, source: Source) -> tuple[Balanced, Statistics]:
        """In the second pass update by the predictions of the first; in both normalize by the average over classes."""
        state = self._updated(state, evidence, source)
        return state, Statistics(*_whole(state, source), carry=evidence.kept)

    def _updated(self, state: Balanced, evidence: Evidence, source: Source) -> Balanced:
        told: Told | None = evidence.memory and evidence.memory.here(evidence)
        if told is None:
            return state
        return state.begun(source, told.classes).moved(told.labels, evidence, _eta(self.eta, told.classes))

    def answered(self, states: list[State], answer: Answer) -> tuple[list[State], Any]:
        """Hand the predicted classes to the second pass; nothing to the next batch."""
        return states, _predicted(answer, answer.carry) if answer.pass_index == 0 else None


def _nothing(source: Source) -> Balanced:
    return Balanced(*(value.new_zeros(0, len(value)) for value in (source.mean, source.variance)))


def _whole(state: Balanced, source: Source) -> tuple[Tensor, Tensor]:
    return state.whole() if state.means.numel() else (source.mean, source.variance)


class OfDomains(NamedTuple):
    """BDN's state at a site.

    Args:
        balanced: BBN's, whatever the domain.
        domains: The same of every domain (D, K, C), the last one untouched.
    """

    balanced: Balanced
    domains: Balanced


class Nearest(NamedTuple):
    """What BDN carries from site to site: rows that are kept (n,) or None, and the domain of each row (n,) or None."""

    kept: Tensor | None
    domains: Tensor | None


@dataclass(frozen=True)
class BDN(Policy):
    r"""Balanced domain normalization, UniTTA's: BBN's statistics for every domain and class.

    An instance is of the domain d whose whole is nearest to it at one layer by the Wasserstein distance

    $$ \sum_c (m_i - \mu_d)^2 + (\sqrt{v_i} - \sqrt{v_d})^2 $$

    and is normalized by that domain's whole, once the instances of the batch have updated it as in `BBN`. One domain
    always keeps the source's values; an instance that it is nearest to takes it, and another one is added. Three
    passes, as its authors have it: BBN's statistics give the classes; BBN updates with them, and the domains are found;
    the domains update and give the answer. Left open, decided here: the layer is the one a third of the way down, which
    theirs is in a WideResNet-28, or the next that is reached; beyond `most` domains none is added; their filter, which
    takes the second pass's answer where it is surer, and their output correction are not part of the rule; a paused
    model uses the last instance's domain.

    Args:
        eta: As for `BBN`.
        most: Domains that may be found, at least 1; theirs is 64.

    References:
        Du, Wang, Guo and others (2024), "UniTTA: unified benchmark and versatile framework towards realistic
        test-time adaptation", arXiv 2407.20080.
    """

    eta: float | None = None
    most: int = 64

    passes: ClassVar[int] = 3
    needs_predictions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        BBN(self.eta)
        if not isinstance(self.most, int) or self.most < 1:
            raise ValueError(f"most must be a whole number, at least 1; got {self.most!r}")

    def init(self, source: Source) -> State:
        """Nothing seen."""
        return OfDomains(_nothing(source), _nothing(source))

    def step(self, state: OfDomains, evidence: Evidence, source: Source) -> tuple[OfDomains, Statistics]:
        """In two passes what BBN does, and find domains; in the third normalize by them."""
        if evidence.pass_index < 2:
            before: Nearest = evidence.upstream or Nearest(None, None)
            state = state._replace(balanced=BBN(self.eta)._updated(state.balanced, evidence, source))
            domains = before.domains
            if evidence.pass_index == 1 and domains is None and source.site_index >= source.site_count // 3:
                domains = self._nearest(state.domains.begun(source, 2, 1), evidence)
            return state, Statistics(*_whole(state.balanced, source), carry=Nearest(evidence.kept, domains))
        told: Told | None = evidence.memory and evidence.memory.here(evidence)
        if told is None or told.domains is None:
            return state, Statistics(*_whole(state.balanced, source))
        known = state.domains.begun(source, 2, told.classes)
        new = int(evidence.memory.domains.max()) + 2 - len(known.means)
        if new > 0:  # the untouched one is taken: another one is added
            known = Balanced(*(torch.cat((values, *[values[-1:]] * new)) for values in known))
        moved = self._moved(known, told, told.domains, evidence)
        means, variances = moved.whole()
        last = int(told.domains[-1])
        one = bool((told.domains == last).all())
        instances = None if one else (means[told.domains], variances[told.domains])
        return state._replace(domains=moved), Statistics(means[last], variances[last], instances=instances)

    def _nearest(self, domains: Balanced, evidence: Evidence) -> Tensor:
        """Domain of each row; 0 for those that are left out."""
        means, variances = (values[: self.most] for values in domains.whole())  # (D, C)
        mean_i, variance_i = evidence.instances.mean, evidence.instances.variance.clamp_min(0)
        exact = "donot_use_mm_for_euclid_dist"
        far = torch.cdist(mean_i, means, compute_mode=exact).square()
        far += torch.cdist(variance_i.sqrt(), variances.sqrt(), compute_mode=exact).square()
        found = far.argmin(1)
        if evidence.kept is None:
            return found
        return found.new_zeros(len(evidence.kept)).masked_scatter(evidence.kept, found)

    def _moved(self, known: Balanced, told: Told, domains: Tensor, evidence: Evidence) -> Balanced:
        means, variances = known.means.clone(), known.variances.clone()
        for d in domains.unique().tolist():
            labels = torch.where(domains == d, told.labels, -1)
            one = Balanced(means[d], variances[d]).moved(labels, evidence, _eta(self.eta, told.classes))
            means[d], variances[d] = one
        return Balanced(means, variances)

    def answered(self, states: list[State], answer: Answer) -> tuple[list[State], Any]:
        """Hand classes, then domains, to the next pass; nothing to the next batch."""
        found: Nearest = answer.carry or Nearest(None, None)
        if answer.pass_index == 0:
            return states, _predicted(answer, found.kept)
        told: Told | None = answer.memory if answer.pass_index == 1 else None
        return states, told and told._replace(domains=found.domains)
