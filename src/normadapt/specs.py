"""MODEL and DATA of the command line: from `package.module:callable` or `path/file.py:callable` to objects."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from normadapt.errors import SpecError
from normadapt.layers.batches import batch_length, split_item

_FORMS = "package.module:callable or path/file.py:callable"


def load_callable(spec: str) -> Callable[[], Any]:
    """The callable that a spec names.

    As for a script, modules beside a file can be imported by it, and packages in the current folder are found.

    Args:
        spec: `package.module:callable` or `path/file.py:callable`; the callable takes no arguments.

    Raises:
        SpecError: If there is no such file, module or name in it, or if what it names cannot be called without
            arguments. If the module itself fails while it is imported, that error is the `__cause__`.

    Example:
        >>> load_callable("collections:OrderedDict")()
        OrderedDict()
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        hint = f"{spec.rstrip(':')}:model" if spec.strip(":") else "examples/usps.py:model"
        raise SpecError(f"expected {_FORMS}, got {spec!r}\n  -> name the callable after a colon, as in {hint}")
    module = _load_file(place, spec) if place.endswith(".py") else _load_module(place, spec)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise SpecError(f"{spec!r}: {place} has no {name!r}\n  -> {_alternatives(part, found)}")
        found = getattr(found, part)
    return _called_without_arguments(found, name, spec)


def load_model(spec: str) -> nn.Module:
    """The model that a spec's callable returns.

    Raises:
        SpecError: If the spec cannot be resolved, or if it returns anything but an `nn.Module`.
    """
    model = load_callable(spec)()
    if not isinstance(model, nn.Module):
        raise SpecError(
            f"MODEL {spec!r}: expected a callable that returns a torch.nn.Module, got {_described(model)}\n"
            "  -> return the module itself, with its weights loaded"
        )
    return model


def load_data(spec: str) -> Data:
    """The data that a spec's callable returns: inputs or (inputs, targets), batch by batch.

    Raises:
        SpecError: If the spec cannot be resolved, or if it returns something that cannot be iterated over.
    """
    make = load_callable(spec)
    return Data(spec, make)


class Data:
    """What a DATA callable returns, as something that can be iterated over any number of times.

    A generator is used up after one pass, so it is made anew for each; a list or a loader is made only once.
    """

    def __init__(self, spec: str, make: Callable[[], Any]) -> None:
        self.spec = spec
        self._make = make
        self._made = self._make_iterable()
        self._unused = True

    def __iter__(self) -> Iterator[Any]:
        if not self._unused and isinstance(self._made, Iterator):
            self._made = self._make_iterable()
        self._unused = False
        for index, item in enumerate(self._made):
            try:
                split_item(item)
            except TypeError as error:
                raise SpecError(f"DATA {self.spec!r}, batch {index}: {error}") from error
            yield item

    @property
    def batches(self) -> int | None:
        """Number of batches in a pass, where the data know it."""
        try:
            return len(self._made)  # type: ignore[arg-type]
        except TypeError:
            return None

    def _make_iterable(self) -> Iterable[Any]:
        made = self._make()
        if not isinstance(made, Iterable) or isinstance(made, (str, bytes, Tensor)):
            raise SpecError(
                f"DATA {self.spec!r}: expected a callable that returns an iterable of batches (a DataLoader, a list, "
                f"a generator), got {_described(made)}\n"
                "  -> yield batches, each a tensor or a pair (inputs, targets)"
            )
        return made


def split_targets(item: Any) -> tuple[Any, Tensor | None]:
    """The model's part of a batch, and its targets or None.

    A pair (inputs, targets) is a tuple or list of two whose second is a tensor or array of numbers with one
    entry per instance. Everything else is input.

    Example:
        >>> inputs, targets = split_targets((torch.zeros(2, 3), [1, 0]))
        >>> tuple(inputs.shape), targets
        ((2, 3), tensor([1, 0]))

    Raises:
        SpecError: If a batch has a list of targets of another length.
    """
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        return item, None
    inputs, targets = item
    try:
        targets = torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError):
        return item, None
    count = batch_length(inputs)
    if targets.dim() == 1 and targets.shape[0] != count and not targets.is_complex():
        raise SpecError(
            f"DATA: a batch has {count} inputs and {targets.shape[0]} targets\n  -> yield one target per input"
        )
    if targets.dim() == 0 or targets.is_complex() or targets.shape[0] != count:
        return item, None
    return inputs, targets


