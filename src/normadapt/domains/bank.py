"""The bank: the domains that a stream has met, and which one each instance belongs to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normadapt.domains.change import Change
from normadapt.domains.places import Places

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class BankSettings:
    """How instances are assigned to domains. docs/THEORY.md, section 8; sensitivities: docs/EXPERIMENTS.md."""

    degrees: float = 6.0
    """Degrees of freedom of the Student t of an instance's place: a strange instance founds no domain."""

    founding: float = 0.2
    """Share of the switches that lead to a domain that was never seen."""

    switches: float = 1 / 50
    """Switches an instance, before any was seen; worth `_FIRST` instances."""

    slots: int = 16
    """Domains kept; the least seen goes."""


_FIRST = 50.0  # instances that the first guess of the switching rate is worth
_FADING = 0.998  # of what is known of the switching rate, an instance: a memory of 500
_MOST_SWITCHES = 0.9
_RECENT = 64  # places kept for the test of a change


class Domain(NamedTuple):
    """What a stream knows of one domain.

    Args:
        number: Unique in the stream; the source's is 0 where there is a profile.
        name: Given by a user; "" for none.
        since, last: Instances of the stream before its first and its last one.
        count: Instances assigned to it, repeated frames once.
        place: Where it lies (r,), float64.
        pull, weight: Sum of the places behind it (r,), and their number.
        look: Sum of the features of its instances (p,), float64.
        credit: Share of the instances since the last look at the deeper sites that were to be looked at.
        answers: What the model answered, see `ClassDraws`; None before the first.
        windows: Evidence at each site.
    """

    number: int
    name: str
    since: float
    last: float
    count: float  # type: ignore[assignment]  # hides tuple.count
    place: Tensor
    pull: Tensor
    weight: float
    look: Tensor
    credit: float
    answers: Any
    windows: tuple[Any, ...]


class Bank(NamedTuple):
    """The domains of a stream and where it is among them.

    Args:
        domains: In the order in which they were met.
        now: Number of the present one.
        born: Domains founded so far.
        seen: Instances seen, all of them.
        switches, steps: Fading sums behind the switching rate.
        recent: Places (m, r) of the last instances since the last switch, at most 64.
        stay: Instances since the last switch.
        last: Place (r,) of the last instance: a repeated frame has the same one.
        has_source: Whether domain 0 is the source's, whose place is fixed.
    """

    domains: tuple[Domain, ...]
    now: int
    born: int
    seen: float
    switches: float
    steps: float
    recent: Tensor
    stay: int
    last: Tensor
    has_source: bool

    def domain(self, number: int) -> Domain:
        """The domain of that number."""
        return next(domain for domain in self.domains if domain.number == number)

    def name_of(self, domain: Domain) -> str:
        """What a user gave it for a name; else what it is."""
        return domain.name or ("source" if self.has_source and domain.number == 0 else f"domain {domain.number}")

    def with_domain(self, domain: Domain) -> Bank:
        """The same bank with a domain in place of the one of its number."""
        return self._replace(domains=tuple(domain if d.number == domain.number else d for d in self.domains))

    def without(self, number: int) -> Bank:
        """The same bank without what it knows of a domain; its first domain is only emptied."""
        found = self.domain(number)
        if found is self.domains[0]:
            empty = _domain(number, self.seen, torch.zeros_like(found.place), 0.0, found.look)
            left = (empty, *self.domains[1:])
        else:
            left = tuple(d for d in self.domains if d is not found)
        now = self.now if any(d.number == self.now for d in left) else left[0].number
        return self._replace(domains=left, now=now, recent=self.recent[:0], stay=0)


def empty_bank(directions: int, looks: int, *, has_source: bool) -> Bank:
    """A bank that has seen nothing: one domain, the source's if there is a profile."""
    nowhere = torch.zeros(directions, dtype=torch.float64)
    first = _domain(0, 0.0, nowhere, 0.0, torch.zeros(looks, dtype=torch.float64))
    far = torch.full((directions,), 1e30, dtype=torch.float64)
    recent = torch.zeros(0, directions, dtype=torch.float64)
    return Bank((first,), 0, 1, 0.0, 0.0, 0.0, recent, 0, far, has_source)


