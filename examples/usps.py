"""MODEL and DATA for the command line: a digit classifier of another package, on digits it was not trained on.

normadapt run examples/usps.py:model examples/usps.py:target
"""

from collections.abc import Iterator

from torch import Tensor, nn, split

from normadapt.demo import contrast, mnist_digits, normalized, usps_net


def model() -> nn.Module:
    """USPSNet as its authors published it."""
    return usps_net()


def target() -> Iterator[tuple[Tensor, Tensor]]:
    """MNIST digits at 0.3 of their contrast, in batches of 64. Only the accuracy looks at the labels."""
    images, labels = mnist_digits()
    yield from zip(split(normalized(contrast(images, seed=0)), 64), split(labels, 64), strict=True)
