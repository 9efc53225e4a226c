"""What holds for every suite, and the interface on a suite made up here."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from normadapt.bench.models import WEIGHTS, ActivityNet, FashionNet, load_weights
from normadapt.bench.suites import SUITES, fashion
from normadapt.bench.suites.activity import UNSEEN
from normadapt.bench.suites.base import Domain, Need, Suite, Task, draw, package_folder
from normadapt.errors import NormadaptError

SPLITS = ("report", "dev")
NAMES = list(SUITES)


class Pairs(Suite):
    """Two numbers per instance; the larger one says which class."""

    name = "pairs"
    summary = "made up"
    needs = (Need("water", lambda: Pairs.water, "fill the kettle"), Need("tea", lambda: True, "buy tea"))
    water = True
    made: list[str]

    def _tasks(self, split: str, seed: int) -> list[Task]:
        self.made = []

        def make(name: str) -> Domain:
            self.made.append(name)
            inputs = torch.randn((6, 2), generator=torch.Generator().manual_seed(draw("dev", seed, name)))
            return Domain(inputs, inputs.argmax(1))

        ramps = {"far": ("near", "far")}
        return [Task("pairs/1", nn.Identity(), make, clean="home", shifts=("far", "off"), ramps=ramps)]


def test_a_task_gives_its_domains() -> None:
    suite = Pairs()
    (task,) = suite.tasks("dev", 0)
    assert task.domain_names == ("home", "far", "off", "near")
    domain = task.domain("near")
    assert task.domain("near") is domain
    assert suite.made == ["near"]
    assert not task.model.training
    assert task.correct(domain.inputs, domain.labels).tolist() == [True] * 6
    assert task.correct(-domain.inputs, domain.labels).tolist() == [False] * 6
    assert torch.equal(task.groups(domain.labels), domain.labels)
    assert task.source_batches() is None


def test_a_task_keeps_only_the_domains_used_last() -> None:
    names = tuple(f"s{i}" for i in range(40))
    made: list[str] = []

    def make(name: str) -> Domain:
        made.append(name)
        return Domain(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))

    task = Task("many", nn.Identity(), make, clean=None, shifts=names)
    for name in names:
        task.domain(names[0])
        task.domain(name)
    assert made == list(names)  # the first was used all the time
    task.domain(names[1])
    assert made == [*names, names[1]]


def test_an_unknown_domain_is_named() -> None:
    (task,) = Pairs().tasks("dev", 0)
    with pytest.raises(NormadaptError, match=r"no domain 'away'\n  -> one of: home, far, off, near"):
        task.domain("away")


def test_missing_data_give_one_line_and_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pairs, "water", False)
    assert [need.what for need in Pairs().missing()] == ["water"]
    with pytest.raises(NormadaptError) as caught:
        Pairs().tasks("dev", 0)
    assert str(caught.value) == "the suite pairs needs water\n  -> fill the kettle"


@pytest.mark.parametrize("name", NAMES)
def test_every_need_has_one_command(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path))
    suite = SUITES[name]
    assert suite.missing() == suite.needs != ()
    with pytest.raises(NormadaptError) as caught:
        suite.tasks("report", 0)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 * len(suite.needs)
    assert all(line.startswith(f"the suite {name} needs ") for line in lines[::2])
    assert all(line.startswith(("  -> apt-get install ", "  -> python -m pip", "  -> make ")) for line in lines[1::2])


def test_packages_are_found_without_importing_them() -> None:
    found = package_folder("torch")
    assert found is not None
    assert (found / "__init__.py").is_file()
    assert package_folder("no_such_package") is None


def test_seeds_differ_by_split_seed_and_purpose() -> None:
    seeds = {draw(split, seed, *words) for split in SPLITS for seed in (0, 1) for words in ((), ("a",), ("a", 1), (1,))}
    assert len(seeds) == 16
    assert draw("report", 0, "a") == draw("report", 0, "a")
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("name", NAMES)
def test_suites_travel_to_other_processes(name: str, tmp_path: Path) -> None:
    suite = pickle.loads(pickle.dumps(SUITES[name].with_cache(tmp_path)))
    assert suite.name == name
    assert suite.cache == tmp_path
    assert suite.summary
    assert SUITES[name].cache != tmp_path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", SPLITS)
def test_what_every_suite_promises(name: str, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "IMAGES", 8)
    suite = SUITES[name].with_cache(tmp_path)
    if suite.missing():
        pytest.skip(f"not installed: {', '.join(need.what for need in suite.missing())}")
    first, again, other = (suite.tasks(split, seed) for seed in (3, 3, 4))
    assert len({task.name for task in first}) == len(first)
    for task, same, different in zip(first, again, other, strict=True):
        assert task.name.split("/")[0] == name
        assert task.negative is suite.negative
        assert not any(module.training for module in task.model.modules())
        assert any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in task.model.modules())
        assert all(ramp[-1] == shift for shift, ramp in task.ramps.items())
        assert set(task.ramps) in (set(), set(task.shifts))
        shift = task.shifts[-1]
        domain = task.domain(shift)
        assert domain.inputs.dtype == torch.float32
        assert domain.labels.dtype == torch.int64
        assert len(domain.inputs) == len(domain.labels) > 0
        assert bool(domain.inputs.isfinite().all())
        with torch.no_grad():
            right = task.correct(task.model(domain.inputs[:8]), domain.labels[:8])
        assert right.dtype == torch.bool
        assert right.shape == (8,)
        groups = task.groups(domain.labels)
        assert groups.dtype == torch.int64
        assert groups.shape == domain.labels.shape
        assert int(groups.max()) < 12
        assert torch.equal(domain.inputs, same.domain(shift).inputs)
        assert torch.equal(domain.labels, same.domain(shift).labels)
        if name != "activity":  # whose domains are all that a person did
            assert not torch.equal(domain.inputs, different.domain(shift).inputs)
        batches = task.source_batches()
        if batches is not None:
            assert 900 < sum(len(batch) for batch in batches) <= 2000  # all there are, where there are fewer
            assert all(len(batch) == 100 for batch in batches[:-1])
            assert all(batch.shape[1:] == domain.inputs.shape[1:] for batch in batches)
            assert abs(float(torch.cat(batches).mean())) < 0.1  # normalized


def test_checkpoints_are_small_and_say_where_they_come_from() -> None:
    files = {path.stem: path for path in WEIGHTS.glob("*.safetensors")}
    assert set(files) == {"fashion", *(f"activity-{fold}" for fold in UNSEEN)}
    for name, path in files.items():
        assert path.stat().st_size < (2_000_000 if name == "fashion" else 150_000)
        with safe_open(path, "pt") as file:
            notes = file.metadata()
        assert {"model", "data", "licence", "seed", "epochs"} <= set(notes)
        model = load_weights(FashionNet() if name == "fashion" else ActivityNet(), name)
        assert not model.training


def test_the_models_have_the_layers_they_say() -> None:
    assert sum(isinstance(m, nn.BatchNorm2d) for m in FashionNet().modules()) == 13
    assert sum(isinstance(m, nn.BatchNorm1d) for m in ActivityNet().modules()) == 4
    with torch.no_grad():
        assert FashionNet().eval()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
        assert ActivityNet().eval()(torch.zeros(2, 6, 100)).shape == (2, 7)
