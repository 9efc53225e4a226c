"""The metrics' numbers for TensorBoard, MLflow, or anything with a method `log(values, step)`."""

from __future__ import annotations

import atexit
import math
import re
import weakref
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from normadapt.adapted._adapt import AdaptedModel
from normadapt.errors import ExtraMissingError
from normadapt.monitor.meter import Meter, Reading, check_settings, leading_layers, mean_weights, whole_model_tail
from normadapt.pilot import Pilot
from normadapt.pilot.stages import Stage


class Logger(Protocol):
    """Whatever takes numbers by name; it is called in a thread of its own."""

    def log(self, values: Mapping[str, float], step: int) -> object:
        """Keep these numbers.

        Args:
            values: By name, parts divided by "/"; all finite.
            step: Adapting passes so far.
        """


class TensorBoardLogger:
    """Writes scalars for TensorBoard.

    Args:
        writer: A folder, or a `SummaryWriter` (any object with `add_scalar(name, value, step)`).

    Raises:
        ExtraMissingError: If a folder is given and TensorBoard is not installed.
    """

    def __init__(self, writer: Any) -> None:
        if isinstance(writer, (str, Path)):
            try:
                module = import_module("torch.utils.tensorboard")
            except ImportError as error:
                raise ExtraMissingError("TensorBoardLogger needs TensorBoard -> pip install tensorboard") from error
            writer = module.SummaryWriter(str(writer))
        self.writer = writer

    def log(self, values: Mapping[str, float], step: int) -> None:
        """As `Logger.log`."""
        for name, value in values.items():
            self.writer.add_scalar(f"normadapt/{name}", value, step)
        if hasattr(self.writer, "flush"):
            self.writer.flush()


class MLflowLogger:
    """Writes metrics to a run of MLflow: the one that is active where the logger is made, or the one named.

    MLflow's active run belongs to a thread, and numbers come from another; so the run is settled here.

    Args:
        run_id: Of the run.
        client: An `MlflowClient`; by default a new one.

    Raises:
        ExtraMissingError: If MLflow is needed for that and not installed.
        ValueError: If no run is named and none is active.
    """

    def __init__(self, run_id: str | None = None, *, client: Any = None) -> None:
        if run_id is None or client is None:
            try:
                mlflow: Any = import_module("mlflow")
            except ImportError as error:
                raise ExtraMissingError("MLflowLogger needs MLflow -> pip install mlflow") from error
            active = mlflow.active_run()
            if run_id is None and active is None:
                raise ValueError("MLflowLogger() needs an active run -> `with mlflow.start_run():`, or give run_id")
            run_id = active.info.run_id if run_id is None else run_id
            client = mlflow.MlflowClient() if client is None else client
        self.run_id = run_id
        self.client = client

    def log(self, values: Mapping[str, float], step: int) -> None:
        """As `Logger.log`."""
        for name, value in values.items():
            key = re.sub(r"[^\w\-. /]", "_", f"normadapt/{name}")  # all that MLflow allows
            self.client.log_metric(self.run_id, key, value, step=step)


class MetricsLog:
    """Gives a logger what the metrics say, every few seconds in a thread of its own while something happens.

    Begins at once; `close`, leaving it as a context, or the end of the process gives the last numbers and ends it.

    Args:
        watched: The model, or the pilot whose model it is.
        logger: Takes the numbers; what it raises is counted in `failures` and costs no answer.
        top: Layers with numbers of their own: those with the largest shift.
        seconds: Between two looks.

    Raises:
        TypeError, ValueError: If an argument is not what it should be.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import normadapt as na
        >>> class Print:
        ...     def log(self, values, step):
        ...         print(step, *(name for name in sorted(values) if "/" not in name))
        >>> adapted = na.adapt(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)))
        >>> with MetricsLog(adapted, logger=Print()):
        ...     _ = adapted(torch.randn(8, 1, 8, 8))
        1 seconds_of_a_pass shift skipped_layers
    """

    def __init__(self, watched: AdaptedModel | Pilot, *, logger: Logger, top: int = 5, seconds: float = 5.0) -> None:
        check_settings(top, seconds)
        if not callable(getattr(logger, "log", None)):
            raise TypeError(f"logger must have a method log(values, step); got {logger!r}")
        self.logger = logger
        self.top = top
        self.error: Exception | None = None
        self._failures = 0
        self._happened: object = None
        self._took = [0.0, 0]
        self._closed = False
        self._meter = Meter(watched, self._passed)
        self._meter.every(seconds, self.log)
        atexit.register(_end, weakref.WeakMethod(self.close))

    @property
    def failures(self) -> int:
        """How often logging or looking on failed; `error` has the last that logging met."""
        return self._failures + self._meter.failures

    def _passed(self, seconds: float) -> None:
        self._took = [self._took[0] + seconds, self._took[1] + 1]

    def log(self) -> None:
        """Give the logger what there is to tell now, if there was a pass or a move of the pilot since."""
        try:
            with self._meter.turn:
                told = self._meter.read()
                (took, passes), self._took = self._took, [0.0, 0]
                stage = None if told.status is None else told.status["stage"]
                happened = (told.updates, stage, sum(told.rollbacks.values()))
                if happened == self._happened or not told.updates:
                    return
                self._happened = happened
                values = flat(told, self._meter.layers, self.top)
                if passes:
                    values["seconds_of_a_pass"] = took / passes
                self.logger.log(values, told.updates)
        except Exception as error:  # looking on may not cost anybody an answer
            self._failures += 1
            self.error = error.with_traceback(None)

    def close(self) -> None:
        """Give the last numbers, and look on no more."""
        if not self._closed:
            self._closed = True
            self._meter.close()
            self.log()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end(close: weakref.WeakMethod[Any]) -> None:
    call = close()
    if call is not None:
        call()


def flat(told: Reading, layers: tuple[str, ...], top: int) -> dict[str, float]:
    """A reading as numbers by name, without those that are not known."""
    values: dict[str, float | None] = {
        "skipped_layers": float(told.skipped),
        "domains": float(told.domains) or None,
        "domain_shift": told.domain_shift,
        "entropy": told.entropy,
        "agreement": told.agreement,
    }
    if told.layers is not None:
        shift, tail = told.layers.shift, told.layers.tail
        for place in leading_layers(shift, len(shift))[:1]:
            values["shift"] = float(shift[place])
        bound = whole_model_tail(tail)
        values["shift_tail_log10"] = math.log10(bound) if bound > 0 else math.nan
        values |= {f"mix_weight/{statistic}": weight for statistic, weight in mean_weights(told.layers).items()}
        for place in leading_layers(shift, top):
            values[f"layer_shift/{layers[place]}"] = float(shift[place])
    status = told.status
    if status is not None:
        values["stage"] = float(list(Stage).index(Stage(status["stage"])))
        values["share"] = status["share"]
        values["active_snapshot"] = status["snapshot"]
        values["rollbacks"] = float(sum(told.rollbacks.values()))
        for guard, state in status["guards"].items():
            if not state["hard"]:
                values[f"guard_log_e_value/{guard}"] = state["log_value"]
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
