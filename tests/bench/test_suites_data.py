"""The suites on the real data, where they are installed; what is missing is named in the skips."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from normadapt.bench.models import ActivityNet, FashionNet, load_weights
from normadapt.bench.suites import SUITES, activity, crepe, fashion, imagenet_c, third_party
from normadapt.bench.suites.base import Domain, Task
from normadapt.errors import NormadaptError

SPLITS = ("report", "dev")


def needs(name: str) -> pytest.MarkDecorator:
    missing = SUITES[name].missing()
    reason = "; ".join(f"{need.what} not there: {need.install}" for need in missing)
    return pytest.mark.skipif(bool(missing), reason=reason)


def accuracy(task: Task, domain: Domain) -> float:
    with torch.no_grad():
        parts = zip(domain.inputs.split(100), domain.labels.split(100), strict=True)
        return float(torch.cat([task.correct(task.model(inputs), labels) for inputs, labels in parts]).double().mean())


def pictures(count: int = 3, side: int = 28) -> np.ndarray:
    place = np.arange(side)
    wave = np.sin(place[:, None] / (3 + np.arange(count)[:, None, None])) * np.cos(place / 5)
    return np.uint8(127 + 120 * wave)


@needs("fashion-c")
@pytest.mark.parametrize("name", [*imagenet_c.COMMON, *imagenet_c.EXTRA])
def test_corruptions_of_imagenet_c(name: str) -> None:
    images = pictures()
    before = np.random.get_state()
    changed = imagenet_c.corrupted(images, name, 5, 7)
    after = np.random.get_state()
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert changed.shape == images.shape
    assert changed.dtype == np.uint8
    assert not np.array_equal(changed, images)
    np.random.seed(1)
    assert np.array_equal(changed, imagenet_c.corrupted(images, name, 5, 7))
    assert np.array_equal(changed[:2], imagenet_c.corrupted(images[:2], name, 5, 7))  # no image depends on another


@needs("fashion-c")
@pytest.mark.parametrize("name", ["gaussian_noise", "impulse_noise", "glass_blur", "motion_blur", "frost", "spatter"])
def test_corruptions_draw_by_the_seed(name: str) -> None:
    images = pictures()
    assert not np.array_equal(imagenet_c.corrupted(images, name, 5, 7), imagenet_c.corrupted(images, name, 5, 8))


@needs("fashion-c")
def test_noise_keeps_its_strength() -> None:
    grey = np.full((20, 28, 28), 127, dtype=np.uint8)
    noisy = imagenet_c.corrupted(grey, "gaussian_noise", 1, 0)
    assert np.std(noisy / 255) == pytest.approx(0.08, rel=0.02)  # ImageNet-C's, not weakened by a mean over channels
    dark = imagenet_c.corrupted(grey, "contrast", 5, 0)
    assert np.ptp(dark) == 0


@needs("fashion-c")
def test_corruptions_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("zoom_blur", "snow"):  # the package prints for some sizes
        imagenet_c.corrupted(pictures(2, 33), name, 3, 0)
    assert capsys.readouterr().out == ""


def test_the_corruptions_are_those_of_the_package() -> None:
    package = pytest.importorskip("imagecorruptions")
    assert list(imagenet_c.COMMON) == package.get_corruption_names("common")
    assert list(imagenet_c.EXTRA) == package.get_corruption_names("validation")


def test_corruptions_need_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(NormadaptError, match=r"imagecorruptions-imaug.*\n  -> make bench-setup"):
        imagenet_c.corrupted(pictures(), "fog", 1, 0)


def test_report_and_dev_share_no_test_image() -> None:
    for choose, count in ((fashion.chosen_images, 10_000), (third_party.chosen_images, 5000)):
        report = {int(i) for seed in range(4) for i in choose(count, "report", seed)}
        dev = {int(i) for seed in range(4) for i in choose(count, "dev", seed)}
        assert not report & dev
        assert max(report | dev) < count
        assert len(set(choose(count, "report", 0).tolist())) == 2000
        assert not np.array_equal(choose(count, "report", 0), choose(count, "report", 1))


@needs("fashion-c")
def test_fashion_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "IMAGES", 30)
    suite = SUITES["fashion-c"].with_cache(tmp_path)
    report, dev = (suite.tasks(split, 0) for split in SPLITS)
    assert [task.name for task in report] == ["fashion-c/3", "fashion-c/5"]
    assert [len(task.shifts) for task in (*report, *dev)] == [15, 15, 4, 4]
    assert not set(report[0].shifts) & set(dev[0].shifts)
    assert not list(tmp_path.iterdir())  # nothing is made before it is asked for
    three, five = report
    assert three.ramps["contrast"] == ("contrast/1", "contrast/2", "contrast")
    assert torch.equal(three.domain("contrast").inputs, five.domain("contrast/3").inputs)
    assert not torch.equal(three.domain("contrast").inputs, five.domain("contrast").inputs)
    assert torch.equal(three.domain("clean").labels, five.domain("contrast").labels)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.npy"))
    assert files == [f"fashion-c-1.1.5/report-0/contrast-{severity}.npy" for severity in (3, 5)]


@needs("fashion-c")
def test_corrupted_images_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "IMAGES", 5)
    suite = SUITES["fashion-c"].with_cache(tmp_path)
    made = suite.tasks("dev", 2)[0].domain("speckle_noise")
    monkeypatch.setattr(fashion, "corrupted", lambda *_: pytest.fail("made again"))
    assert torch.equal(made.inputs, suite.tasks("dev", 2)[0].domain("speckle_noise").inputs)


@needs("fashion-c")
def test_what_is_made_ahead_is_what_a_domain_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "IMAGES", 5)
    one, other = (SUITES["fashion-c"].with_cache(tmp_path / name) for name in "ab")
    task, names = one.tasks("report", 0)[1], ["clean", "contrast", "contrast/2", "pixelate"]
    calls = one.ahead(task, names, "report", 0)
    for call in calls:
        pickle.loads(pickle.dumps(call))()
    made = sorted(path.stem for path in tmp_path.rglob("*.npy"))
    assert made == ["contrast-2", "contrast-5", "pixelate-5"]
    assert not one.ahead(task, names, "report", 0)
    apart = other.tasks("report", 0)[1]
    assert all(torch.equal(task.domain(name).inputs, apart.domain(name).inputs) for name in names)


@pytest.mark.skipif(fashion.fashion_folder() is None, reason=f"no Fashion-MNIST: {fashion.INSTALL_IMAGES}")
def test_fashion_net_is_trained() -> None:
    images, labels = fashion.fashion_images("test")
    with torch.no_grad():
        answers = load_weights(FashionNet(), "fashion")(fashion.fashion_inputs(images[:500])).argmax(1)
    assert float((answers == labels[:500]).double().mean()) > 0.89


def test_fashion_mnist_is_looked_for_where_xdg_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "datasets" / "fashion-mnist"
    folder.mkdir(parents=True)
    monkeypatch.setenv("XDG_DATA_DIRS", f"{tmp_path / 'none'}:{tmp_path}")
    assert fashion.fashion_folder() is None
    (folder / "t10k-images-idx3-ubyte.gz").touch()
    assert fashion.fashion_folder() == folder


@needs("activity")
def test_activity_leaves_subjects_out() -> None:
    report, dev = (SUITES["activity"].tasks(split, 0) for split in SPLITS)
    assert sorted(s for task in report for s in task.shifts) == [f"subject {i}" for i in range(1, 7)]
    assert {s for task in dev for s in task.shifts} == {f"subject {i}" for i in range(7, 11)}  # nobody is in both
    for task in (*report, *dev):
        assert {int(s.split()[1]) for s in task.shifts} <= set(activity.UNSEEN[task.name[-1]])
    for task in (*report, *dev):
        assert accuracy(task, task.domain("clean")) > 0.97
        assert min(accuracy(task, task.domain(shift)) for shift in task.shifts) > 0.5
        assert np.mean([accuracy(task, task.domain(shift)) for shift in task.shifts]) < 0.95  # there is a shift


@needs("activity")
def test_clean_windows_come_after_the_training_windows() -> None:
    series = activity.Series(np.arange(6000, dtype=np.float32).reshape(1000, 6), 1, 0)
    training, later = activity.windows(series, 0, 0.8), activity.windows(series, 0.8, 1)
    assert training.shape == (15, 6, 100)
    assert later.shape == (3, 6, 100)
    assert training.max() < later.min()


def test_activity_normalizes_by_its_training_subjects() -> None:
    if SUITES["activity"].missing():
        pytest.skip("seglearn is not installed")
    inputs, labels = activity.training_windows("a")
    scaled = activity.normalized(inputs, "a")
    torch.testing.assert_close(scaled.mean((0, 2)), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.std((0, 2)), torch.ones(6), atol=1e-4, rtol=0)
    assert sorted(labels.unique().tolist()) == list(range(7))
    assert not ActivityNet()(scaled[:2]).isnan().any()


@needs("usps-mnist")
def test_usps_net_meets_mnist() -> None:
    (task,) = SUITES["usps-mnist"].tasks("report", 0)
    assert task.shifts[0] == "plain"
    assert task.clean is None
    domain = task.domain("plain")
    assert len(domain.labels) == 2000
    assert accuracy(task, domain) == pytest.approx(0.65, abs=0.03)  # as measured on all 5,000
    ramp = [task.domain(name).inputs for name in ("plain", *task.ramps["noise"])]
    distance = [float((inputs - ramp[0]).square().mean()) for inputs in ramp]
    assert distance == sorted(distance)
    assert accuracy(task, task.domain("noise")) < 0.3


@needs("usps-digits")
def test_usps_net_meets_the_digits_of_scikit_learn() -> None:
    (task,) = SUITES["usps-digits"].tasks("dev", 0)
    assert accuracy(task, task.domain("plain")) > 0.65
    assert accuracy(task, task.domain("brightness")) < 0.4


@needs("svhn-mnist")
def test_svhn_net_meets_mnist() -> None:
    (task,) = SUITES["svhn-mnist"].tasks("report", 0)
    assert task.negative
    domain = task.domain("plain")
    assert domain.inputs.shape == (2000, 3, 32, 32)
    part = Domain(domain.inputs[:300], domain.labels[:300])
    assert accuracy(task, part) > 0.6


@needs("crepe")
def test_crepe_hears_the_tones() -> None:
    (task,) = SUITES["crepe"].tasks("report", 0)
    assert task.negative
    domain = task.domain("tones")
    part = Domain(domain.inputs[:200], domain.labels[:200])
    assert accuracy(task, part) > 0.95
    octave_up = Domain(part.inputs, part.labels + 1200)
    assert accuracy(task, octave_up) < 0.05
    torch.testing.assert_close(part.inputs.mean(1), torch.zeros(200), atol=1e-5, rtol=0)
    torch.testing.assert_close(part.inputs.std(1), torch.ones(200), atol=1e-4, rtol=0)


@needs("crepe")
def test_right_is_within_fifty_cents() -> None:
    (task,) = SUITES["crepe"].tasks("dev", 0)
    output = torch.zeros(1, 360)
    output[0, 100] = 1  # 1997.38 + 2000 cents
    labels = torch.tensor([3947, 3948, 3997, 4047, 4048])
    assert task.correct(output.expand(5, 360), labels).tolist() == [False, True, True, True, False]
    assert task.groups(torch.tensor([1149, 1150, 1200, 1249, 1250])).tolist() == [11, 0, 0, 0, 1]


def test_tones_have_the_pitch_they_say() -> None:
    samples, cents = crepe.tones(300, np.random.default_rng(0))
    assert samples.shape == (300, 1024)
    hertz = 10 * 2 ** (cents / 1200)
    assert crepe.LOWEST * 0.99 < hertz.min() < 70
    assert 990 < hertz.max() < crepe.HIGHEST * 1.01
    # the strongest period of the autocorrelation is that of the pitch: a second look at the same thing
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(1024), 65_536)) ** 2
    correlation = np.fft.irfft(spectrum)
    high = hertz > 200  # several periods in a frame
    for row, pitch in zip(correlation[high], hertz[high], strict=True):
        period = crepe.RATE / pitch
        near = np.arange(round(0.75 * period), round(1.35 * period))
        assert abs(1200 * np.log2(near[np.argmax(row[near])] / period)) < 90  # lags are whole samples
    prefix, _ = crepe.tones(10, np.random.default_rng(0))
    np.testing.assert_allclose(prefix, samples[:10])


def test_changes_of_tones() -> None:
    rng = np.random.default_rng(0)
    samples, _ = crepe.tones(20, rng)
    noise = crepe.with_noise(0)(samples, rng) - samples
    ratio = np.square(samples).mean(1) / np.square(noise).mean(1)
    assert np.all((ratio > 0.8) & (ratio < 1.25))
    cut = crepe.clipped(0.2)(samples, rng)
    np.testing.assert_allclose(np.abs(cut).max(1), 0.2 * np.abs(samples).max(1))
    band = np.abs(np.fft.rfft(crepe.low_pass(500)(samples, rng))).sum(0)
    before = np.abs(np.fft.rfft(samples)).sum(0)
    frequency = np.fft.rfftfreq(crepe.FRAME, 1 / crepe.RATE)
    assert np.all(band[frequency < 250] > 0.99 * before[frequency < 250])
    assert np.all(band[frequency > 1000] < 0.07 * before[frequency > 1000])
