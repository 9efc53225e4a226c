"""MODEL and DATA specs: what they resolve to, and what is said when they do not."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from normadapt.errors import SpecError
from normadapt.layers.batches import iterates_once
from normadapt.specs import load_callable, load_data, load_model, resplit, split_targets


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a source file and gives its path; what its import leaves in sys is undone."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)

    def writer(text: str, name: str = "own.py") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    yield writer
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_file_and_module_specs_name_the_callable(write):
    write("def answer():\n    return 42\n", "package_of_mine/inner.py")
    path = write("class Box:\n    @staticmethod\n    def made():\n        return 7\n")
    assert load_callable("package_of_mine.inner:answer")() == 42
    assert load_callable(f"{path}:Box.made")() == 7
    assert load_callable("own.py:Box.made")() == 7


def test_specs_of_one_file_share_its_module_and_find_its_neighbours(write):
    write("VALUE = []\n", "neighbour.py")
    path = write(
        "import neighbour\ndef put():\n    neighbour.VALUE.append(1)\ndef get():\n    return len(neighbour.VALUE)\n"
    )
    load_callable(f"{path}:put")()
    assert load_callable(f"{path}:get")() == 1


def test_a_file_does_not_hide_a_package_of_its_name(write):
    path = write("def mine():\n    return 1\n", "torch.py")
    load_callable(f"{path}:mine")
    assert sys.modules["torch"] is torch


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("own.py", ["expected package.module:callable or path/file.py:callable", "'own.py'", "own.py:model"]),
        (":model", ["expected", "':model'"]),
        ("own.py:", ["expected", "own.py:model"]),
        ("missing.py:model", ["there is no file missing.py"]),
        ("owm.py:model", ["there is no file owm.py", "did you mean own.py?"]),
        ("no_such_package_here.inner:model", ["there is no module 'no_such_package_here'", "install"]),
        ("own:modle", ["own has no 'modle'", "did you mean model?"]),
        ("own.py:xyz", ["own.py has no 'xyz'", "it defines model, needy"]),
        ("own.py:NUMBER", ["expected a callable", "a value of type int", "def NUMBER()"]),
        ("own.py:needy", ["without arguments", "'size'", "def needy()"]),
    ],
)
def test_errors_say_expected_got_and_remedy(write, spec, said):
    write("NUMBER = 3\ndef model():\n    return 1\ndef needy(size):\n    return size\n")
    with pytest.raises(SpecError) as caught:
        load_callable(spec)
    message = str(caught.value)
    assert "  -> " in message
    for part in said:
        assert part in message


def test_a_module_path_that_is_a_file_is_pointed_out(write):
    write("def model():\n    return 1\n", "folder/inner.py")
    with pytest.raises(SpecError, match=r"folder/inner\.py:model"):
        load_callable("folder/inner:model")


@pytest.mark.parametrize("spec", ["own.py:model", "own:model"])
@pytest.mark.parametrize(
    ("text", "kind"), [("def model():\n    pass\n1 / 0\n", ZeroDivisionError), ("import no_such_thing", ImportError)]
)
def test_a_module_that_fails_keeps_its_own_error(write, spec, text, kind):
    path = write(text)
    with pytest.raises(SpecError, match=rf"{kind.__name__}|ModuleNotFoundError") as caught:
        load_callable(spec)
    assert isinstance(caught.value.__cause__, kind)
    assert "own.py, line" in str(caught.value)
    assert path not in [getattr(module, "__file__", None) for module in list(sys.modules.values())]


def test_load_model_wants_a_module(write):
    path = write("from torch import nn\ndef model():\n    return nn.Linear(2, 3)\ndef none():\n    nn.Linear(2, 3)\n")
    assert isinstance(load_model(f"{path}:model"), nn.Linear)
    with pytest.raises(SpecError, match=r"torch\.nn\.Module, got None \(is its return missing"):
        load_model(f"{path}:none")


def test_data_can_be_iterated_again_and_is_made_again_only_if_it_must(write):
    path = write(
        "import torch\nMADE = []\n"
        "def generator():\n    MADE.append(0)\n    yield torch.zeros(2, 3)\n    yield torch.ones(1, 3)\n"
        "def loader():\n    MADE.append(1)\n    return [torch.zeros(2, 3)]\n"
        "def count():\n    return MADE\n"
    )
    once, listed = load_data(f"{path}:generator"), load_data(f"{path}:loader")
    assert not iterates_once(once)
    assert [[len(item) for item in once] for _ in range(3)] == [[2, 1]] * 3
    assert [[len(item) for item in listed] for _ in range(3)] == [[2]] * 3
    assert load_callable(f"{path}:count")().count(1) == 1
    assert (once.batches, listed.batches) == (None, 1)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return None", "got None"),
        ("return 3", "a value of type int"),
        ("import torch\n    return torch.zeros(3, 2)", "a value of type torch.Tensor"),
    ],
)
def test_data_must_be_iterable(write, body, said):
    path = write(f"def data():\n    {body}\n")
    with pytest.raises(SpecError, match="expected a callable that returns an iterable of batches") as caught:
        load_data(f"{path}:data")
    assert said in str(caught.value)


def test_a_batch_of_the_wrong_kind_is_named(write):
    path = write("import torch\ndef data():\n    return [torch.zeros(1, 2), 'text']\n")
    with pytest.raises(SpecError, match=r"batch 1: .*str"):
        list(load_data(f"{path}:data"))


X = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("item", "targets"),
    [
        (X, None),
        ((X,), None),
        ((X, torch.tensor([1, 2, 0])), [1, 2, 0]),
        ([X, torch.tensor([1.5, 2, 0]).numpy()], [1.5, 2.0, 0.0]),
        ([{"x": X}, [1, 2, 0]], [1, 2, 0]),
        ((X, torch.tensor(1)), None),
        ((X, "text"), None),
        ((X, torch.zeros(3, 1), X), None),
        ({"x": X, "y": X}, None),
    ],
)
def test_split_targets(item, targets):
    inputs, found = split_targets(item)
    assert (None if found is None else found.tolist()) == targets
    assert inputs is (item if targets is None else item[0])


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 7), max_size=6), size=st.integers(1, 9), kind=st.sampled_from("tpd"))
def test_resplit_keeps_every_instance_in_order(lengths, size, kind):
    numbers = torch.arange(sum(lengths) * 2.0).view(-1, 2)
    pieces = [part for part in numbers.split(lengths) if kind == "t" or len(part)]
    wrap = {"t": lambda x: x, "p": lambda x: (x, x[:, 0].long()), "d": lambda x: {"x": x}}[kind]
    batches = list(resplit([wrap(piece) for piece in pieces], size))
    inputs = [b if kind == "t" else b[0] if kind == "p" else b["x"] for b in batches]
    assert all(len(x) == size for x in inputs[:-1])
    assert all(0 < len(x) <= size for x in inputs)
    assert torch.equal(torch.cat([*inputs, numbers[:0]]), numbers)
    if kind == "p":
        assert all(torch.equal(labels, x[:, 0].long()) for x, labels in batches)


def test_resplit_refuses_what_has_no_rows():
    with pytest.raises(SpecError, match="one row per instance"):
        list(resplit([{"x": X, "flag": True}], 2))
    with pytest.raises(SpecError, match="at least 1, got 0"):
        list(resplit([X], 0))


def test_specs_are_read_from_the_current_folder(write, tmp_path):
    write("def model():\n    return 5\n", "beside.py")
    assert Path.cwd() == tmp_path
    assert load_callable("beside:model")() == 5


def test_targets_of_another_length_are_an_error():
    with pytest.raises(SpecError, match="8 inputs and 5 targets"):
        split_targets((torch.zeros(8, 3), torch.zeros(5)))
