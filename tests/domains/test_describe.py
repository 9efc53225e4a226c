"""What an input looks like in numbers: by hand, whatever the rank, each instance by itself."""

import math

import pytest
import torch

from normadapt.domains.describe import describe, first_moments, names, only_input
from normadapt.layers.moments import instance_moments

SHAPES = [(5, 7), (5, 2, 20), (5, 1, 12), (5, 3, 10, 12), (5, 1, 8, 8), (5, 2, 4, 6, 8)]
NOTHING = 0.5 * math.log(1e-5)


def told(x):
    """Each of the named numbers (n,) of inputs."""
    found = describe(x)
    return {name: found[:, k] for k, name in enumerate(names(x.shape[1], x.dim()))}


def sample(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_each_instance_is_described_by_itself_and_every_number_has_a_name(shape):
    x, order = sample(shape), torch.tensor([3, 0, 4, 1, 2])
    found = describe(x)
    assert found.shape == (5, len(names(shape[1], len(shape))))
    assert found.dtype == torch.float64
    torch.testing.assert_close(describe(x[order]), found[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([describe(one) for one in x.split(1)]), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [-1.5, 0.0, 2.0])
def test_one_grey(shape, value):
    found = told(torch.full(shape, value))
    flat = dict.fromkeys(found, 0.0) | {"mean": value, "at maximum": 1.0, "at minimum": 1.0, "tails": math.log(0.1)}
    energies = {"contrast", "edges across", "edges down", "grain across", "grain down", "large scale"}
    flat |= dict.fromkeys(energies & found.keys(), NOTHING)
    for name, number in found.items():
        assert number.tolist() == pytest.approx([flat[name]] * 5, abs=1e-5), name


def test_an_image_that_grows_brighter_to_the_right():
    ramp = torch.linspace(-1, 1, 14).expand(1, 1, 14, 14)
    found, step = told(2 * ramp), 4 / 13
    assert float(found["mean"]) == pytest.approx(0, abs=1e-6)
    assert float(found["contrast"]) == pytest.approx(0.5 * math.log(4 * float(ramp.var(correction=0)) + 1e-5), rel=1e-4)
    assert float(found["edges across"]) == pytest.approx(0.5 * math.log(step**2 + 1e-5), rel=1e-4)
    assert float(found["edges down"]) == pytest.approx(NOTHING, rel=1e-4)
    assert float(found["grain across"]) == pytest.approx(NOTHING, abs=1e-3)
    assert float(found["slope down"]) == pytest.approx(0, abs=1e-5)
    assert float(found["slope across"]) == pytest.approx(2, rel=0.25)
    assert float(found["skewness"]) == pytest.approx(0, abs=1e-5)
    turned = told(2 * ramp.transpose(2, 3))
    pairs = (("slope across", "slope down"), ("edges across", "edges down"), ("grain across", "grain down"))
    for one, other in pairs:
        assert float(turned[other]) == pytest.approx(float(found[one]), rel=1e-4)
        assert float(turned[one]) == pytest.approx(float(found[other]), abs=1e-4)


def test_contrast_counts_as_a_logarithm_and_a_level_as_itself():
    x = sample((4, 3, 9, 9))
    plain, dim = told(x), told(0.25 * x + 1)
    for name in ("contrast", "edges across", "edges down", "grain across", "grain down", "large scale"):
        assert (plain[name] - dim[name]).tolist() == pytest.approx([math.log(4)] * 4, abs=1e-2), name
    assert (dim["mean"] - 0.25 * plain["mean"]).tolist() == pytest.approx([1] * 4, abs=1e-5)
    for name in ("skewness", "tails"):
        assert (dim[name] - plain[name]).abs().max() < 0.02, name


def test_saturated_pixels_and_skewness():
    x = torch.zeros(1, 1, 10, 10)
    x[0, 0, :1] = 5.0  # ten of a hundred
    found = told(x)
    assert float(found["at maximum"]) == pytest.approx(0.1)
    assert float(found["at minimum"]) == pytest.approx(0.9)
    assert float(found["skewness"]) == pytest.approx((0.9 - 0.1) / (0.9 * 0.1) ** 0.5, rel=1e-3)
    assert float(told(-x)["skewness"]) == pytest.approx(-float(found["skewness"]))


def test_a_colour_cast_is_told_by_the_channels_own_levels():
    x = sample((2, 3, 6, 6))
    cast = x + torch.tensor([0.5, 0.0, -0.5]).view(1, 3, 1, 1)
    plain, found = told(x), told(cast)
    assert [float((found[f"level {k}"] - plain[f"level {k}"]).mean()) for k in range(3)] == pytest.approx(
        [0.5, 0.0, -0.5], abs=1e-5
    )
    torch.testing.assert_close(found["mean"], plain["mean"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found["contrast"], plain["contrast"], atol=1e-5, rtol=0)


def test_the_order_of_slices_is_not_taken_for_edges():
    """A volume is a stack of images: energies are those of its slices, wherever one slice ends and the next begins."""
    flat = torch.zeros(1, 1, 4, 6, 6) + 10 * torch.arange(4).view(1, 1, 4, 1, 1)
    found = told(flat)
    assert float(found["edges down"]) == pytest.approx(NOTHING, rel=1e-4)
    assert float(found["edges across"]) == pytest.approx(NOTHING, rel=1e-4)


def test_the_first_site_by_hand():
    x = 1 + 2 * sample((4, 2, 5))
    moments = instance_moments(x)
    mean, variance = torch.tensor([1.0, 0.5]).double(), torch.tensor([4.0, 1.0]).double()
    found = first_moments(moments, mean, variance)
    location = (x.double().mean(2) - mean) / variance.sqrt()
    within = x.double().var(2, correction=0) / variance
    expected = torch.cat((location, 0.5 * (within + location**2).log(), 0.5 * within.log()), 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    still = first_moments(instance_moments(torch.ones(1, 2, 5)), torch.ones(2).double(), variance)
    assert bool(still.isfinite().all())


def test_only_what_is_one_tensor_of_numbers_is_described():
    x = sample((2, 3, 4, 4))
    assert only_input(((x,), {})) is x
    assert only_input(((), {"image": x, "scale": 2.0})) is x
    for args, kwargs in (
        ((x, x), {}),
        ((), {"image": x, "mask": x}),
        (([x],), {}),
        ((x, {"more": 1}), {}),
        ((x.long(),), {}),
        ((x[0, 0, 0],), {}),
        ((x[:0],), {}),
        ((), {}),
    ):
        assert only_input((args, kwargs)) is None
