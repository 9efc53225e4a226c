"""The demonstration on a few images: what it reports must be what its model and images give."""

import importlib.util
import json

import pytest
import torch
import torch.nn.functional as F

from normadapt import demo
from normadapt.errors import NormadaptError


@pytest.fixture(scope="module")
def result():
    return demo.run_demo(images=160, single_images=20, seed=3)


@pytest.fixture(scope="module")
def digits():
    return demo.mnist_digits(3)


def rows_of(result, stream):
    return {row.batch_size: row for row in result.rows if row.stream == stream}


def test_every_stream_batch_size_and_method_is_there(result):
    cells = [(row.stream, row.batch_size) for row in result.rows]
    assert cells == [(stream, size) for stream in demo.STREAMS for size in (1, 16, 64)]
    assert all(list(row.accuracy) == list(demo.METHODS) for row in result.rows)
    assert {row.batch_size: row.images for row in result.rows} == {1: 20, 16: 160, 64: 160}
    assert [site.name for site in result.report.sites] == ["features.1", "features.5"]
    assert {site.count for site in result.report.sites} == {160}


def test_accuracies_are_those_of_plain_torch(result, digits):
    images, labels = digits
    model = demo.usps_net()
    inputs = demo.normalized(images[:160] * 0.3)
    row = rows_of(result, "contrast x0.3")[64]
    with torch.no_grad():
        assert row.accuracy["source"] == pytest.approx(float((model(inputs).argmax(1) == labels[:160]).double().mean()))
        for layer in model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.train()
        right = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in zip(inputs.split(64), labels[:160].split(64), strict=True)
        )
    assert row.accuracy["batch stats"] == pytest.approx(right / 160)


def test_gain_and_its_error_come_from_the_same_images(result):
    for row in result.rows:
        assert row.gain == pytest.approx(row.accuracy[demo.OURS] - row.accuracy[demo.SOURCE])
        # A difference of two 0/1 answers has variance at most 1, at least gain (1 - gain).
        least = max(abs(row.gain) * (1 - abs(row.gain)), 0) / row.images
        assert least <= row.gain_error**2 * (1 + 1e-9) <= 1 / (row.images - 1) + 1e-9


def test_the_seed_decides_everything_but_the_time(result):
    again = demo.run_demo(images=160, single_images=20, seed=3)
    assert again.rows == result.rows
    assert again.report == result.report
    assert demo.run_demo(images=160, single_images=20, seed=4).rows != result.rows


def test_plain_data_survive_json(result):
    plain = result.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["rows"][0]["accuracy"]["source"] == result.rows[0].accuracy["source"]


def test_progress_ends_at_its_total_and_one_thread_does_the_work():
    calls, threads, before = [], set(), torch.get_num_threads()

    def progress(done, total):
        calls.append((done, total))
        threads.add(torch.get_num_threads())

    torch.set_num_threads(2)
    try:
        demo.run_demo(images=70, single_images=3, progress=progress)
        assert (threads, torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert calls[-1][0] == calls[-1][1]
    assert len({total for _, total in calls}) == 1


def test_the_published_model_reaches_its_known_accuracy():
    images, labels = demo.mnist_digits()
    assert images.shape == (5000, 1, 16, 16)
    assert torch.bincount(labels).tolist() == [500] * 10
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    with torch.no_grad():
        right = torch.cat([demo.usps_net()(part).argmax(1) for part in demo.normalized(images).split(500)]) == labels
    assert float(right.double().mean()) == pytest.approx(0.65, abs=0.02)


def test_conditions_are_what_they_say(digits):
    images = digits[0][:200]
    torch.testing.assert_close(demo.contrast(images, 0), images * 0.3)
    assert float(demo.brightness(images, 0).max()) <= 1
    assert float(demo.brightness(images, 0).min()) == pytest.approx(0.31)
    noisy = demo.noise(torch.full((200, 1, 16, 16), 0.5), 1)
    assert torch.equal(noisy, demo.noise(torch.full((200, 1, 16, 16), 0.5), 1))
    assert not torch.equal(noisy, demo.noise(torch.full((200, 1, 16, 16), 0.5), 2))
    normal = torch.distributions.Normal(0.0, 1.0)
    assert float((noisy == 1).double().mean()) == pytest.approx(float(normal.cdf(torch.tensor(-0.5 / 0.33))), abs=0.01)
    flat = torch.full((1, 1, 16, 16), 0.7)
    torch.testing.assert_close(demo.blur(flat, 0), flat)
    point = F.pad(torch.ones(1, 1, 1, 1), (8, 7, 8, 7))
    spread = demo.blur(point, 0)
    assert float(spread.sum()) == pytest.approx(1, abs=1e-5)
    assert float(spread[0, 0, 8, 8] / spread[0, 0, 8, 9]) == pytest.approx(2.718281828**0.5, rel=1e-5)


def test_all_in_turn_gives_every_condition_an_equal_share(digits):
    images = digits[0][:10]
    turned = demo.one_after_another(images, 0)
    for index, change in enumerate(demo.CONDITIONS.values()):
        part = slice(2 * index, 2 * index + 2)
        assert torch.equal(turned[part], change(images[part], 0))


@pytest.mark.parametrize("package", ["ccexam", "mlxtend"])
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(NormadaptError, match=f"package {package}.*\n.*pip install --no-deps ccexam==1.0.0") as caught:
        demo.run_demo(images=5, single_images=5)
    assert len(str(caught.value).splitlines()) == 2
