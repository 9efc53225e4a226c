"""Faults for drills do to inputs what they say, at the items that they are told."""

import pytest
import torch

from normadapt.errors import SpecError
from normadapt.pilot.faults import FAULTS, Injection, Injector


def images(n=12, seed=0):
    return 2.0 * torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed)) + 0.7


def change(name, seed=0):
    return FAULTS[name].make(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAULTS)
def test_shape_and_type_stay_and_the_input_is_not_touched(name):
    for dtype in (torch.float32, torch.float64, torch.float16):
        x = images().to(dtype)
        before = x.clone()
        out = change(name)(x)
        assert (out.shape, out.dtype) == (x.shape, dtype)
        assert torch.equal(x, before)
        assert not torch.equal(out, x)
        assert FAULTS[name].summary.endswith(".")


@pytest.mark.parametrize("name", FAULTS)
def test_the_generator_decides_everything(name):
    one, same, x = change(name, 3), change(name, 3), images()
    for _ in range(2):
        assert torch.equal(one(x).nan_to_num(7.0), same(x).nan_to_num(7.0))


def test_what_they_say():
    x, later = images(), images(seed=1) + 5
    constant, dark, inverted, frozen, drift, poisoned = map(
        change, ("constant", "dark", "inverted", "frozen", "drift", "poisoned")
    )
    assert torch.equal(constant(x), torch.full_like(x, float(x.mean())))
    assert torch.equal(constant(later), torch.full_like(x, float(x.mean())))  # the first batch sets the level
    assert torch.equal(dark(x), torch.full_like(x, float(x.min())))
    torch.testing.assert_close(inverted(inverted(x)), x)
    assert float(inverted(x).flatten()[x.argmax()]) == pytest.approx(float(x.min()), abs=1e-5)
    assert change("nan")(x).isnan().all()
    assert torch.equal(frozen(x), x[:1].expand_as(x))
    assert torch.equal(frozen(later), x[:1].expand_as(x))
    steps = 0.002 * x.std(correction=0) * torch.arange(24)
    grown = torch.cat((drift(x) - x, drift(later) - later))
    torch.testing.assert_close(grown.mean((1, 2, 3)), steps, atol=1e-5, rtol=0)
    out = torch.cat((poisoned(x[:3]), poisoned(x[3:])))
    assert torch.equal(out[::4], x[::4])
    assert torch.equal(out[1], torch.full_like(x[1], float(x[:3].max())))
    noise = change("noise")(images(2000))
    assert float(noise.mean()) == pytest.approx(0.7, abs=0.05)
    assert float(noise.std()) == pytest.approx(2.0, abs=0.05)


def test_an_injection_is_read():
    assert Injection.parse("nan@5") == Injection("nan", 5)
    assert Injection.parse(" dark@0-12 ") == Injection("dark", 0, 12)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nan", "expected NAME@ITEM"),
        ("nan@", "expected NAME@ITEM"),
        ("nan@-3", "expected NAME@ITEM"),
        ("nan@3-2", "ends before it begins"),
        ("nan@3-3", "ends before it begins"),
        ("fog@3", "one of: constant, dark"),
    ],
)
def test_an_injection_that_cannot_be_read_is_explained(text, said):
    with pytest.raises(SpecError, match=said):
        Injection.parse(text)


def test_an_injector_changes_those_items_and_no_others():
    injector, x = Injector([Injection("nan", 5, 9), Injection("constant", 11)]), images(16)
    out = torch.cat([injector(part, first) for first, part in zip((0, 4, 8, 12), x.split(4), strict=True)])
    assert out.isnan().flatten(1).all(1).nonzero()[:, 0].tolist() == [5, 6, 7, 8]
    assert torch.equal(out[:5], x[:5])
    assert torch.equal(out[9:11], x[9:11])
    assert (out[11:] == float(x[11].mean())).all()


def test_an_injector_leaves_what_is_no_picture():
    injector = Injector([Injection("nan", 0)])
    told = {"image": images(2), "kind": torch.tensor([1, 2]), "scale": 0.5}
    out = injector(told, 0)
    assert out["image"].isnan().all()
    assert torch.equal(out["kind"], told["kind"])
    assert out["scale"] == 0.5
    assert injector((images(2),), 0)[0].isnan().all()