def resplit(items: Iterable[Any], size: int) -> Iterator[Any]:
    """The same instances in the same order, in batches of `size`; the last one may be smaller.

    Args:
        items: Batches as DATA yields them: tensors, dicts of tensors, or pairs of either with targets.
        size: Instances per batch.

    Raises:
        SpecError: If a batch holds something that has no row per instance.

    Example:
        >>> [len(batch) for batch in resplit([torch.zeros(3, 2), torch.zeros(4, 2)], 5)]
        [5, 2]
    """
    if size < 1:
        raise SpecError(f"--batch-size: expected at least 1, got {size}")
    waiting: list[Any] = []
    count = 0
    for item in items:
        inputs, targets = split_targets(item)
        if isinstance(inputs, (tuple, list)):
            inputs = inputs[0]  # what follows the input is not the model's
        rest = inputs if targets is None else (inputs, targets)
        length = batch_length(inputs)
        start = 0
        while start < length:
            taken = min(size - count, length - start)
            waiting.append(_rows(rest, start, start + taken, length))
            start, count = start + taken, count + taken
            if count == size:
                yield _joined(waiting)
                waiting, count = [], 0
    if waiting:
        yield _joined(waiting)


def _rows(value: Any, start: int, stop: int, length: int) -> Any:
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == length:
        return value[start:stop]
    if isinstance(value, dict):
        return {key: _rows(entry, start, stop, length) for key, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(_rows(entry, start, stop, length) for entry in value)
    raise SpecError(
        f"--batch-size: expected batches of tensors with one row per instance ({length} here), got "
        f"{_described(value)}\n  -> let DATA yield batches of the wanted size, and leave --batch-size out"
    )


def _joined(pieces: list[Any]) -> Any:
    first = pieces[0]
    if len(pieces) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(pieces)
    if isinstance(first, dict):
        return {key: _joined([piece[key] for piece in pieces]) for key in first}
    return tuple(_joined(list(parts)) for parts in zip(*pieces, strict=True))


def _load_file(place: str, spec: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        folder = path.parent
        names = [file.name for file in folder.glob("*.py")] if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=3)
        remedy = f"did you mean {' or '.join(near)}?" if near else f"give a path that exists (from {Path.cwd()})"
        raise SpecError(f"{spec!r}: there is no file {place}\n  -> {remedy}")
    # One name per file: MODEL and DATA in one file share the module, and no file hides an installed package.
    name = f"normadapt_spec_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    _find_modules_in(path.parent)
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise SpecError(f"{spec!r}: {place} cannot be imported\n  -> name a Python source file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _failed_import(place, spec, error) from error
    return module


def _load_module(place: str, spec: str) -> ModuleType:
    _find_modules_in(Path.cwd())
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        # Only the module that was named is the caller's slip; one that it imports is its own failure.
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise _failed_import(place, spec, error) from error
        file = f"{place}.py"
        remedy = f"for a file write {file}:{spec.rpartition(':')[2]}" if "/" in place or Path(file).is_file() else ""
        remedy = remedy or "check the spelling, and install its package in this environment"
        raise SpecError(f"{spec!r}: there is no module {error.name!r}\n  -> {remedy}") from None
    except Exception as error:
        raise _failed_import(place, spec, error) from error


def _find_modules_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _failed_import(place: str, spec: str, error: Exception) -> SpecError:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return SpecError(
        f"{spec!r}: {place} was found, but importing it fails with {type(error).__name__}: {error}{where}\n"
        f"  -> correct that; python {place if place.endswith('.py') else f'-m {place}'} shows it in full"
    )


def _alternatives(name: str, owner: Any) -> str:
    names = [each for each in dir(owner) if not each.startswith("_") and callable(getattr(owner, each, None))]
    near = difflib.get_close_matches(name, names, n=3)
    if near:
        return f"did you mean {' or '.join(near)}?"
    own = [each for each in names if getattr(getattr(owner, each), "__module__", None) == owner.__name__]
    return f"it defines {', '.join(own)}" if own else f"define it there: def {name}(): ..."


def _called_without_arguments(found: Any, name: str, spec: str) -> Callable[[], Any]:
    remedy = f"define a function without arguments that returns it: def {name.rpartition('.')[2]}(): return ..."
    if not callable(found):
        raise SpecError(f"{spec!r}: expected a callable, got {_described(found)}\n  -> {remedy}")
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # some built-in callables have none
        return found  # type: ignore[no-any-return]
    try:
        signature.bind()
    except TypeError as error:
        raise SpecError(f"{spec!r}: expected a callable without arguments, but {error}\n  -> {remedy}") from error
    return found  # type: ignore[no-any-return]


def _described(value: Any) -> str:
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    if value is None:
        return "None (is its return missing?)"
    return f"a value of type {name}"
