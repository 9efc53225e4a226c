"""The corruptions of ImageNet-C (Hendrycks and Dietterich 2019) on small grey images, by imagecorruptions-imaug."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import io
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normadapt.bench.suites.base import Need, package_folder
from normadapt.errors import NormadaptError

PACKAGE, VERSION = "imagecorruptions-imaug", "1.1.5"
COMMON = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
"""The fifteen of the benchmark, in its order."""
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""The four that ImageNet-C sets aside for choosing hyper-parameters."""
SEVERITIES = (1, 2, 3, 4, 5)

_LEAST = 32  # pixels: the package takes no smaller side
_OWN_SEED = {"impulse_noise", "glass_blur"}  # these draw from a generator of their own, unseeded unless told
_GREEN = 1


def _is_there() -> bool:
    needed = ("imagecorruptions", "numba", "cv2", "skimage", "scipy", "PIL")
    return all(package_folder(name) is not None for name in needed)


NEED = Need(f"the package {PACKAGE} with numba, OpenCV and scikit-image", _is_there, "make bench-setup")


def installed_version() -> str:
    """Version of the package, part of every cache key."""
    return importlib.metadata.version(PACKAGE)


def corrupted(images: NDArray[np.uint8], name: str, severity: int, seed: int) -> NDArray[np.uint8]:
    """Grey images under a corruption at the strength that ImageNet-C gives it.

    The package takes colour images of at least 32 x 32. A smaller image gets a border that repeats its edge, becomes
    colour with three equal channels, is corrupted, and loses the border again. Of the result the green channel is
    taken: noise differs between channels, and a mean over them would weaken it below its definition.

    `saturate` leaves grey images as they are up to severity 3, and darkens them at 4 and 5. `spatter` divides by zero
    where no drop falls on an image, which is then left as it is.

    Args:
        images: (M, H, W).
        name: From `COMMON` or `EXTRA`.
        severity: 1 to 5.
        seed: Every image draws from this and its position: the first images of a longer array come out the same.

    Returns:
        (M, H, W).

    Raises:
        NormadaptError: If the package is not installed.
    """
    if not _is_there():
        raise NormadaptError(f"the corruptions need {NEED.what}\n  -> {NEED.install}")
    corrupt = _package().corrupt
    height, width = images.shape[1:]
    rows, columns = (_border(side) for side in (height, width))
    result = np.empty_like(images)
    seeds = np.random.default_rng(seed).integers(2**32, size=len(images))
    with _quiet_and_restored():
        for i, image in enumerate(images):
            wide = np.pad(image, (rows, columns), mode="edge")
            colour = np.repeat(wide[:, :, np.newaxis], 3, axis=2)
            np.random.seed(seeds[i])
            own = {"seed": int(seeds[i])} if name in _OWN_SEED else {}
            with contextlib.suppress(FloatingPointError):
                colour = corrupt(colour, severity=severity, corruption_name=name, **own)
            result[i] = colour[rows[0] : rows[0] + height, columns[0] : columns[0] + width, _GREEN]
    return result


def _border(side: int) -> tuple[int, int]:
    """Pixels before and after, so that `side` becomes at least what the package takes."""
    lacking = max(0, _LEAST - side)
    return lacking // 2, lacking - lacking // 2


@contextlib.contextmanager
def _quiet_and_restored() -> Iterator[None]:
    """The package prints, and seeds the global state from which others may draw."""
    state = np.random.get_state()
    try:
        with contextlib.redirect_stdout(io.StringIO()), np.errstate(invalid="raise"):
            yield
    finally:
        np.random.set_state(state)


@functools.cache
def _package() -> Any:
    """The package, with the pictures that `frost` reads from disk and enlarges for every image kept in memory."""
    package = importlib.import_module("imagecorruptions")
    inner: Any = importlib.import_module("imagecorruptions.corruptions")
    cv2 = importlib.import_module("cv2")
    enlarged: dict[tuple[int, tuple[int, int]], Any] = {}

    @functools.cache
    def imread(path: str) -> Any:
        return cv2.imread(path)

    def resize(image: Any, dsize: tuple[int, int], interpolation: int) -> Any:
        key = (id(image), dsize)  # the pictures are never freed, so that their identities stay
        if key not in enlarged:
            enlarged[key] = cv2.resize(image, dsize=dsize, interpolation=interpolation)
        return enlarged[key]

    names = {name: getattr(cv2, name) for name in dir(cv2) if not name.startswith("__")}
    inner.cv2 = types.SimpleNamespace(**{**names, "imread": lambda path: imread(str(path)), "resize": resize})
    return package
