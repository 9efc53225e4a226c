from __future__ import annotations

import pickle

import pytest
import torch

from bench.fake import data, model
from normadapt.bench.methods import ABLATIONS, METHODS, select_methods
from normadapt.errors import SpecError


def _names(*words: str) -> list[str]:
    return [method.name for method in select_methods(words)]


def test_source_and_limits_are_always_there() -> None:
    assert _names("MedBN") == ["Source", "MedBN", "ceiling", "limit"]
    assert _names() == ["Source", "ceiling", "limit"]
    assert [m.name for m in select_methods(None)] == list(METHODS)


def test_families_groups_and_commas() -> None:
    assert _names("ema,medbn") == [
        "Source",
        "EMA(0.2)",
        "EMA(0.1)",
        "EMA(0.05)",
        "EMA(0.01)",
        "MedBN",
        "ceiling",
        "limit",
    ]
    assert _names("ours") == ["Source", "Domains", "Domains + profile", "ceiling", "limit"]
    assert "Tent" in _names("baselines")
    assert set(_names("ablations")) == {"Source", "ceiling", "limit", *ABLATIONS}
    assert _names("MedBN,Domains, no shares, domains, no residual + profile") == [
        *("Source", "MedBN", "Domains, no residual + profile", "Domains, no shares", "ceiling", "limit")
    ]
    assert all(name in _names(f"MedBN,{name}") for name in ABLATIONS)


def test_settings_of_domains_are_read_from_their_name() -> None:
    first = "Domains(max_weight=0.5, tempering=1.0, slots=3) + profile"
    found = select_methods([f"{first}, Domains(priors=((0.0, 0.0), (1.0, 0.1)))"])
    assert [m.name for m in found[1:3]] == [first, "Domains(priors=((0.0, 0.0), (1.0, 0.1)))"]
    assert [m.uses_profile for m in found[1:3]] == [True, False]
    policy = found[1].make.policy  # type: ignore[attr-defined]
    assert (policy.max_weight, policy.weights.tempering, policy.bank.slots) == (0.5, 1.0, 3)
    assert all(words in found[1].setting for words in ("max_weight=0.5", "tempering=1.0", "slots=3"))


@pytest.mark.parametrize("word", ["Track", "track + profile", "Track(memory=500)", "Track, no window"])
def test_the_rule_that_is_gone_names_the_one_in_its_place(word: str) -> None:
    with pytest.raises(SpecError, match="of a rule that is gone\n  -> the rule in its place is Domains"):
        select_methods([word])


@pytest.mark.parametrize(
    ("word", "hint"),
    [("BatchStatistic", "did you mean 'BatchStatistics'"), ("Domains(nothing=1)", "nothing"),
     ("Domains(7)", "keywords"), ("Domains(max_weight=open('x'))", "cannot be made"),
     ("Domains(max_weight=-1)", "max_weight")],
)  # fmt: skip
def test_unknown_names_are_said_with_a_remedy(word: str, hint: str) -> None:
    with pytest.raises(SpecError, match="--methods") as raised:
        select_methods([word])
    assert hint in str(raised.value)
    assert "\n  -> " in str(raised.value)


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda m: m.name)
def test_methods_can_be_sent_to_another_process(method: object) -> None:
    assert pickle.loads(pickle.dumps(method)) == method


def test_settings_tell_methods_apart() -> None:
    settings = [m.setting for m in METHODS.values()]
    assert len(set(settings)) == len(settings)


@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if m.role != "limit" and not m.uses_profile])
def test_methods_leave_the_model_alone_and_start_afresh(name: str) -> None:
    net, images = model().requires_grad_(False), data("faint", 16, 0)[0]
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with torch.no_grad():
        one = METHODS[name].make(net, None)
        first, second = one(images), one(images + 1)
        again = METHODS[name].make(net, None)
        assert torch.equal(again(images), first)
    assert second.shape == (16, 3)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if m.batch_independent and m.role != "limit"])
def test_batch_independent_means_what_it_says(name: str) -> None:
    net, images = model(), data("faint", 16, 0)[0]
    with torch.no_grad():
        call = METHODS[name].make(net, None)
        together = call(images)
        alone = torch.cat([call(image) for image in images.split(1)])
    assert torch.allclose(together, alone, atol=1e-4)


def test_a_rule_with_one_number_takes_any() -> None:
    by_value, by_name = select_methods(["EMA(0.3)", "iabn(2.5)"]), select_methods(["EMA(momentum=0.3)"])
    assert [m.name for m in by_value if m.name not in ("Source", "ceiling", "limit")] == ["EMA(0.3)", "IABN(2.5)"]
    assert "momentum=0.3" in next(m for m in by_name if m.family == "EMA").setting
    assert next(m for m in by_value if m.family == "IABN").batch_independent
    for wrong in ("EMA(3)", "SchneiderPrior(-1)", "EMA(1e)"):
        with pytest.raises(SpecError, match="cannot be made"):
            select_methods([wrong])
