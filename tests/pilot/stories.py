"""A small real model, its data, a policy that can be led astray, and a pilot whose clock the test turns."""

import copy
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from normadapt import profile_source
from normadapt.layers.policy import Policy, Statistics
from normadapt.pilot import Disagreement, LabelledError, NonFinite, Pilot, Plan, StageRule

CLASSES = 3


def images(n, seed=0, labels=None):
    """Images (n, 3, 4, 4) of one bright channel each, which is their class, and the classes (n,)."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (n,), generator=draw) if labels is None else torch.tensor(labels)
    x = torch.eye(CLASSES)[y][:, :, None, None] + 0.4 * torch.randn(n, CLASSES, 4, 4, generator=draw)
    return x, y


def make_model():
    """A copy of one model, to the bit: least squares do not come out the same twice."""
    return copy.deepcopy(_model())


@cache
def _model():
    """Conv, batch norm and a head that was fitted: right on nearly all of `images`, and sure of it."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, momentum=None), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(8, CLASSES))
    x, y = images(600, seed=100)
    with torch.no_grad():
        features = nn.Sequential(*list(model)[:-1]).train()(x)
        design = torch.cat([features, torch.ones(len(x), 1)], 1)
        solved = torch.linalg.lstsq(design, 8 * torch.eye(CLASSES)[y]).solution
        model[-1].weight.copy_(solved[:-1].T)
        model[-1].bias.copy_(solved[-1])
    return model.eval()


def make_profile(model):
    """What the source looks like to a model of ours."""
    return profile_source(model, [images(50, seed=seed)[0] for seed in range(4)])


class Average(NamedTuple):
    """A moving average's memory."""

    mean: torch.Tensor
    variance: torch.Tensor


@dataclass(frozen=True)
class Follow(Policy):
    """A moving average that follows whatever comes, with a ceiling; raises while `broken` holds something."""

    rate: float = 0.02
    max_weight: float = 1.0
    broken: ClassVar[list] = []

    def init(self, source):
        return Average(source.mean, source.variance)

    def step(self, state, evidence, source):
        if self.broken:
            raise RuntimeError(self.broken[0])
        w = self.rate * self.max_weight
        state = Average(torch.lerp(state.mean, evidence.mean, w), torch.lerp(state.variance, evidence.variance, w))
        return state, Statistics(state.mean, state.variance)


class Clock:
    """Reads what the test says."""

    def __init__(self):
        self.now = 1_000_000.0

    def __call__(self):
        return self.now


GUARDS = (Disagreement(margin=0.1), LabelledError(margin=0.05), NonFinite(own_only=False))
RULES = {
    "shadow": StageRule(100, 30.0),
    "canary": (StageRule(20, 10.0, share=0.25), StageRule(40, 10.0, share=0.5)),
    "full": StageRule(60, 20.0),
    "cool_down": 30.0,
    "paired_share": 0.3,
    "minimum_labels": 20,
    "label_margin": 0.2,
    "idle": 60.0,
    "remember": 500,
    "commit_every": 100,
    "save_every": 50,
}


def make_plan(**changes):
    return Plan(**{"guards": GUARDS, "promote_without_labels": True, **RULES, **changes})


class Story:
    """Sends requests to a pilot, one second apart, and remembers what it sent."""

    def __init__(self, store=None, plan=None, model=None, policy=None, **options):
        self.model = make_model() if model is None else model
        self.clock = options.pop("clock", None) or Clock()
        self.told = []
        options.setdefault("on_transition", self.told.append)
        self.pilot = Pilot(
            self.model,
            store=store,
            plan=make_plan() if plan is None else plan,
            policy=Follow() if policy is None else policy,
            clock=self.clock,
            **options,
        )
        self.sent = 0

    def send(self, n=8, labelled=False, seconds=1.0, change=None, labels=None, late=0.0, **options):
        """One request of n items; its answer. `change` is done to the images, `labels` are their classes."""
        x, y = images(n, seed=self.sent, labels=labels)
        x = x if change is None else change(x)
        ids = [f"{self.sent}-{place}" for place in range(n)]
        self.sent += 1
        self.clock.now += seconds
        with torch.no_grad():
            options = {"ids": ids, **options}
            output = self.pilot(x, **options)
            expected = self.model(x)
        self.last = x, y, ids, expected
        if labelled:
            for id_, label in zip(ids, y.tolist(), strict=True):
                self.pilot.label(id_, label)
        return output

    def until(self, stage, limit=400, **options):
        """Send requests until the pilot stands there."""
        for _ in range(limit):
            if self.pilot.stage == stage if isinstance(stage, str) else self.pilot.position == stage:
                return self
            self.send(**options)
        raise AssertionError(f"still {self.pilot.position} with {self.pilot.verdict()}, not {stage}")

    def until_trip(self, limit=400, **options):
        """Send harm until a guard trips; the tripping request's answer and the source's, and how many requests."""
        before = self.pilot.position.rollbacks
        for count in range(1, limit + 1):
            output = self.send(**options)
            if self.pilot.position.rollbacks > before:
                return output, self.last[3], count
        raise AssertionError(f"no trip: {self.pilot.status()['guards']}")


def killed(story):
    """As if the process had ended just now: the system takes its lock back, and nothing more is written."""
    if story.pilot._keeper._outbox is not None:
        story.pilot._keeper._outbox._lease.release()


def nan(x):
    """A broken camera."""
    return x * float("nan")


def poison(x):
    """A stream that pulls the statistics away: one channel far too bright in every other image."""
    x = x.clone()
    x[::2, 1] += 40.0
    return x
