"""Seeing it: histories of what adapting did, the offline report, metrics and the live page."""

from normadapt.monitor.loggers import MetricsLog, MLflowLogger, TensorBoardLogger
from normadapt.monitor.metrics import PrometheusExporter
from normadapt.monitor.recorder import HISTORY, Recorder
from normadapt.monitor.serving import app
from normadapt.reports.history import Channel, History, Mark

__all__ = [
    "HISTORY",
    "Channel",
    "History",
    "MLflowLogger",
    "Mark",
    "MetricsLog",
    "PrometheusExporter",
    "Recorder",
    "TensorBoardLogger",
    "app",
]
