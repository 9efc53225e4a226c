"""One batch on its way through the model: in which of its policy's ways it goes, and what is remembered of it.

A batch is passed through the model in the way that spoke for itself so far. If it is one to compare on, it is passed
through in the others, too, before it is answered; then it is answered in the best, and the stream takes over the
records of that pass alone, or of the one that the policy would rather learn from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normadapt.doubts import Doubts
from normadapt.hooks import SiteHook, outside_autograd
from normadapt.predictions import Predictions, class_probabilities
from normadapt.statistics import Composition
from normadapt.streams import Pass, Stream, install


class Answer(NamedTuple):
    """A model's answer to a batch, and the pass that led to it.

    Args:
        running: The pass, with the records that the stream will have if the answer is taken.
        output: What the model returned.
        probabilities: Class probabilities (n, K) of it; None where it gives none.
    """

    running: Pass
    output: Any
    probabilities: Tensor | None


@dataclass(frozen=True)
class Forward:
    """What it takes to answer one batch of a stream. Nothing of the stream changes; `answer` returns what it becomes.

    Args:
        call: The model, called with the batch.
        hooks: One per site.
        policy: How evidence becomes statistics.
        ways: Those of the policy, see `Policy.ways`; empty where it has none.
        predictions: Maps an output to class probabilities, or None for the default.
        stream: What is known before the batch.
        watched: Whether the instances' moments are kept, for observers.
    """

    call: Callable[[], Any]
    hooks: list[SiteHook]
    policy: Any
    ways: Mapping[str, str]
    predictions: Predictions | None
    stream: Stream
    watched: bool

    def answer(self) -> tuple[Stream, Answer]:
        """The stream after the batch, and its answer, with the probabilities of its finite instances."""
        before = self.stream.composition.doubts
        way = self._choose(before)
        answer = self._pass(way)
        told = answer.probabilities
        n = 0 if told is None else len(told)
        doubts = self._passed(answer, n)
        learned = answer
        if len(self.ways) > 1 and doubts.due and told is not None:
            way, answer, learned, doubts = self._look(answer, n)
        with outside_autograd():
            composition = self.stream.composition._replace(doubts=doubts)
            if answer.probabilities is not None:
                finite = _of_finite([answer])[0]
                answer = answer._replace(probabilities=finite)
                composition = composition.update(finite)
        records = answer.running.taken_as(way)
        if learned.running.way != answer.running.way:
            records = [record.answered_as(r) for record, r in zip(learned.running.records, records, strict=True)]
        return Stream(records, composition), answer

    def _look(self, first: Answer, n: int) -> tuple[str, Answer, Answer, Doubts]:
        """The best of the ways for this batch, its answer, the one to learn from, and what is known of all of them."""
        answers = self._in_all_ways(first)
        with outside_autograd():
            doubts = self._compared(answers, first, n)
            way = self._choose(doubts)
            again = self._read_again(answers, way)
            if again is not answers:
                answers, doubts = again, self._compared(again, first, n)
                way = self._choose(doubts)
            answer, learned = answers[way], answers[self.policy.remembers(way)]
            passed = self._passed(learned, n)  # what the stream has met is that of the pass that is remembered
            doubts = doubts._replace(age=passed.age, met=passed.met)
        if answer is not first and torch.is_grad_enabled():
            answer = self._pass(answer.running.way, answer.running.told)
        else:
            install(self.hooks, answer.running.records)  # those of the last way that was passed may be in the layers
        return way, answer, learned, doubts

    def _compared(self, answers: Mapping[str, Answer], first: Answer, n: int) -> Doubts:
        told = dict(zip(answers, _of_finite(list(answers.values())), strict=True))
        return self._passed(first, n).compared(told)

    def _read_again(self, answers: dict[str, Answer], way: str) -> dict[str, Answer]:
        """The same where a window begins, with another pass that knows which classes the best of them predicts."""
        probabilities = _of_finite([answers[way]])[0]
        again = "" if probabilities is None else self.policy.reads_again(len(probabilities))
        if again not in answers or not (self.stream.composition.doubts.age == 0 or answers[again].running.jumped):
            return answers
        before, told = answers[again], self.stream.composition.update(probabilities)
        if told.last is None:
            return answers
        with torch.no_grad():
            after = self._pass(again, told)
        return {way: after if answer is before else answer for way, answer in answers.items()}

    def _passed(self, answer: Answer, n: int) -> Doubts:
        """What is known of the ways after a batch of n whose answer is this."""
        running = answer.running
        return self.stream.composition.doubts.passed(n, jumped=running.jumped, mixed=running.mixed)

    def _in_all_ways(self, first: Answer) -> dict[str, Answer]:
        """Answers in each of the ways, in their order; `first` is the one that is there already."""
        found = {first.running.way: first}
        for way, like in self.ways.items():
            if way not in found:
                if like in found and not found[like].running.split:
                    found[way] = found[like]
                else:
                    with torch.no_grad():  # of several graphs all but one would be in vain
                        found[way] = self._pass(way)
        return {way: found[way] for way in self.ways}

    def _pass(self, way: str, told: Composition | None = None) -> Answer:
        """The model's answer on one pass (or the policy's several), from the stream's own statistics."""
        install(self.hooks, self.stream.records)  # a site that skips the batch is not to keep another way's
        running = Pass(self.policy, self.stream, watched=self.watched, way=way, told=told)
        try:
            for hook in self.hooks:
                hook.current = running
            for _ in range(getattr(self.policy, "passes", 1) - 1):
                with outside_autograd():
                    self.call()
                    running.repeat()
            output = self.call()
        finally:
            for hook in self.hooks:
                hook.current = None
        with outside_autograd():
            needed = getattr(self.policy, "needs_predictions", False)
            return Answer(running, output, class_probabilities(output, self.predictions, needed=needed))

    def _choose(self, doubts: Doubts) -> str:
        if not self.ways:
            return ""
        way: str = self.policy.choose(doubts)
        if way not in self.ways:
            ways = ", ".join(map(repr, self.ways))
            raise ValueError(f"{type(self.policy).__name__}.choose() must return one of its ways, {ways}; got {way!r}")
        return way


def _of_finite(answers: Sequence[Answer]) -> list[Any]:
    """The probabilities of the instances whose activations were finite at every site in every one of the passes."""
    bad = None
    for answer in answers:
        here = answer.running.bad
        if here is not None:
            bad = here if bad is None or bad.shape != here.shape else bad | here
    told = [answer.probabilities for answer in answers]
    return [p if p is None or bad is None or bad.shape[0] != p.shape[0] else p[~bad] for p in told]
