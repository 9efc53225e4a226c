from __future__ import annotations

import sys
import threading
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normadapt as na
from monitor import watched
from normadapt.errors import ExtraMissingError
from normadapt.monitor.loggers import MetricsLog, MLflowLogger, TensorBoardLogger
from pilot.stories import Story


class Kept:
    """A logger that keeps what it gets."""

    def __init__(self) -> None:
        self.told: list[tuple[dict[str, float], int]] = []

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.told.append((dict(values), step))


def adapted() -> na.AdaptedModel:
    torch.manual_seed(0)
    return watched.adapted(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).eval())


def test_a_logger_gets_the_numbers_of_the_report_once_for_each_look() -> None:
    model, kept = adapted(), Kept()
    with MetricsLog(model, logger=kept, seconds=3600) as log:
        log.log()
        assert kept.told == []  # nothing has happened
        for _ in range(20):
            model(torch.randn(8, 1, 8, 8) + 2)
        log.log()
        log.log()
    (values, step), *others = kept.told
    assert others == []
    site = model.report().sites[0]
    assert step == 20
    assert values["shift"] == values["layer_shift/1"] == pytest.approx(site.shift, rel=1e-6)
    assert values["mix_weight/mean"] == pytest.approx(site.mean_weight, rel=1e-6)
    assert values["domain_shift"] == pytest.approx(model.domain.shift, rel=1e-6)
    assert values["seconds_of_a_pass"] > 0
    assert "agreement" not in values  # nobody compared
    model(torch.randn(8, 1, 8, 8))
    log.close()
    assert len(kept.told) == 1  # it looks on no more


def test_a_pilots_moves_are_logged_though_nothing_adapts() -> None:
    told, kept = Story(), Kept()
    with MetricsLog(told.pilot, logger=kept, seconds=3600) as log:
        told.until("canary", labelled=True)
        log.log()
        told.pilot.rollback("me")
        log.log()
    (before, _), (after, _) = kept.told
    assert (before["stage"], after["stage"]) == (2, 4)
    assert (before["rollbacks"], after["rollbacks"]) == (0, 1)
    assert "guard_log_e_value/disagreement" in before
    assert 0 < before["agreement"] <= 1


def test_a_logger_that_raises_costs_no_answer() -> None:
    class Broken:
        def log(self, values: Mapping[str, float], step: int) -> None:
            raise OSError("disk full")

    model = adapted()
    log = MetricsLog(model, logger=Broken(), seconds=3600)
    model(torch.randn(8, 1, 8, 8))
    log.log()
    log.close()
    assert log.failures == 1
    assert "disk full" in str(log.error)


def test_it_logs_by_itself() -> None:
    done = threading.Event()

    class Tells:
        def log(self, values: Mapping[str, float], step: int) -> None:
            done.set()

    model = adapted()
    with MetricsLog(model, logger=Tells(), seconds=0.02):
        model(torch.randn(8, 1, 8, 8))
        assert done.wait(5)


def test_what_cannot_log_is_refused() -> None:
    with pytest.raises(TypeError, match="log"):
        MetricsLog(adapted(), logger=print)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seconds"):
        MetricsLog(adapted(), logger=Kept(), seconds=0)


def test_tensorboard_gets_scalars() -> None:
    class Writer:
        def __init__(self) -> None:
            self.scalars: list[tuple[str, float, int]] = []
            self.flushed = 0

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.scalars.append((name, value, step))

        def flush(self) -> None:
            self.flushed += 1

    writer = Writer()
    TensorBoardLogger(writer).log({"shift": 0.5, "layer_shift/1": 0.25}, 7)
    assert writer.scalars == [("normadapt/shift", 0.5, 7), ("normadapt/layer_shift/1", 0.25, 7)]
    assert writer.flushed == 1


def test_mlflow_gets_metrics_of_the_run_that_was_active_in_names_it_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics: list[tuple[Any, ...]] = []

    class Client:
        def log_metric(self, run_id: str, key: str, value: float, step: int) -> None:
            metrics.append((run_id, key, value, step))

    run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))
    mlflow: Any = types.ModuleType("mlflow")
    mlflow.active_run, mlflow.MlflowClient = lambda: run, Client
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    logger = MLflowLogger()
    mlflow.active_run = lambda: None  # another thread has none
    logger.log({"guard_log_e_value/blur: strong?": 1.5}, 3)
    assert metrics == [("r1", "normadapt/guard_log_e_value/blur_ strong_", 1.5, 3)]
    with pytest.raises(ValueError, match="active run"):
        MLflowLogger()
    MLflowLogger("r2").log({"shift": 0.5}, 4)
    assert metrics[-1] == ("r2", "normadapt/shift", 0.5, 4)


def test_without_them_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ExtraMissingError, match=r"^[^\n]*pip install mlflow$"):
        MLflowLogger()
    with pytest.raises(ExtraMissingError, match=r"^[^\n]*pip install tensorboard$"):
        TensorBoardLogger(tmp_path)