def _domain(number: int, since: float, place: Tensor, weight: float, look: Tensor) -> Domain:
    return Domain(number, "", since, since, 0.0, place, place * weight, weight, torch.zeros_like(look), 0.0, None, ())


class Assignment(NamedTuple):
    """Where the instances of a batch went.

    Args:
        bank: As it is after them.
        numbers: Domain of each instance (n,).
        admitted: Which of them (n,) are evidence: neither repeated frames nor absurd ones.
    """

    bank: Bank
    numbers: NDArray[np.int64]
    admitted: NDArray[np.bool_]


class _Assigning:
    """The work of one batch; the bank itself is replaced, never changed."""

    def __init__(self, bank: Bank, places: Places, change: Change, settings: BankSettings) -> None:
        self.bank = bank
        self.settings = settings
        self.change = change
        self.scatter: Floats = places.scatter.numpy()
        self.domains: list[Domain] = list(bank.domains)
        self.now = next(i for i, domain in enumerate(self.domains) if domain.number == bank.now)
        self.switches, self.steps, self.stay = bank.switches, bank.steps, bank.stay
        self.recent: Floats = bank.recent.numpy()
        self.born = bank.born
        self.seen = bank.seen

    def is_source(self, domain: Domain) -> bool:
        """Whether it is the source's domain, which stays where it is."""
        return self.bank.has_source and domain.number == 0

    def uncertainty(self, domain: Domain) -> float:
        """Variance of a domain's place, in natural units."""
        return 0.0 if self.is_source(domain) else 1 / max(domain.count, 1.0)

    def scores(self, y: Floats) -> Floats:
        """Log probability (n, K + 1) of each domain and of a new one, for each instance as the next of the stream."""
        settings, count = self.settings, len(self.domains)
        rate = (self.switches + settings.switches * _FIRST) / (self.steps + _FIRST)
        rate = min(_MOST_SWITCHES, rate)
        log_prior = np.full(count + 1, math.log(rate * (1 - settings.founding) / max(count - 1, 1)))
        log_prior[self.now] = math.log1p(-rate)
        log_prior[count] = math.log(rate * settings.founding)
        centres = np.stack([domain.place.numpy() for domain in self.domains])
        variance = np.array([1 + self.uncertainty(domain) for domain in self.domains])
        r = y.shape[1]
        squares = ((y[:, None] - centres) ** 2).sum(2) / variance
        widths = r * np.log(variance)
        beyond = (y * y / (1 + self.scatter)).sum(1)
        every = np.column_stack((squares, beyond))
        log_width = np.append(widths, np.log(1 + self.scatter).sum())
        return np.asarray(
            log_prior - 0.5 * (settings.degrees + r) * np.log1p(every / settings.degrees) - 0.5 * log_width
        )

    def run(self, y: Floats, look: Floats) -> NDArray[np.int64]:
        """Assign fresh instances in their order; returns their domains' numbers."""
        numbers = np.empty(len(y), dtype=np.int64)
        start = 0
        while start < len(y):
            best = self.scores(y[start:]).argmax(1)
            away = np.flatnonzero(best != self.now)
            stop = start + int(away[0]) if len(away) else len(y)
            if stop > start:
                stop = min(stop, start + self.change.until_test(self.stay))
                self.stays(y[start:stop], look[start:stop])
                numbers[start:stop] = self.domains[self.now].number
                if self.change.is_due(self.stay) and self.changed():
                    numbers[stop - 1] = self.domains[self.now].number
                start = stop
                continue
            k = int(best[0])
            if k == len(self.domains):
                self.found(y[start] * self.scatter / (1 + self.scatter), 0.0, look[start])
            else:
                self.now = k
            self.switched()
            self.stays(y[start : start + 1], look[start : start + 1])
            numbers[start] = self.domains[self.now].number
            start += 1
        return numbers

    def stays(self, y: Floats, look: Floats) -> None:
        """Some instances of the present domain."""
        count = len(y)
        domain = self.domains[self.now]
        self.stay += count
        self.recent = np.concatenate((self.recent, y))[-_RECENT:]
        fading = _FADING**count
        self.switches *= fading
        self.steps = self.steps * fading + (1 - fading) / (1 - _FADING)
        self.seen += count
        total, known = torch.from_numpy(look.sum(0)), domain.look
        # Where more is looked at than before, the domain's earlier instances are taken to have had as much of it.
        known = torch.cat((known, total[len(known) :] * (domain.count / count)))
        domain = domain._replace(count=domain.count + count, last=self.seen, look=known + total)
        if not self.is_source(domain):
            pull, weight = domain.pull + torch.from_numpy(y.sum(0)), domain.weight + count
            place = pull / (weight + torch.from_numpy(1 / self.scatter))
            domain = domain._replace(pull=pull, weight=weight, place=place)
        self.domains[self.now] = domain

    def switched(self) -> None:
        """The stream is in another domain from here on."""
        self.switches += 1
        self.stay = 0
        self.recent = self.recent[:0]

    def found(self, place: Floats, weight: float, look: Floats) -> None:
        """Begin a domain at this place, and go there."""
        if len(self.domains) >= self.settings.slots:
            others = [d for i, d in enumerate(self.domains) if i != self.now and not self.is_source(d)]
            least = min(others, key=lambda d: (bool(d.name), d.count))  # what a user has named goes last
            self.domains.remove(least)
        self.domains.append(
            _domain(self.born, self.seen, torch.from_numpy(place.copy()), weight, torch.from_numpy(look))
        )
        self.born += 1
        self.now = len(self.domains) - 1

    def changed(self) -> bool:
        """Whether the mean of the last instances speaks for another domain; goes there."""
        present = self.domains[self.now]
        known = [(domain.place.numpy(), self.uncertainty(domain)) for domain in self.domains]
        verdict = self.change.look(self.recent, self.stay, known, self.now)
        if verdict is None:
            return False
        # The last instance is taken back from the domain where it was counted.
        self.domains[self.now] = present._replace(count=present.count - 1)
        self.seen -= 1
        last = self.recent[-1:]
        if verdict.domain is None:
            self.found(verdict.mean, float(verdict.window), np.zeros(len(present.look)))
        else:
            self.now = verdict.domain
        self.switched()
        self.stays(last, np.zeros((1, len(present.look))))
        return True


def assign(
    bank: Bank,
    places: Places,
    change: Change,
    settings: BankSettings,
    y: Floats,
    look: Floats,
    sensible: NDArray[np.bool_],
) -> Assignment:
    """Assign the instances of a batch to domains, one after the other.

    Args:
        bank: Before them.
        places: Their discriminants.
        change: The test for a change of domain.
        settings: The numbers.
        y: Places (n, r).
        look: Features (n, p).
        sensible: Which instances (n,) are not absurd.
    """
    n = len(y)
    before = np.concatenate((bank.last.numpy()[None], y[:-1]))
    fresh = sensible & (np.abs(y - before).max(1, initial=0.0) > _SAME)
    work = _Assigning(bank, places, change, settings)
    rows = np.flatnonzero(fresh)
    numbers = np.full(n, bank.now, dtype=np.int64)
    if len(rows):
        found = work.run(y[rows], look[rows])
        numbers = np.where(np.arange(n) < rows[0], bank.now, found[np.searchsorted(rows, np.arange(n), "right") - 1])
    kept = {domain.number for domain in work.domains}
    if not all(int(k) in kept for k in np.unique(numbers)):  # forgotten again within the batch, for want of a slot
        numbers = np.array([k if int(k) in kept else work.domains[work.now].number for k in numbers])
    last = torch.from_numpy(y[np.flatnonzero(sensible)[-1]].copy()) if sensible.any() else bank.last
    after = bank._replace(
        domains=tuple(work.domains),
        now=work.domains[work.now].number,
        born=work.born,
        seen=bank.seen + n,
        switches=work.switches,
        steps=work.steps,
        recent=torch.from_numpy(work.recent.copy()),
        stay=work.stay,
        last=last,
    )
    return Assignment(after, numbers, fresh)


_SAME = 1e-9  # natural deviations: two instances nearer than this are the same frame


def merge_order(numbers: NDArray[np.int64]) -> Sequence[int]:
    """The domains of a batch in the order in which they come first."""
    return list(dict.fromkeys(numbers.tolist()))
